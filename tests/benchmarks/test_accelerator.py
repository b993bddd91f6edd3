"""The benchmarks' ratios and records, and the command for owners of GPUs and TPUs, on a CPU with a
tiny model."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script, imported as one beside it does; its modules are forgotten after the tests."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("accelerator")
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.mark.skipif(find_spec("peft") is None, reason="PEFT trains the same model")
@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning"
)  # PEFT and transformers
def test_a_cpu_measures_and_reports_and_says_what_it_cannot_tell(
    script, monkeypatch, capsys, tmp_path
):
    """Its measured processes are calls."""
    words = "benchmarks/accelerator.py --tiny --steps 2 --seq 16 --dtype float32 --report"
    monkeypatch.setattr(sys, "argv", words.split())
    monkeypatch.setattr(script.common, "OWN", tmp_path / "own")
    run = lambda command: json.loads(json.dumps(script.one(script.parse(command[2:]))))  # noqa: E731
    monkeypatch.setattr(script.common, "run_process", run)
    script.main()
    (file,) = (tmp_path / "own").glob("*/accelerator.json")
    (measured,) = json.loads(file.read_text())["cases"].values()
    assert set(measured["runs"]) == {"nalora_jax", "nalora_jax, plain LoRA", "PEFT"}
    for (run,) in measured["runs"].values():
        # Random tokens of 512: both libraries start near the logarithm of that.
        assert run["losses"][0] == pytest.approx(np.log(512), rel=0.1)
        assert len(run["tokens_per_second"]) == 2
        assert run["memory_gb"] > 0
    shown = capsys.readouterr().out.split("Paste this into a new issue:\n\n")[1]
    assert shown.startswith("### Hardware report: 8 x cpu (cpu)\n")
    assert f"- command: python {words}\n" in shown
    assert f"jax {version('jax')}" in shown
    assert "MFU was not compared: a CPU's peak is not known." in shown
    assert str(tmp_path) not in shown


def test_the_ratio_is_paired_and_its_interval_covers_it(script):
    drift = np.linspace(1, 5, 50)  # a machine that slows down does not change a paired ratio
    noise = 1 + 0.01 * np.random.default_rng(0).normal(size=50)
    found = script.common.ratio(1.2 * drift * noise, drift)
    assert found["pairs"] == 50
    assert found["low"] <= found["median"] <= found["high"] < found["low"] + 0.02
    assert found["median"] == pytest.approx(1.2, abs=0.01)


def test_results_name_their_machine_and_command_and_other_cases_stay(script, tmp_path, monkeypatch):
    common = script.common
    monkeypatch.setattr(
        sys, "argv", ["/somewhere/part.py", "--model", "/home/me/model", "--steps", "3"]
    )
    common.save("part", "one", {"value": common.summary([3.0, 1.0, 2.0])}, folder=tmp_path)
    common.save("part", "two", {"value": 2, "path": "/home/me/model"}, folder=tmp_path)
    cases = common.load("part", tmp_path)["cases"]
    assert list(cases) == ["one", "two"]
    assert cases["one"]["value"] == {"min": 1.0, "median": 2.0, "max": 3.0, "n": 3}
    assert set(cases["one"]["machine"]) >= {"cpu", "cores", "flags", "versions", "python"}
    assert cases["one"]["command"] == "python benchmarks/part.py --model .../model --steps 3"
    assert "/home" not in (tmp_path / "part.json").read_text()
