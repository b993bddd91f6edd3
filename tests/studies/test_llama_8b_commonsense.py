"""The protocol for Llama-3.1-8B, performed with SmolLM2-135M: 20 steps of short rows of its smallest tasks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from nalora_jax.study.analysis import comparisons, results
from nalora_jax.study.execution import run_study
from nalora_jax.study.protocol import Protocol, read_protocol
from nalora_jax.study.records import Record, Records
from nalora_jax.study.report import render

pytestmark = [pytest.mark.network, pytest.mark.optimised]

STUDY = Path(__file__).parents[2] / "studies" / "llama_8b_commonsense"
TASKS = ("arc_easy", "arc_challenge")  # those with the fewest records
METHODS = ("lora", "nalora", "nalora_placebo")  # the question's; each takes 10 seconds


def shortened(protocol: Protocol, folder: Path) -> Protocol:
    """The same methods and measures on a small base, with one rate and one seed of each stage."""
    run = protocol.run | {
        "steps": 20,
        "train": {"batch_size": 2, "log_every": 10},
        "data": {"max_length": 48},
        "mesh": {"data": 1},
    }
    (task,) = protocol.tasks.values()
    task = replace(task, dataset=",".join(TASKS), validation_items=4, test_items=4, accuracy_items=2)
    probes = {"arc_easy": replace(protocol.probes["arc_easy"], items=4)}
    return replace(
        protocol,
        **{"models": ("smollm2-135m-instruct",), "rates": (2e-3,), "extend": 0, "evaluate_every": 20},
        **{"tuning_seeds": (0,), "test_seeds": (2,), "run": run, "tasks": {"commonsense": task}},
        **{"probes": probes, "path": folder / "protocol.toml"},
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


def test_methods_differ(tested: dict[str, Record]) -> None:
    losses = [record["test"]["loss"] for record in tested.values()]
    assert len(set(losses)) == len(losses)
    assert len({record["parameters"] for record in tested.values()}) == 1


def test_probes_measure_other_items_before_and_after(tested: dict[str, Record]) -> None:
    probes = [record["probes"]["arc_easy"] for record in tested.values()]
    assert len({probe["before"] for probe in probes}) == 1
    assert all(math.isfinite(probe["loss"]) and probe["loss"] != probe["before"] for probe in probes)


def test_the_report_compares_with_lora_and_with_the_placebo(protocol: Protocol) -> None:
    records = Records(protocol.folder).read()
    primary = [c for c in comparisons(protocol, results(protocol, records)) if c.measure.kind == "primary"]
    others = [("nalora", "lora"), ("nalora_placebo", "lora"), ("nalora", "nalora_placebo")]
    assert [(c.cell.method, c.other) for c in primary] == others
    assert "## Paired differences" in render(protocol, records)
