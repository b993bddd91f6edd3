"""The protocol for Llama-3.1-8B, performed with a tiny Llama: 20 steps of questions that it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nalora_jax.study.analysis import comparisons, results
from nalora_jax.study.execution import run_study
from nalora_jax.study.protocol import Protocol, read_protocol
from nalora_jax.study.records import Record, Records
from nalora_jax.study.report import render
from tests import tiny

STUDY = Path(__file__).parents[2] / "studies" / "llama_8b_commonsense"
METHODS = ("lora", "nalora", "nalora_placebo")  # the question's
HF = tiny.GROUPED | {"vocab_size": len(tiny.WORDS), "hidden_size": 64, "intermediate_size": 96}


def shortened(protocol: Protocol, folder: Path) -> Protocol:
    """The same methods and measures on a tiny base, with one rate and one seed of each stage."""
    model, questions = tiny.make_model(folder / "model", HF), tiny.make_questions(folder / "z.jsonl", 100)
    run = protocol.run | {
        "steps": 20,
        "train": {"batch_size": 8, "log_every": 10},
        "data": {"max_length": 16},
        "mesh": {"data": 1},
    }
    (task,) = protocol.tasks.values()
    splits = {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"}
    items = {"validation_items": 4, "test_items": 4, "accuracy_items": 2}
    task = replace(task, dataset=str(questions), **splits, **items)
    probe = replace(protocol.probes["arc_easy"], dataset=str(questions), split="train[70%:80%]", items=4)
    return replace(
        protocol,
        **{"models": (str(model),), "rates": (1e-2,), "extend": 0, "evaluate_every": 20},
        **{"tuning_seeds": (0,), "test_seeds": (2,), "run": run, "tasks": {"commonsense": task}},
        **{"probes": {"arc_easy": probe}, "path": folder / "protocol.toml"},
    )


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    protocol = shortened(read_protocol(STUDY), tmp_path_factory.mktemp("study"))
    assert run_study(protocol, methods=METHODS) == 2 * len(METHODS)
    return protocol


@pytest.fixture(scope="module")
def tested(protocol: Protocol) -> dict[str, Record]:
    """The record of each method's test."""
    records = Records(protocol.folder).read().values()
    return {record["method"]: record for record in records if record["stage"] == "test"}


def test_all_methods_learn_from_the_same_rows(tested: dict[str, Record]) -> None:
    assert tuple(tested) == METHODS
    assert len({record["data"] for record in tested.values()}) == 1
    for record in tested.values():
        before, after = record["curve"][0]["loss"], record["validation"]["loss"]
        assert after < before - 0.5
        assert 0 <= record["test"]["accuracy"] <= 1


def test_the_report_compares_with_lora_and_with_the_placebo(protocol: Protocol) -> None:
    records = Records(protocol.folder).read()
    primary = [c for c in comparisons(protocol, results(protocol, records)) if c.measure.kind == "primary"]
    others = [("nalora", "lora"), ("nalora_placebo", "lora"), ("nalora", "nalora_placebo")]
    assert [(c.cell.method, c.other) for c in primary] == others
    assert "## Paired differences" in render(protocol, records)
