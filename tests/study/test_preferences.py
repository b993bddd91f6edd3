"""Studies of preference pairs, with methods on different numbers of devices."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from nalora_jax.__main__ import main
from nalora_jax.study.plan import wanted
from nalora_jax.study.protocol import read_protocol
from nalora_jax.study.records import Records
from nalora_jax.study.report import render_results
from nalora_jax.study.resources import Resources
from nalora_jax.train.kinds import preference
from tests.study.conftest import assert_starts_alone, write_study

PROTOCOL = """
question = "Does the adapter prefer z?"
models = [BASE]
baseline = "b_zero"
rates = [2e-2]
extend = 0
tuning_seeds = [0]
test_seeds = [1]
evaluate_every = 4

[run]
steps = 4
preference.loss = "dpo"
SETTINGS
[methods.b_zero]

[methods.b_zero_2]
about = "on two devices"
settings.mesh.data = 2
"""


def test_a_study_of_pairs_measures_starts_and_devices(base: Path, questions: Path, tmp_path: Path) -> None:
    pairs_study = write_study(tmp_path, base, questions, PROTOCOL)
    assert main(["study", "run", str(pairs_study), "--together", "4"]) == 0
    protocol = read_protocol(pairs_study)
    records = Records(pairs_study).read()
    by = {(r["stage"], r["method"]): r for r in records.values()}
    assert len(by) == 4
    for record in by.values():
        assert record["curve"][0] == {"step": 0, "loss": pytest.approx(math.log(2)), "accuracy": 0.0}
        assert abs(record["validation"]["loss"] - math.log(2)) > 1e-4
    for stage in ("tune", "test"):  # the same pairs on one and on two devices
        losses = {m: by[stage, m]["training"][-1]["loss"] for m in protocol.methods}
        assert losses["b_zero_2"] == pytest.approx(losses["b_zero"], rel=1e-5)
        assert len({by[stage, m]["data"] for m in protocol.methods}) == 1
    assert by["tune", "b_zero"]["data"] != by["test", "b_zero"]["data"]
    assert len({record["source"] for record in by.values()}) == 1
    assert by["test", "b_zero"]["test"]["n"] == 20
    text = render_results(protocol, records)
    assert "nats per pair" in text
    assert "1 - accuracy" in text
    tuned = next(run for run in wanted(protocol, records) if run.cell.method == "b_zero")
    assert_starts_alone(preference, tuned, Resources(protocol))
