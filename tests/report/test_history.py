"""A log as arrays."""

from __future__ import annotations

import numpy as np
import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.report.history import history_of, read_history

RECORDS = [
    {"run": {"steps": 30}, "versions": {}, "device": "cpu"},
    {"step": 0, "eval": {"accuracy": 0.4, "low": 0.3, "high": 0.5, "loss": 5.0, "n": 100}},
    {"step": 10, "loss": 2.0, "seconds": 4.0, "layers": {"limit": [0.1, None], "feature": None}},
    {"step": 20, "loss": None, "seconds": 3.0},
    {"resumed": {"step": 20}},
    {"step": 30, "seconds": 5.0, "layers": {"limit": [0.3, 0.4], "occupancy": [[1, 0, 0, 0]] * 2}},
    {"step": 30, "eval": {"accuracy": 0.6, "loss": 3.0}},
    {"step": 10, "final": True, "eval": {"accuracy": 0.7, "loss": 2.5}},
    {"done": {"step": 30, "best_step": 10}},
]


def test_columns_leave_out_missing_numbers_and_turn_null_into_nan():
    history = history_of(RECORDS)
    steps, loss = history.column("loss")
    np.testing.assert_array_equal(steps, [10, 20])
    np.testing.assert_array_equal(loss, [2.0, np.nan])
    steps, limit = history.layers("limit")
    np.testing.assert_array_equal(steps, [10, 30])
    np.testing.assert_array_equal(limit, [[0.1, np.nan], [0.3, 0.4]])
    assert history.layers("occupancy")[1].shape == (1, 2, 4)
    assert history.layers("feature")[1].size == 0
    assert history.total("seconds") == 12.0


def test_a_log_without_a_run_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"something": 1}\n')
    with pytest.raises(NaloraError, match="expected the lines of a run, found none"):
        read_history(tmp_path)


@pytest.mark.parametrize(
    ("initial", "along", "final", "ends"),
    [
        (0, [0, 5, 10], 5, ["initial", "final"]),  # both on the reported examples
        # a run that has just begun
        (0, [0, 5, 10], None, [0, 10]),  # not finished: the examples that select the checkpoint
        (None, [0, 5], 5, [0, "final"]),  # a log without the base's evaluation
        (None, [], 5, ["final"]),
        (None, [], None, []),
    ],
)
def test_the_ends_of_a_run_are_its_reported_evaluations_or_the_first_and_last(initial, along, final, ends):
    def at(step, **kind):
        return {"step": step, **kind, "eval": {"loss": float(step)}}

    records = [at(step) for step in along]
    records += [at(0, initial=True)] if initial == 0 else []
    records += [at(final, final=True)] if final else []
    kinds = [next((k for k in ("initial", "final") if k in r), r["step"]) for r in history_of(records).ends]
    assert kinds == ends
