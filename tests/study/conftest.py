from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from nalora_jax.mesh.distributed import make_mesh
from nalora_jax.study import execution
from nalora_jax.study.planned_runs import Run
from nalora_jax.study.protocol import Protocol, read_protocol
from nalora_jax.study.records import StudyRecord
from nalora_jax.study.resources import Resources
from nalora_jax.train.run import build_placed
from tests import tiny

# Settings of tiny runs and the task, of every protocol on `questions`.
SETTINGS = """\
lora.rules = [{pattern = "ffn/gate_proj", rank = 2}]
train = {batch_size = 4, log_every = 4}
compute = {dtype = "float32", compilation_cache = false}
mesh = {data = 1}

[tasks.z]
dataset = QUESTIONS
train = "train[:60%]"
validation = "train[60%:80%]"
test = "train[80%:]"
validation_items = 20
test_items = 20
data = {max_length = 16}
"""
PROBE = '[probes.z_again]\ndataset = QUESTIONS\nsplit = "train[80%:]"\nitems = 20\n'
PROTOCOL = """
question = "Which method learns that the answer is z?"
models = [BASE]
baseline = "lora"
rates = [1e-2, 2e-2]
tuning_seeds = [0]
test_seeds = [1, 2]
evaluate_every = 4
extend = 1

[run]
steps = 8
SETTINGS
PROBE
[methods.lora]

[methods.half]
about = "half the rate on the gate"
settings.optimizer.rates = [["gate_proj", 0.5]]

[methods.again]
about = "the same method from another start"
placebo_of = "half"
reseed = 1000
"""


def write_study(folder: Path, base: Path, questions: Path, protocol: str = PROTOCOL) -> Path:
    """Writes a protocol with the common settings, the base model and the questions; returns the
    folder."""
    texts = {"SETTINGS": SETTINGS, "PROBE": PROBE}
    texts |= {"BASE": json.dumps(str(base)), "QUESTIONS": json.dumps(str(questions))}
    for name, text in texts.items():
        protocol = protocol.replace(name, text)
    (folder / "protocol.toml").write_text(protocol)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama as a Hugging Face folder; its words are letters."""
    folder = tmp_path_factory.mktemp("models") / "base"
    return tiny.make_model(folder, tiny.HF | {"intermediate_size": 64})


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answer is always z: a few steps learn that."""
    return tiny.make_questions(tmp_path_factory.mktemp("data") / "z.jsonl", 300)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of these tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NALORA_CACHE", tiny.new_cache(tmp_path_factory.mktemp("new") / "cache"))
        yield


@pytest.fixture
def study(base: Path, questions: Path, tmp_path: Path) -> Path:
    """A study of three methods in a folder of its own, which no repository holds."""
    return write_study(tmp_path, base, questions)


def assert_starts_alone(kind: Any, run: Run, resources: Resources) -> None:
    """Asserts that rows and adapters of a study's run are those that its settings alone make."""
    inputs = kind.open_inputs(run.config, None)
    mesh = make_mesh(run.config.mesh, jax.devices()[:1])
    folder: Any = SimpleNamespace(folder=Path(), resumes=False)
    job = build_placed(inputs, run.config, mesh, folder)
    data = resources.subject(run.config).data(run.config)
    with (
        contextlib.closing(job.data.batches()) as theirs,
        contextlib.closing(data.batches()) as ours,
    ):
        for _ in range(2):
            jax.tree.map(np.testing.assert_array_equal, next(ours), next(theirs))
    starts = resources.start(run, data).lora, job.assembly.state.lora
    jax.tree.map(np.testing.assert_array_equal, *starts)


@pytest.fixture
def quick(study: Path, monkeypatch: pytest.MonkeyPatch) -> Protocol:
    """A study whose runs take no time because nothing is trained."""

    def perform_all(runs: Sequence[Run], *_: Any) -> list[StudyRecord]:
        time.sleep(0.01)
        return [record_of(run, abs(math.log(run.rate / 1.5e-2)) + 1e-3 * run.seed) for run in runs]

    monkeypatch.setattr(execution, "perform_all", perform_all)
    monkeypatch.setattr(execution, "_WAIT_SECONDS", 0.02)
    return read_protocol(study)


def record_of(run: Run, loss: float) -> StudyRecord:
    """A record without digests of base and rules."""
    measured = {"validation": {"loss": loss}, "test": {"loss": loss}, "curve": [], "training": []}
    described = {"rate": run.rate, "multiple": run.multiple, "seed": run.seed, "diverged": False}
    inputs = {"items": {"validation": "v", "test": "t"}, "data": f"data:{run.seed}"}
    place = {
        "id": run.id,
        "stage": run.stage,
        **run.cell._asdict(),
        "protocol": run.protocol.digest,
    }
    return place | described | {"seconds": 36.0} | measured | inputs
