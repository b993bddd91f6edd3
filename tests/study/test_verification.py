"""Finished runs that are repeated and compared with their records."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable
from typing import Any

import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.study.execution import run_study
from nalora_jax.study.planned_runs import Run
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import StudyRecord
from nalora_jax.study.verification import _compare, verify_records
from tests.study.test_plan import CELL, PROTOCOL

ROW = {"loss": 3.0, "misalignment": 0.25}
RECORD: StudyRecord = {
    **{"stage": "test", "diverged": False, "parameters": 320},
    **{"base": "b", "source": "s", "data": "d", "rules": {}},
    "items": {"validation": "v", "test": "t", "test choices": "c"},
    "validation": {"loss": 2.9, "n": 20},
    "test": {"loss": 2.8, "accuracy": 0.75, "n": 20},
    "curve": [{"step": 0, "loss": 3.5}, {"step": 4, "loss": 2.9}],
    "training": [{"step": 2, **ROW}, {"step": 4, **ROW}],
}
RUN = Run(PROTOCOL, "test", CELL, 1e-2, 5)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda r: r["validation"].update(loss=2.902), "validation loss"),
        (lambda r: r["test"].update(accuracy=0.65), "test accuracy"),
        (lambda r: r["training"][0].update(misalignment=0.9), r"training\[0\] misalignment"),
        (lambda r: r["training"].pop(), "training "),
        (lambda r: r.update(base="another"), "base another in the record"),
    ],
)
def test_every_recorded_measure_and_digest_is_compared(
    change: Callable[[StudyRecord], Any], place: str
) -> None:
    altered = copying.deepcopy(RECORD)
    _compare(RUN, RECORD, altered)
    change(altered)
    with pytest.raises(NaloraError, match=place):
        _compare(RUN, altered, RECORD)


def test_rounding_noise_and_one_item_that_changes_sides_are_not_reported_as_differences() -> None:
    record, repeated = copying.deepcopy(RECORD), copying.deepcopy(RECORD)
    repeated["test"] |= {"loss": 2.8005, "accuracy": 0.7}
    repeated["training"][0] |= {"misalignment": 0.2505, "a_metric_of_a_later_version": 1.0}
    _compare(RUN, record, repeated)
    del record["items"]["test choices"]  # as in records of an earlier version
    _compare(RUN, record, repeated)


def test_an_altered_record_is_found_by_its_digest_before_any_run_is_repeated(
    quick: Protocol,
) -> None:
    run_study(quick, limit=1)
    path = quick.folder / "records.jsonl"
    path.write_text(path.read_text().replace('"seconds": 36.0', '"seconds": 35.0'))
    with pytest.raises(NaloraError, match="expected the content that its digest was computed from"):
        verify_records(quick, count=0)
