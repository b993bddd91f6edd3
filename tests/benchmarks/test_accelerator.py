"""The command for owners of GPUs and TPUs, on a CPU: every library trains a tiny model."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="PEFT trains the same model")


@pytest.fixture
def accelerator(monkeypatch, tmp_path, script):
    """The script, whose measured processes are calls, and whose figures go elsewhere."""
    module = script("accelerator")
    monkeypatch.setattr(module.common, "OWN", tmp_path / "own")

    def run(command: list[str]) -> Any:
        return json.loads(json.dumps(module.one(module.parse(command[2:]))))

    monkeypatch.setattr(module.common, "run_process", run)
    return module


def call(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["benchmarks/accelerator.py", *arguments])
    shutil.rmtree(module.common.OWN, ignore_errors=True)
    module.main()
    (file,) = module.common.OWN.glob("*/accelerator.json")
    (found,) = json.loads(file.read_text())["cases"].values()
    return found


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning"
)  # between PEFT and transformers
def test_it_runs_on_a_cpu_and_says_what_that_cannot_tell(accelerator, monkeypatch, capsys):
    found = call(accelerator, monkeypatch, "--tiny", "--steps", "1", "--seq", "16", "--dtype", "float32")
    assert set(found["runs"]) == {"nalora_jax", "nalora_jax, plain LoRA", "PEFT"}
    for (run,) in found["runs"].values():
        assert np.all(np.isfinite(run["losses"]))
        # Random tokens of 512: both libraries start near the logarithm of that.
        assert run["losses"][0] == pytest.approx(np.log(512), rel=0.1)
        assert len(run["tokens_per_second"]) == 1
        assert run["memory_gb"] > 0
    assert set(found["not_compared"]) == {"MFU"}
    shown = capsys.readouterr().out
    assert "MFU was not compared: a CPU's peak is not known." in shown


RUN = {"seconds": [1.0], "tokens_per_second": [5.0], "memory_gb": 1.0, "memory_of": "a chip", "mfu": 0.5}


def test_the_report_has_hardware_versions_and_figures_and_no_paths(
    accelerator, monkeypatch, capsys, tmp_path
):
    run = RUN | {"losses": [6.2, 6.1], "versions": {"jax": "0.10.2", "libtpu": "0.0.42"}}
    tpu = {"platform": "tpu", "kind": "TPU v5 lite", "chips": 8}
    monkeypatch.setattr(accelerator, "describe", lambda: tpu)
    monkeypatch.setattr(
        accelerator, "train_ours", lambda *_: {**run, "mesh": {"data": 8, "fsdp": 1, "tensor": 1}}
    )
    call(accelerator, monkeypatch, "--report")
    shown = capsys.readouterr().out.split("Paste this into a new issue:\n\n")[1]
    assert shown.startswith("### Hardware report: 8 x TPU v5 lite (tpu)\n")
    assert "- command: python benchmarks/accelerator.py --report\n" in shown
    assert "- versions: jax 0.10.2, libtpu 0.0.42\n" in shown
    assert "- losses: 6.2000 to 6.1000 in 2 steps\n" in shown
    assert "| nalora_jax | 8 x 1 x 1 | 5 | 50% | 1.0 (a chip) |" in shown
    assert "PEFT was not compared: it is for GPUs." in shown
    assert str(tmp_path) not in shown
