"""The files of a study: one JSON line per finished run, appended by any number of processes.

    records.jsonl       finished runs
    tests.jsonl         tests, listed before they read test items and again when they are finished
    .runs/ID.lock       claim on a run
    .runs/ID.npz        snapshot of an interrupted run

A process claims a run by a lock, which the system releases when the process ends. Claims and
snapshots are not needed once all runs are done; the list of tests belongs with the records.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.common.digests import digest_of
from nalora_jax.common.files import (
    make_unlinked_folder,
    open_unlinked,
    write_atomically,
)
from nalora_jax.common.locks import hold_lock
from nalora_jax.config.structured import has_type
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.run_log import read_metrics, to_json

RECORDS_FILE = "records.jsonl"
TESTS = "tests.jsonl"
CLAIMS = ".runs"
_LARGEST = 1e300  # limit of numbers; JSON's integers may exceed a float

StudyRecord = dict[str, Any]
_Row = dict[str, float | None]
_TEXT = (str, "a text")
_NUMBER = (float, "a finite number")
_ROW = (_Row, "numbers by name")
_ROWS = (list[_Row], "rows of numbers by name")
# Fields that a study reads: their type, and its description.
_NEEDED: dict[str, tuple[Any, str]] = {
    "stage": _TEXT,
    "model": _TEXT,
    "task": _TEXT,
    "method": _TEXT,
    "data": _TEXT,
    "protocol": _TEXT,
    "rate": _NUMBER,
    "multiple": _NUMBER,
    "seed": _NUMBER,
    "seconds": _NUMBER,
    "curve": _ROWS,
    "training": _ROWS,
    "diverged": (bool, "true or false"),
    "validation": _ROW,
    "items": (dict[str, str], "texts by name"),
}
_FIELDS: dict[str, tuple[Any, str]] = _NEEDED | {
    "test": _ROW,
    "probes": (dict[str, _Row], "numbers by name, by probe"),
    "parameters": _NUMBER,
}


class Records:
    """The finished runs of a study, and the claims on runs in progress.

    Args:
      folder: the study's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / RECORDS_FILE
        self.tests_path = self.folder / TESTS

    def read(self) -> dict[str, StudyRecord]:
        """Returns the records by the id of their run, in the file's order.

        An incomplete last line is left out.

        Raises:
          NaloraError: a line is not a JSON object, or two records have the same id.
        """
        records: dict[str, StudyRecord] = {}
        for number, record in enumerate(_lines(self.path), start=1):
            _check_fields(record, f"{self.path}: line {number}")
            name = record.get("id")
            if not isinstance(name, str) or name in records:
                raise NaloraError(
                    f"{self.path}: line {number}",
                    expected="a record of a run that has none yet",
                    found=f"id {name!r}",
                )
            records[name] = record
        return records

    def tests(self) -> list[dict[str, Any]]:
        """Returns the list of tests.

        Each has ``id``, ``protocol`` and ``time``; finished tests also ``record``, the record's
        digest.

        Raises:
          NaloraError: a line has other fields.
        """
        entries = _lines(self.tests_path)
        for number, entry in enumerate(entries, start=1):
            if not {"id", "protocol"} <= entry.keys():
                raise NaloraError(
                    f"{self.tests_path}: line {number}",
                    expected="id and protocol of a test",
                    found=", ".join(entry) or "neither",
                )
        return entries

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record, and a test's digest to the list of tests.

        Raises:
          NaloraError: the line cannot be written.
        """
        self._append(self.path, record)
        if record.get("stage") == "test":
            self.list_test(record)

    def list_test(self, record: Mapping[str, Any]) -> None:
        """Lists a test: before it reads the test items, and with its digest when it is finished.

        Args:
          record: with the ``id``, the ``protocol`` and, of a finished run, the ``digest``.

        Raises:
          NaloraError: the line cannot be written.
        """
        entry = {
            "id": record["id"],
            "protocol": record["protocol"],
            "record": record.get("digest"),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._append(self.tests_path, entry)

    def _append(self, path: Path, line: Mapping[str, Any]) -> None:
        """Adds a line to a file under a lock, after removing an incomplete last line.

        Raises:
          NaloraError: the line cannot be written.
        """
        content = (json.dumps(exact_values(line), allow_nan=False) + "\n").encode()
        try:
            with (
                hold_lock(self._claims() / "records.lock", wait=True),
                open_unlinked(path, "ab+") as file,
            ):
                file.seek(0)
                file.seek(
                    file.read().rfind(b"\n") + 1
                )  # the end of the last whole line
                file.truncate()
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise NaloraError(
                str(path),
                expected="to append a line",
                found=error,
                remedy="make room; the run resumes from its last evaluation",
            ) from error

    @contextlib.contextmanager
    def claim(self, run: str) -> Iterator[Path | None]:
        """Claims ``run`` within the context; yields its snapshot's path, or None if it is taken."""
        with hold_lock(self._claims() / f"{run}.lock") as free:
            if free is False:
                yield None
            else:
                yield self._claims() / f"{run}.npz"

    def claimed(self, run: str) -> bool:
        """Returns True if a process works on ``run``."""
        if not (self.folder / CLAIMS / f"{run}.lock").exists():
            return False
        with self.claim(run) as free:
            return free is None

    def _claims(self) -> Path:
        """Returns the folder of claims and snapshots; creates it if missing."""
        return make_unlinked_folder(self.folder / CLAIMS)


def hours(records: Mapping[str, StudyRecord]) -> float:
    """Returns the total time of all runs in hours."""
    return sum(float(record["seconds"]) for record in records.values()) / 3600


def exact_values(value: Any) -> Any:
    """Returns ``value`` as JSON types with all digits of its numbers, to show every difference.

    Example:
      >>> exact_values({"loss": np.float64(0.1), "steps": (1, np.int32(2)), "bad": float("nan")})
      {'loss': 0.1, 'steps': [1, 2], 'bad': None}
    """
    return to_json(value, digits=17)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log; none if there is no file."""
    if not path.exists():
        return []
    return read_metrics(path)


def _check_fields(record: Mapping[str, Any], where: str) -> None:
    """Checks that a record has every field that a study reads, each of its type.

    Raises:
      NaloraError: a field has another type, or some fields are missing.
    """
    damage = "the file was edited or damaged"
    remedy = f"{damage}: restore that line, or delete it and do the run again"
    for name, (hint, expected) in _FIELDS.items():
        if name not in record:
            continue
        value = record[name]
        if not has_type(value, hint) or not (hint is bool or _is_finite(value)):
            raise NaloraError(
                f"{where}: {name}",
                expected=expected,
                found=repr(value)[:100],
                remedy=remedy,
            )
    missing = [name for name in _NEEDED if name not in record]
    if 0 < len(missing) < len(_NEEDED):
        raise NaloraError(
            f"{where}: {missing[0]}",
            expected=_FIELDS[missing[0]][1],
            found="none",
            remedy=remedy,
        )


def _is_finite(value: Any) -> bool:
    """Returns True if all numbers in parsed JSON are finite, and no value is true or false."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    if isinstance(value, bool):
        return False
    return not isinstance(value, int | float) or abs(value) < _LARGEST


# ---------------------------------------------------------------- snapshots

log = logging.getLogger(__name__)

_DIGEST = 64  # hexadecimal digits of a sha256, at the start of the file


def write_snapshot(
    path: Path, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]
) -> None:
    """Replaces the snapshot of a run in one step: its arrays by name, and ``notes`` of JSON types.

    The file starts with the digest of the rest. It raises as `write_atomically`; an earlier
    snapshot then stays.
    """
    buffer = io.BytesIO()
    entries: dict[str, Any] = {f"array/{name}": value for name, value in arrays.items()}
    np.savez(buffer, notes=np.array(json.dumps(notes)), **entries)
    content = buffer.getvalue()
    write_atomically(path, digest_of(content).encode() + content)


def read_snapshot(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Returns the arrays and notes of `write_snapshot`; None if there is no file.

    It is also None, with a warning, if the file is damaged.
    """
    if not path.exists():
        return None
    content = path.read_bytes()
    if digest_of(content[_DIGEST:]).encode() != content[:_DIGEST]:
        message = "  the snapshot %s is damaged: the run starts from scratch"
        log.warning(message, path.name)
        return None
    with np.load(io.BytesIO(content[_DIGEST:])) as saved:
        arrays = {}
        for name in saved.files:
            if name != "notes":
                arrays[name.removeprefix("array/")] = saved[name]
        return arrays, json.loads(str(saved["notes"]))
