"""The run's log ``metrics.jsonl``: one JSON object per line.

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

Every line ends with a digest of its content (`nalora_jax.common.seals`), which `read_metrics` checks and
removes.

Every value is a host number: the loop fetches from the device at log steps only. NaN and infinity
are written as null, since JSON does not have them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nalora_jax.common import buckets
from nalora_jax.common.files import write_atomically
from nalora_jax.common.paths import open_unlinked
from nalora_jax.common.seals import seal, unseal
from nalora_jax.config import config_from_dict
from nalora_jax.errors import NaloraError
from nalora_jax.train.callbacks import Callback, Ended, Started
from nalora_jax.train.records import check_record

FILE = "metrics.jsonl"


class MetricsLog(Callback):
    """The log ``folder/metrics.jsonl`` of a run; a context manager that closes the file.

    Args:
      folder: the run's folder; created if missing.
      resume: step of the restored checkpoint, or None for a new run. Lines of later steps are
        removed, because the resumed run writes them again. So is an incomplete last line after a
        crash.
      goes_on: False if no step follows, so that the line of a stopped run's last step stays.

    Attributes:
      begun: the line of the step where the resumed run was stopped, if its next log step includes
        those steps; else empty.

    Raises:
      NaloraError: a new run's folder contains a log, or the log to resume is damaged before its
        last line.
    """

    def __init__(self, folder: str | Path, *, resume: int | None = None, goes_on: bool = True) -> None:
        self.path = Path(folder) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume is None and self.path.exists():
            raise NaloraError(
                str(self.path),
                expected="a new run's folder",
                found="the log of another run",
                remedy="choose another --output, or continue that run with --resume",
            )
        self._resume = resume
        earlier: list[dict[str, Any]] = []
        self.begun: dict[str, Any] = {}
        if resume is not None:
            earlier, self.begun = _rewind(self.path, resume, goes_on=goes_on)
        self._has_header = any("run" in record for record in earlier)
        self._file = open_unlinked(self.path, "a", encoding="utf-8")

    def start(
        self, config: Mapping[str, Any], *, versions: Mapping[str, str], device: str, **more: Any
    ) -> None:
        """Writes the first line of a new run (config, versions, device) or of a resumption."""
        machine = {"versions": dict(versions), "device": device}
        if self.begun:
            more["begun"] = self.begun
        if self._has_header:
            self.write({"resumed": {"step": self._resume, **machine, **more}})
        else:
            self.write({"run": dict(config), **machine, **more})
            self._has_header = True

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line.

        Args:
          record: nested dicts and lists of numbers, strings, booleans, None,
            numpy scalars and arrays.

        Raises:
          NaloraError: the line cannot be written, e.g. because the disk is full.
        """
        line = json.dumps(seal(to_json(record)), allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            remedy = "free some space, then continue with --resume"
            raise NaloraError(
                str(self.path), expected="to append a line", found=error, remedy=remedy
            ) from error

    def on_start(self, started: Started) -> None:
        """Writes the first line, or the line of a resumed run."""
        settings = {}
        if started.step:
            settings["settings"] = started.config
        self.start(
            started.config, versions=started.versions, device=started.device, **settings, **started.more
        )

    def on_log(self, step: int, record: Mapping[str, Any]) -> None:
        """Writes the line of a log step."""
        self.write({"step": step, **record})

    def on_eval(self, step: int, values: Mapping[str, Any], kind: str) -> None:
        """Writes the line of an evaluation; per-example ``right`` only during training."""
        logged = {name: value for name, value in values.items() if not (kind and name == "right")}
        record: dict[str, Any] = {"step": step}
        if kind:
            record[kind] = True
        self.write(record | {"eval": logged})

    def on_end(self, ended: Ended) -> None:
        """Writes the last line."""
        ending: dict[str, Any] = {"step": ended.step, "best_step": ended.best_step}
        if ended.message:
            ending = {"message": ended.message}
        if ended.seconds:
            ending["seconds"] = ended.seconds
        self.write({"done": ending})

    def close(self) -> None:
        """Closes the file; later calls have no effect."""
        with suppress(OSError):  # `write` has already raised if the disk is full
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del kind, error, trace
        self.close()


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


def scalars(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Returns tags and numbers of one line, for trackers; layers have one tag each.

    Example:
      >>> scalars({"step": 1, "loss": 2.0, "eval": {"n": 4}, "layers": {"limit": [0.2, None]}})
      [('train/loss', 2.0), ('eval/n', 4), ('limit/layer_00', 0.2)]
    """
    numbers = [(f"train/{name}", value) for name, value in record.items() if name != "step"]
    numbers += [(f"eval/{name}", value) for name, value in record.get("eval", {}).items()]
    for name, rows in record.get("layers", {}).items():
        numbers += [(f"{name}/layer_{index:02d}", row) for index, row in enumerate(rows)]
    return [
        (tag, value)
        for tag, value in numbers
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _rewind(path: Path, step: int, *, goes_on: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Removes the lines after ``step`` from the file; returns the remaining ones and `MetricsLog.begun`."""
    if not path.exists():
        return [], {}
    records = read_metrics(path)
    earlier = [
        r for r in records if _step(r) <= step and not {"done", "final"} & r.keys()
    ]  # a run has one end
    begun: dict[str, Any] = {}
    if goes_on:
        for record in [r for r in earlier if _step(r) == step]:
            begun = record.get("resumed", {}).get("begun", begun)
            if "target_tokens" in record:
                begun = {name: value for name, value in record.items() if isinstance(value, int | float)}
                earlier.remove(record)
    write_atomically(path, "".join(json.dumps(seal(record)) + "\n" for record in earlier))
    return earlier, begun


def _step(record: Mapping[str, Any]) -> int:
    return int(record.get("step", record.get("resumed", {}).get("step", 0)))
