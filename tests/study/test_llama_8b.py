"""The protocol of studies/llama_8b_commonsense, run with a small model for 20 steps."""

from __future__ import annotations

import math
import re
from pathlib import Path

import jax
import pytest

from nalora_jax.study import execution
from nalora_jax.study.plan import Cell, Run
from nalora_jax.study.protocol import Protocol, read_protocol
from nalora_jax.study.resources import Resources

STUDY = Path(__file__).parents[2] / "studies" / "llama_8b_commonsense"
SMALLER = {
    '"meta-llama/Llama-3.1-8B"': '"smollm2-135m-instruct"',
    "steps = 1000": "steps = 20",
    "batch_size = 16, accumulate = 2": "batch_size = 2",
    "max_length = 512": 'max_length = 128\ndata.too_long = "truncate"',
    "evaluate_every = 250": "evaluate_every = 20",
    'train = "train[:97%]"': 'train = "train[:1%]"',
    'validation = "train[97%:]"': 'validation = "train[99%:]"',
    "validation_items = 2000": "validation_items = 4",
    "test_items = 1000": "test_items = 4",
    "accuracy_items = 500": "accuracy_items = 1",
}


@pytest.fixture
def protocol(tmp_path: Path) -> Protocol:
    """The study's protocol with a smaller model, one probe, and fewer steps, tokens and items."""
    text = (STUDY / "protocol.toml").read_text().partition("[probes.piqa]")[0]
    for old, new in SMALLER.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "protocol.toml").write_text(re.sub(r"\nitems = \d+", "\nitems = 2", text))
    return read_protocol(tmp_path)


@pytest.mark.network
def test_two_rates_of_the_placebo_train_in_one_program(
    protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one_device)
    cell = Cell(protocol.models[0], "commonsense", "nalora_placebo")
    resources = Resources(protocol, together=2)
    rates = (1e-3, 2e-3)
    runs = [resources.placed(Run(protocol, "tune", cell, rate, 0)) for rate in rates]
    records = execution.perform_all(runs, resources, [tmp_path / f"{rate}.npz" for rate in rates])
    for record in records:
        losses = [row["loss"] for row in record["training"]]
        assert record["curve"][-1]["step"] == 20
        assert all(map(math.isfinite, [*losses, record["validation"]["loss"]]))
        assert record["curve"][-1]["loss"] < record["curve"][0]["loss"]
    assert records[0]["validation"]["loss"] != records[1]["validation"]["loss"]
    assert records[1]["compilations"] == records[0]["compilations"]  # one program for both
