"""A start that was kept is the one that a continuation has."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.common import trees
from nalora_jax.config import ComputeConfig, LoRAConfig, LoRARule, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.train import start
from nalora_jax.train.output import START, Output
from nalora_jax.train.program import Assembly, assemble
from tests import tiny
from tests.param_trees import init_params

BASE = ModelConfig.from_hf(tiny.HF)

LOADED: Any = SimpleNamespace(config=BASE)


@pytest.fixture(scope="module")
def assembly() -> Assembly:
    config = RunConfig(
        lora=LoRAConfig(rules=(LoRARule("gate_proj", 2),), init="lora_ga"),
        compute=ComputeConfig(dtype="float32"),
    )
    return assemble(config, BASE, init_params(BASE, jax.random.key(0)), tiny.one_device())


@pytest.fixture
def begun(assembly: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Assembly:
    """As a run begins; its gradient can be taken once."""
    rng = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), assembly.state.lora
    )
    found = iter([lora])
    monkeypatch.setattr(start, "first_adapters", lambda *_: next(found))
    rows: Any = None
    return start.with_start(assembly, LOADED, rows, Output(tmp_path, resumes=False))


def continued(assembly: Assembly, folder: Path) -> Assembly:
    rows: Any = None
    return start.with_start(assembly, LOADED, rows, Output(folder, resumes=True))


def test_a_continuation_has_the_start_to_the_bit(
    assembly: Assembly, begun: Assembly, tmp_path: Path
) -> None:
    again = continued(assembly, tmp_path)
    assert not np.array_equal(
        *(trees.flatten(one.params)["layers/ffn/gate_proj/kernel"] for one in (assembly, begun))
    )
    for ours, theirs in ((again.params, begun.params), (again.initial, begun.initial)):
        first, second = trees.flatten(ours), trees.flatten(theirs)
        assert first.keys() == second.keys()
        for path, leaf in first.items():
            np.testing.assert_array_equal(leaf, second[path], err_msg=path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [START]  # no scratch files


def test_a_plain_gradient_start_is_in_the_checkpoint(assembly: Assembly, tmp_path: Path) -> None:
    plain = replace(assembly, config=replace(assembly.config, lora=LoRAConfig(init="gradient")))
    assert continued(plain, tmp_path) is plain


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize(
    ("found", "harm"),
    [
        ("No such file", lambda folder: shutil.rmtree(folder)),
        ("not what was written", lambda folder: (folder / "adapter.safetensors").write_bytes(b"other")),
        ("is missing", lambda folder: (folder / "adapter.safetensors").unlink()),
    ],
)
def test_a_start_that_is_not_there_or_damaged_is_refused(
    assembly: Assembly, tmp_path: Path, found: str, harm: Any
) -> None:
    harm(tmp_path / START)
    with pytest.raises(NaloraError, match=f"the adapters that the run started from.*{found}"):
        continued(assembly, tmp_path)
