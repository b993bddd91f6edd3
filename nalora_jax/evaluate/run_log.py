"""The run's log ``metrics.jsonl``, one JSON object per line, as all its readers get it.

The key distinguishes the kinds of lines:

    {"run": {...config...}, "versions": {...}, "device": "...", "base": {...}}      the first line
    {"resumed": {"step": 50, "settings": {...config...}, "versions": {...}, ...}}   once per resume
    {"step": 10, "loss": 3.2, "learning_rate": 1e-3, "layers": {...}, ...}          a log step, with `StateMetrics`
    {"step": 15, ..., "target_tokens": 900}    beyond the log steps, where a signal stopped the run
    {"step": 50, "eval": {"accuracy": 0.5, "low": 0.45, "high": 0.55, ...}}         an evaluation
    {"step": 50, "final": true, "eval": {...}}                                      exported adapter
    {"done": {"step": 100, "best_step": 50, "seconds": {"training": 90.0, ...}}}    the run's end

Means are weighted by target tokens. The resumed run takes the line of the step where it was stopped
into the mean of its next log step: it removes the line, whose numbers stay in ``"resumed": {"begun":
{...}}``.

The evaluations before training and of the exported adapter may contain ``"samples": [{"prompt",
"answer", "expected", "correct"}]``, the last two optional.

Every line ends with a digest of its content (`nalora_jax.common.digests`), which `read_metrics` checks and
removes.

Every value is a host number: the loop fetches from the device at log steps only. NaN and infinity
are written as null, since JSON does not have them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.common import buckets
from nalora_jax.common.digests import unseal
from nalora_jax.config import RunConfig, config_from_dict
from nalora_jax.data.tokenizer import read_json
from nalora_jax.errors import NaloraError

FILE = "metrics.jsonl"
ROLLOUTS = "rollouts.jsonl"  # in a run with rewards: some samples of the logged steps
ADAPTER = "adapter"  # subfolder of a run: the exported adapter
_MAX_STEP = 2**53
_MAX_DEPTH = 12  # nesting of a run's config
# Layers of all towers together. No model has more, and the report has a row and a curve for each.
_MAX_LAYERS = 2**9
_MAX_HISTOGRAMS = 2**4  # mechanisms of one run; the report draws each in 0.3 s
_MAX_EDGES = 2**10
_GROUPS = {
    group.name for group in fields(RunConfig) if is_dataclass(group.default_factory)
}  # settings with settings
_NESTED = ("layers", "towers", "adapters", "ranks", "histograms")  # non-numbers of a log step
# Values of an evaluation that are not numbers.
_OTHERS = ("samples", "right", "paired", "questions", "classes", "confusion")


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
            if number == len(lines) and _is_torn(error):
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


def _is_torn(error: Exception) -> bool:
    """Returns True if a line without a newline is a truncated object.

    It is False for an object whose newline is damaged.
    """
    return isinstance(error, json.JSONDecodeError) and error.msg != "Extra data"


def recorded_settings(folder: Path | str) -> dict[str, Any]:
    """Returns the settings that the run in ``folder`` was last started or resumed with, or {}.

    Args:
      folder: a path or a URL.

    Raises:
      NaloraError: the log cannot be read, or the settings have other types than a run writes.
    """
    path = buckets.local_file(f"{str(folder).rstrip('/')}/{FILE}")
    if path is None:
        return {}
    settings: dict[str, Any] = {}
    where = ""
    for record in read_metrics(path):
        resumed = record.get("resumed", {}).get("settings")
        for name, newest in (("resumed: settings", resumed), ("run", record.get("run"))):
            if newest:
                settings, where = newest, f"{path}: {name}"
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


def to_json(value: Any, digits: int = 9) -> Any:
    """Returns ``value`` as plain JSON types.

    Numpy scalars and arrays become numbers and nested lists; floats keep ``digits`` significant digits
    (nine are enough to tell any two float32 apart, 17 keep all); NaN and infinity become None.

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
    if "run" in record:
        _check_header(record, where)
    if "resumed" in record:
        resumed = _mapping(record, "resumed", where)
        _check_step(resumed.get("step"), f"{where}: resumed: step")
        if resumed.get("begun") is not None:
            _check_numbers(_mapping(resumed, "begun", f"{where}: resumed"), f"{where}: resumed: begun")
    if "done" in record:
        done = _mapping(record, "done", where)
        for name in ("step", "best_step"):
            if done.get(name) is not None:
                _check_step(done[name], f"{where}: done: {name}")
        if done.get("seconds") is not None:
            _check_numbers(_mapping(done, "seconds", f"{where}: done"), f"{where}: done: seconds")
    if "step" in record:
        _check_step(record["step"], f"{where}: step")
    if "eval" in record:
        check_evaluation(_mapping(record, "eval", where), f"{where}: eval")
        if "step" not in record:
            raise NaloraError(
                f"{where}: eval", expected="the step of the evaluation beside it", found="none"
            )
    elif "step" in record:
        _check_numbers({name: value for name, value in record.items() if name not in _NESTED}, where)
        if record.get("towers") is not None:
            _check_towers(_mapping(record, "towers", where), f"{where}: towers")
        for group in ("layers", "adapters", "ranks"):
            if record.get(group) is not None:
                _check_layers(_mapping(record, group, where), f"{where}: {group}")
        if record.get("histograms") is not None:
            _check_histograms(_mapping(record, "histograms", where), f"{where}: histograms")


def check_evaluation(values: Mapping[str, Any], where: str) -> None:
    """Raises an error if a metric of an evaluation is not a number or its samples are malformed."""
    numbers = {name: value for name, value in values.items() if name not in _OTHERS}
    _check_numbers(numbers, where)
    if values.get("n") is not None:
        _check_step(values["n"], f"{where}: n")
    if values.get("paired") is not None:
        paired = _mapping(values, "paired", where)
        _check_numbers(paired, f"{where}: paired", needed=("low", "high", "gained", "lost", "p_value"))
    samples = values.get("samples") or []
    texts = isinstance(samples, list) and all(
        isinstance(sample, Mapping) and "prompt" in sample for sample in samples
    )
    if not texts:
        raise _error(f"{where}: samples", "a list of prompts with their answers", samples)
    for sample in samples:
        turns = sample.get("turns") or []
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise _error(f"{where}: samples: turns", "a list of roles with their texts", turns)
    names, rows = values.get("classes") or [], values.get("confusion") or []
    square = (
        isinstance(names, list) and isinstance(rows, list) and all(isinstance(name, str) for name in names)
    )
    if not square or not all(isinstance(row, list) and len(row) == len(names) for row in rows):
        raise _error(
            f"{where}: confusion", "a row of counts for each of the classes, which are texts", rows
        )
    for row in rows:
        for count in row:
            _check_step(count, f"{where}: confusion")
    right = values.get("right") or []
    if not isinstance(right, list) or not all(isinstance(sample, bool) for sample in right):
        raise _error(f"{where}: right", "a list of true and false", right)


def _check_header(record: Mapping[str, Any], where: str) -> None:
    run = _mapping(record, "run", where)
    if _depth(run) > _MAX_DEPTH:
        raise NaloraError(f"{where}: run", expected="a run's settings", found="objects nested too deeply")
    for name in _GROUPS & run.keys():
        _mapping(run, name, f"{where}: run")
    if "steps" in run:
        _check_step(run["steps"], f"{where}: run: steps")
    if record.get("mechanisms_from") is not None:
        _check_step(record["mechanisms_from"], f"{where}: mechanisms_from")
    for name in ("versions", "base"):
        if record.get(name) is not None:
            _mapping(record, name, where)
    base = record.get("base") or {}
    if not all(isinstance(value, str) for value in base.values()):
        raise _error(f"{where}: base", "texts", base)


def _depth(value: Any) -> int:
    """Returns the nesting depth of objects and lists, without recursion."""
    depth, level = 0, [value]
    while level and depth <= _MAX_DEPTH:
        depth += 1
        inner = [list(member.values()) if isinstance(member, Mapping) else member for member in level]
        level = [item for member in inner if isinstance(member, list) for item in member]
    return depth


def _check_towers(towers: Mapping[str, Any], where: str) -> None:
    """Checks the number of layers of each tower and their sum; the report shows all."""
    for name, rows in towers.items():
        _check_step(rows, f"{where}: {name}")
    if sum(towers.values()) > _MAX_LAYERS:
        raise _error(where, f"at most {_MAX_LAYERS} layers together", towers)


def _check_layers(layers: Mapping[str, Any], where: str) -> None:
    """Checks that every layer has one number, or one row of numbers."""
    for name, rows in layers.items():
        here = f"{where}: {name}"
        if rows is None:
            continue
        if not isinstance(rows, list) or not 0 < len(rows) <= _MAX_LAYERS:
            raise _error(here, f"a list with an entry for every layer, at most {_MAX_LAYERS}", rows)
        nested = [row for row in rows if isinstance(row, list)]
        if nested and (len(nested) < len(rows) or len({len(row) for row in nested}) > 1):
            raise _error(here, "rows of one length", rows)
        for value in [item for row in nested for item in row] if nested else rows:
            _check_number(value, here)


def _check_histograms(histograms: Mapping[str, Any], where: str) -> None:
    """Checks for increasing edges and one row of counts per layer, with one bin more than edges."""
    if len(histograms) > _MAX_HISTOGRAMS:
        raise _error(where, f"those of at most {_MAX_HISTOGRAMS} mechanisms", list(histograms))
    for label in histograms:
        here, histogram = f"{where}: {label}", _mapping(histograms, label, where)
        edges, counts = histogram.get("edges"), histogram.get("counts")
        if not isinstance(edges, list) or not 1 < len(edges) <= _MAX_EDGES:
            raise _error(f"{here}: edges", "a list of at least two numbers", edges)
        for edge in edges:
            _check_number(edge, f"{here}: edges")
        if None in edges or any(low >= high for low, high in itertools.pairwise(edges)):
            raise _error(f"{here}: edges", "rising numbers", edges)
        rows = []
        if isinstance(counts, list) and all(isinstance(row, list) for row in counts):
            rows = counts
        if {len(row) for row in rows} != {len(edges) + 1}:
            raise _error(f"{here}: counts", f"rows of {len(edges) + 1} counts, one a layer", counts)
        for count in (count for row in rows for count in row):
            _check_step(count, f"{here}: counts")


def _check_numbers(values: Mapping[str, Any], where: str, needed: tuple[str, ...] = ()) -> None:
    for name, value in values.items():
        _check_number(value, f"{where}: {name}")
    for name in needed:
        if values.get(name) is None:
            raise NaloraError(f"{where}: {name}", expected="a number", found="nothing")


def _check_number(value: object, where: str) -> None:
    """Checks for null or a finite number, also for integers that exceed the range of a float."""
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, int | float) or not abs(value) < 1e300 or not math.isfinite(value):
        raise _error(where, "a finite number, or null", value)


def _check_step(value: object, where: str) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MAX_STEP
    if not valid or value != int(value):  # type: ignore[call-overload]
        raise _error(where, "a count, 0 or more", value)


def _mapping(record: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = record[name]
    if not isinstance(value, Mapping):
        raise _error(f"{where}: {name}", "a JSON object", value)
    return value


def _error(where: str, expected: str, value: object) -> NaloraError:
    remedy = "the file was edited or damaged: restore that line, or delete it"
    return NaloraError(where, expected=expected, found=repr(value)[:100], remedy=remedy)
