"""Verification of a study: repeats finished runs and compares them with their records."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nalora_jax.errors import NaloraError
from nalora_jax.mesh.machine import describe_device
from nalora_jax.study.execution import perform_all
from nalora_jax.study.planned_runs import Run, list_runs
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.provenance import checked_records, describe_old
from nalora_jax.study.records import Records, StudyRecord, exact_values
from nalora_jax.study.resources import Resources

# Nats per token. The same program on the same kind of machine gives the same bits. Within a few
# hundred steps, another summation order gives a smaller difference than this, another computation
# a larger one.
TOLERANCE = 1e-3
_MEASURED = (
    "validation",
    "test",
    "probes",
    "curve",
    "training",
    "diverged",
    "parameters",
)
_DIGESTS = ("rules", "adapter", "base", "source", "data", "items")
# Tolerance of other numbers of a log step, as a share of their value.
_LOGGED_SHARE = 0.02


def verify_records(
    protocol: Protocol, *, count: int = 3, seed: int | None = None
) -> str:
    """Checks all records, repeats ``count`` finished runs, and compares every recorded measure.

    The repeated runs are drawn from runs recorded on this kind of machine, if there are any:
    another kind has another summation order, which becomes a measurable difference over hundreds of
    steps although the code is the same.

    Args:
      protocol: the study.
      count: maximum number of runs.
      seed: seed of the draw; by default a new draw every time.

    Returns:
      A line per run and item set with both losses, and notes on unchecked fields.

    Raises:
      NaloraError: there is no record, records or protocol were changed (`checked_records`), or a
        repeated run differs from its record.
    """
    store = Records(protocol.folder)
    resources = Resources(protocol)
    records = checked_records(protocol, store)
    finished = [run for run in list_runs(protocol, records) if run.id in records]
    if not finished:
        raise NaloraError(
            str(protocol.folder), expected="at least one finished run", found="none"
        )
    here = describe_device()
    ours = [run for run in finished if records[run.id]["device"] == here]
    if not ours:
        ours = finished
    lines = []
    for run in random.Random(seed).sample(ours, min(count, len(ours))):
        with tempfile.TemporaryDirectory() as folder:
            (performed,) = perform_all(
                [run], resources, [Path(folder) / "snapshot.npz"]
            )
        record = records[run.id]
        repeated = exact_values(performed)
        _compare(run, record, repeated)
        for name in ("validation", "test"):
            if name in record:
                then = record[name]["loss"]
                now = repeated[name]["loss"]
                lines.append(f"{run}: {name} loss {then} in the record, {now} now")
    if len(ours) < len(finished):
        lines.append(
            f"drawn from the {len(ours)} of {len(finished)} runs that were recorded on {here}"
        )
    if note := describe_old(records):
        lines.append(note)
    return "\n".join(lines)


def _compare(run: Run, record: StudyRecord, repeated: StudyRecord) -> None:
    """Raises a NaloraError if the repeated run has other digests or measures than its record."""
    differences: list[str] = []
    for name in _DIGESTS:
        if name in record:  # records of earlier versions have fewer digests
            recorded = record[name]
            now = repeated[name]
            if name == "items":
                now = {item: now.get(item) for item in recorded}
            differences += _differences(recorded, now, name)
    size = record["validation"].get("n", 0)
    for name in _MEASURED:
        differences += _differences(record.get(name), repeated.get(name), name, size)
    if differences:
        raise NaloraError(
            f"{run}: {'; '.join(differences[:5])}",
            expected=f"the record's digests, and its losses within {TOLERANCE:g}",
            found=f"{len(differences)} differences",
            remedy=_explained(record, repeated),
        )


def _explained(record: StudyRecord, repeated: StudyRecord) -> str:
    """Returns the remedy for a run that differs from its record.

    It names what else differs (code, versions or device), and how to repeat the run exactly.
    """
    others = [
        name
        for name in ("code", "versions", "device")
        if record.get(name) != repeated.get(name)
    ]
    if not others:
        return "code, versions and device are the record's: the record or its data were changed"
    commit = str(record.get("commit") or "")[:12] or "of an unknown commit"
    cause = f"{' and '.join(others)} differ from the record's"
    return (
        f"{cause}, so sums may be rounded in another order; "
        f"repeat it with the code {commit} on the same kind of machine"
    )


def _differences(
    record: Any, repeated: Any, place: str, size: int = 0
) -> Iterator[str]:
    """Yields a description of every value that differs.

    Args:
      record: a value of the record.
      repeated: the value of the repeated run.
      place: path of the value.
      size: number of items that it was measured on, if known.
    """
    if isinstance(record, Mapping) and isinstance(repeated, Mapping):
        count = record.get("n", size)
        names = set(record)
        if not place.startswith("training"):  # a newer version may log more metrics
            names |= repeated.keys()
        for name in sorted(names):
            at = f"{place} {name}".strip()
            yield from _differences(record.get(name), repeated.get(name), at, count)
    elif (
        isinstance(record, list)
        and isinstance(repeated, list)
        and len(record) == len(repeated)
    ):
        for index, value in enumerate(record):
            at = f"{place}[{index}]"
            yield from _differences(value, repeated[index], at, size)
    elif not _agree(record, repeated, place, size):
        yield f"{place} {record} in the record, {repeated} now"


def _agree(record: Any, repeated: Any, place: str, size: int) -> bool:
    """Returns True if two values are equal within the tolerance of their place.

    Losses may differ by `TOLERANCE`, other numbers of a log step by 2%, and rates of right answers
    by one of ``size`` items. Values other than numbers must be equal.
    """
    if not isinstance(record, float) or not isinstance(repeated, int | float):
        return bool(record == repeated)
    if place.startswith("training") and not place.endswith(" loss"):
        tolerance = max(TOLERANCE, _LOGGED_SHARE * abs(record))
    elif any(name in place for name in ("accuracy", "recall", "reward", "pass_")):
        tolerance = 0.0
        if size:
            tolerance = 1.5 / size  # one item may change sides
    else:
        tolerance = TOLERANCE
    return abs(record - repeated) <= tolerance
