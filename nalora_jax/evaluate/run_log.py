"""The run's log ``metrics.jsonl``, one JSON object per line: its format, reading and checks.

The key distinguishes the kinds of lines:

    {"run": {...config...}, "versions": {...}, "device": "...", "base": {...}}      the first line
    {"resumed": {"step": 50, "settings": {...config...}, "versions": {...}, ...}}   once per resume
    {"step": 10, "loss": 3.2, "learning_rate": 1e-3, "layers": {...}, ...}          a log step
    {"step": 15, ..., "target_tokens": 900}                      the step where a signal stopped it
    {"step": 50, "eval": {"accuracy": 0.5, "low": 0.45, "high": 0.55, ...}}         an evaluation
    {"step": 50, "final": true, "eval": {...}}                       of the exported adapter
    {"done": {"step": 100, "best_step": 50, "seconds": {"training": 90.0, ...}}}    the run's end

Means are weighted by target tokens. A log step includes the metrics of
`nalora_jax.assembly.state_metrics.StateMetrics`. A resumed run removes the line of the step where
it was stopped, and includes its numbers, which are stored in ``"resumed": {"begun": {...}}``,
in its next log step. ``"resumed": {"lost_after": 40}`` is the last step before lines that a
machine lost without copying them to a store.

The evaluations before training and of the exported adapter may contain ``"samples": [{"prompt",
"answer", "expected", "correct"}]``, the last two optional.

Every line ends with a digest of its content (`nalora_jax.common.digests`), which `read_metrics`
checks and removes.

Every value is a host number: the loop fetches from the device at log steps only. NaN and infinity
are written as null, since JSON does not have them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.common import buckets
from nalora_jax.common.digests import unseal
from nalora_jax.config import RunConfig, config_from_dict
from nalora_jax.data.tokenizer import read_json
from nalora_jax.errors import NaloraError

METRICS_FILE = "metrics.jsonl"
ROLLOUTS = "rollouts.jsonl"  # in a run with rewards: some groups of samples of the logged steps
ADAPTER = "adapter"  # subfolder of a run: the exported adapter
MODEL = "model"  # subfolder of a run with --tune: the exported model
_MAX_STEP = 2**53  # up to here a float holds every integer
_LARGEST = 1e300  # limit of numbers; JSON's integers may exceed a float
_MAX_DEPTH = 12  # nesting of a run's config
# Layers of all towers together. No model has more, and the report has a row and a curve for each.
_MAX_LAYERS = 2**9
_MAX_HISTOGRAMS = 2**4  # mechanisms of one run; the report draws each in 0.3 s
_MAX_EDGES = 2**10
# settings with settings
_GROUPS = {
    group.name for group in fields(RunConfig) if is_dataclass(group.default_factory)
}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Returns all lines of a log in order; an incomplete last line after a crash is ignored.

    Raises:
      NaloraError: the file is missing, a line before the last is not a JSON object, a line's
        content differs from its digest, or its fields have other types than a run writes.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise NaloraError(
            str(path),
            expected="the log of a run",
            found=error.strerror or error,
            remedy="give the folder that `nalora train --output` wrote",
        ) from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            # A last line without a newline is a truncated object, unless only its newline is
            # damaged.
            is_torn = (
                isinstance(error, json.JSONDecodeError) and error.msg != "Extra data"
            )
            if number == len(lines) and is_torn:
                break
            raise NaloraError(
                f"{path}: line {number}",
                expected="one JSON object",
                found=repr(line[:60].decode(errors="replace")),
                remedy="repair or delete that line",
            ) from error
        record = unseal(record, f"{path}: line {number}")
        check_record(record, f"{path}: line {number}")
        records.append(record)
    return records


def recorded_settings(folder: Path | str) -> dict[str, Any]:
    """Returns the settings that the run in ``folder`` was last started or resumed with, or {}.

    Args:
      folder: a path or a URL.

    Raises:
      NaloraError: the log cannot be read, or the settings have other types than a run writes.
    """
    path = buckets.local_file(f"{str(folder).rstrip('/')}/{METRICS_FILE}")
    if path is None:
        return {}
    settings: dict[str, Any] = {}
    where = ""
    for record in read_metrics(path):
        resumed = record.get("resumed", {}).get("settings")
        if resumed:
            settings = resumed
            where = f"{path}: resumed: settings"
        if record.get("run"):
            settings = record["run"]
            where = f"{path}: run"
    if settings:
        config_from_dict(settings, where)
    return settings


def read_evaluation(path: Path) -> dict[str, Any]:
    """Returns the evaluation in a separate file (before.json).

    Raises:
      NaloraError: the file cannot be read, is not an evaluation, or differs from its digest.
    """
    values = unseal(read_json(path), str(path))
    check_evaluation(values, str(path))
    return values


def acting_steps(first: int | None, steps: int) -> tuple[int, int] | None:
    """Returns in how many of the ``steps`` of an adapter mechanisms acted, and the steps.

    ``first`` is the first step in which they act; None or 0 without mechanisms, which gives None.
    """
    if not first:
        return None
    return max(steps - first + 1, 0), steps


def to_json(value: Any, digits: int = 9) -> Any:
    """Returns ``value`` as plain JSON types.

    Numpy scalars and arrays become numbers and nested lists; floats keep ``digits`` significant
    digits (nine are enough to tell any two float32 apart, 17 keep all); NaN and infinity become
    None.

    Example:
      >>> to_json({"loss": np.float32(0.1), "mask": np.array([1.0, np.nan])})
      {'loss': 0.100000001, 'mask': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): to_json(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item, digits) for item in value]
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(f"{value:.{digits}g}")
        return None
    if isinstance(value, Path):
        return str(value)
    return to_json(np.asarray(value).tolist(), digits)


def check_record(record: Mapping[str, Any], where: str) -> None:
    """Raises an error if a known field of a line has the wrong type; unknown fields are ignored.

    Args:
      record: one parsed line of metrics.jsonl.
      where: file and line, for the message.

    Raises:
      NaloraError: names the field.
    """
    if "run" not in record:  # in a study's records, "base" is a digest
        record = {name: value for name, value in record.items() if name != "base"}
    other: Check = _anything
    if "step" in record and "eval" not in record:  # a log step
        other = _NUMBER
    _fields(_LINE, other=other)(record, where)
    if "eval" in record and "step" not in record:
        raise NaloraError(
            f"{where}: eval",
            expected="the step of the evaluation",
            found="none",
        )


def check_evaluation(values: Any, where: str) -> None:
    """Raises an error if a metric of an evaluation is not a number or its samples are malformed."""
    _fields(_EVALUATION, other=_NUMBER, null=False)(values, where)
    names = values.get("classes") or []
    rows = values.get("confusion") or []
    place = f"{where}: confusion"
    expected = "a row of counts for each of the classes"
    if not isinstance(rows, list):
        raise _error(place, expected, rows)
    for row in rows:
        if not isinstance(row, list) or len(row) != len(names):
            raise _error(place, expected, rows)
    for count in itertools.chain(*rows):
        _COUNT(count, place)


# ---------------------------------------------------------------- types of fields

# raises an error about a value at a place; all but `_COUNT` accept null
Check = Callable[[Any, str], None]


def _error(
    where: str,
    expected: str,
    value: object,
) -> NaloraError:
    """Returns the error about a malformed value of a log, which it quotes."""
    return NaloraError(
        where,
        expected=expected,
        found=repr(value)[:100],
        remedy="the file was edited or damaged: restore that line, or delete it",
    )


def _that(
    expected: str,
    holds: Callable[[Any], bool],
    *,
    null: bool = True,
) -> Check:
    """Returns the check that ``holds`` is true of a value, or that it is null if ``null``."""

    def check(value: Any, where: str) -> None:
        if not (null and value is None) and not holds(value):
            raise _error(where, expected, value)

    return check


def _list_of(kind: type, expected: str) -> Check:
    """Returns the check that a value is a list with members of the type ``kind``, or null."""

    def holds(value: Any) -> bool:
        if not isinstance(value, list):
            return False
        return all(isinstance(member, kind) for member in value)

    return _that(expected, holds)


def _is_number(value: Any) -> bool:
    """Returns True for a boolean or a finite number within the range of a float."""
    return isinstance(value, int | float) and abs(value) < _LARGEST


def _is_count(value: Any) -> bool:
    """Returns True for a whole number from 0 to `_MAX_STEP`."""
    if not _is_number(value) or isinstance(value, bool):
        return False
    return 0 <= value <= _MAX_STEP and value == int(value)


def _anything(value: Any, where: str) -> None:
    """Accepts every value."""
    del value, where


_NUMBER = _that("a finite number, or null", _is_number)
_PRESENT = _that("a number", _is_number, null=False)
_COUNT = _that("a count, 0 or more", _is_count, null=False)
_OR_COUNT = _that("a count, 0 or more", _is_count)
_TEXT = _that("a text", lambda value: isinstance(value, str))


def _fields(
    checks: Mapping[str, Check],
    *,
    other: Check = _anything,
    needed: Sequence[str] = (),
    null: bool = True,
) -> Check:
    """Returns the check of a JSON object and of its fields.

    Args:
      checks: by the name of a field.
      other: of all other fields.
      needed: names of fields that are checked as null if they are missing.
      null: accept null instead of the object.
    """

    def check(value: Any, where: str) -> None:
        if value is None and null:
            return
        if not isinstance(value, Mapping):
            raise _error(where, "a JSON object", value)
        for name in {**dict.fromkeys(needed), **value}:
            checks.get(name, other)(value.get(name), f"{where}: {name}")

    return check


def _settings(value: Any, where: str) -> None:
    """Checks a run's settings and their nesting depth, without recursion."""
    depth = 0
    level = [value]
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise NaloraError(
                where, expected="a run's settings", found="objects nested too deeply"
            )
        inner: list[Any] = []
        for member in level:
            if isinstance(member, Mapping):
                inner += member.values()
            elif isinstance(member, list):
                inner += member
        level = inner
    checks = dict.fromkeys(_GROUPS, _fields({}, null=False))
    checks["steps"] = _COUNT
    _fields(checks, null=False)(value, where)


def _samples(value: Any, where: str) -> None:
    """Checks that every sample has a prompt, and that its turns are a list of objects."""
    expected = "a list of prompts with their answers"
    check_turns = _list_of(Mapping, "a list of roles with their texts")
    _list_of(Mapping, expected)(value, where)
    for sample in value or ():
        if "prompt" not in sample:
            raise _error(where, expected, value)
        check_turns(sample.get("turns") or [], f"{where}: turns")


def _towers(value: Any, where: str) -> None:
    """Checks the number of layers of each tower and their sum; the report shows all."""
    _fields({}, other=_COUNT)(value, where)
    if sum((value or {}).values()) > _MAX_LAYERS:
        raise _error(where, f"at most {_MAX_LAYERS} layers together", value)


def _rows(rows: Any, where: str) -> None:
    """Checks that ``rows`` has one number for each layer, or one row of numbers for each.

    All rows must have the same length.
    """
    if rows is None:
        return
    if not isinstance(rows, list) or not 0 < len(rows) <= _MAX_LAYERS:
        raise _error(
            where, f"a list with an entry for every layer, at most {_MAX_LAYERS}", rows
        )
    numbers: Iterable[Any] = rows
    nested = [row for row in rows if isinstance(row, list)]
    if nested:
        lengths = set(map(len, nested))
        if len(nested) < len(rows) or len(lengths) > 1:
            raise _error(where, "rows of one length", rows)
        numbers = itertools.chain(*nested)
    for value in numbers:
        _NUMBER(value, where)


def _histogram(value: Any, where: str) -> None:
    """Checks for increasing edges and one row of counts per layer, with one bin more than edges."""
    _fields({}, null=False)(value, where)
    edges = value.get("edges")
    counts = value.get("counts")
    if not isinstance(edges, list) or not 1 < len(edges) <= _MAX_EDGES:
        raise _error(f"{where}: edges", "a list of at least two numbers", edges)
    for edge in edges:
        _PRESENT(edge, f"{where}: edges")
    if any(low >= high for low, high in itertools.pairwise(edges)):
        raise _error(f"{where}: edges", "rising numbers", edges)
    bins = len(edges) + 1
    place = f"{where}: counts"
    expected = f"rows of {bins} counts, one a layer"
    if not isinstance(counts, list) or not counts:
        raise _error(place, expected, counts)
    for row in counts:
        if not isinstance(row, list) or len(row) != bins:
            raise _error(place, expected, counts)
    for count in itertools.chain(*counts):
        _COUNT(count, place)


def _histograms(value: Any, where: str) -> None:
    """Checks the histograms by mechanism, and their number."""
    _fields({}, other=_histogram)(value, where)
    if len(value or ()) > _MAX_HISTOGRAMS:
        raise _error(where, f"at most {_MAX_HISTOGRAMS} mechanisms", list(value))


_NUMBERS = _fields({}, other=_NUMBER)
_LAYERS = _fields({}, other=_rows)
_TESTED = ("low", "high", "gained", "lost", "p_value")
_EVALUATION: Mapping[str, Check] = {
    "n": _OR_COUNT,
    "paired": _fields(dict.fromkeys(_TESTED, _PRESENT), other=_NUMBER, needed=_TESTED),
    "samples": _samples,
    "right": _list_of(bool, "a list of true and false"),
    "classes": _list_of(str, "a list of texts"),
    "confusion": _anything,  # checked with the classes
    "questions": _anything,
}
_LINE: Mapping[str, Check] = {
    "run": _settings,
    "mechanisms_from": _OR_COUNT,
    "runs_in_program": _OR_COUNT,
    "versions": _fields({}),
    "base": _fields({}, other=_TEXT),
    "resumed": _fields(
        {
            "step": _COUNT,
            "begun": _NUMBERS,
            "runs_in_program": _OR_COUNT,
            "lost_after": _OR_COUNT,
        },
        needed=("step",),
        null=False,
    ),
    "done": _fields(
        {
            "step": _OR_COUNT,
            "best_step": _OR_COUNT,
            "seconds": _NUMBERS,
        },
        null=False,
    ),
    "step": _COUNT,
    "eval": check_evaluation,
    "towers": _towers,
    "layers": _LAYERS,
    "adapters": _LAYERS,
    "ranks": _LAYERS,
    "histograms": _histograms,
}
