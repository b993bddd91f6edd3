"""The record file of a study: one JSON line per finished run, appended by any number of processes.

A process claims a run by a lock on a file of its own, which the system releases when the process ends, however it ends;
so no claim outlives its process, and an interrupted run is free again. Beside the lock lies the run's snapshot, from
which it is taken up. Locks and snapshots are in ``.runs`` in the study's folder, and are of no use when all is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nalora_jax.errors import NaloraError
from nalora_jax.paths import open_unlinked
from nalora_jax.study.fields import check_fields
from nalora_jax.train.metrics import read_metrics, to_json

FILE = "records.jsonl"
CLAIMS = ".runs"

Record = dict[str, Any]


class Records:
    """The finished runs of a study, and the claims on those under way.

    Args:
      folder: the study's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE

    def read(self) -> dict[str, Record]:
        """Records by the id of their run, in the order in which they were written; a torn last line is left out.

        Raises:
          NaloraError: a line is no JSON object, or two records are of one run.
        """
        found: dict[str, Record] = {}
        for number, record in enumerate(read_metrics(self.path) if self.path.exists() else [], start=1):
            check_fields(record, f"{self.path}: line {number}")
            name = record.get("id")
            if not isinstance(name, str) or name in found:
                expected = "a record of a run that has none yet"
                raise NaloraError(f"{self.path}: line {number}", expected=expected, found=f"id {name!r}")
            found[name] = record
        return found

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line, whole or not at all: under a lock, after anything that a crash left without its line end.

        Raises:
          NaloraError: it cannot be written.
        """
        line = (json.dumps(to_json(record), allow_nan=False) + "\n").encode()
        try:
            with _locked(self._claims() / "records.lock"):
                _drop_torn_line(self.path)
                with open_unlinked(self.path, "ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            remedy = "make room; the run is taken up again from its last evaluation"
            raise NaloraError(str(self.path), expected="to append a line", found=error, remedy=remedy) from error

    @contextlib.contextmanager
    def claim(self, run: str) -> Iterator[Path | None]:
        """The claim on ``run`` while the context lasts: where its snapshot lies, or None if another process has it."""
        lock = self._claims() / f"{run}.lock"
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            yield self._claims() / f"{run}.npz"  # the lock goes with the file handle

    def claimed(self, run: str) -> bool:
        """Whether some process works on ``run`` at the moment."""
        if not (self.folder / CLAIMS / f"{run}.lock").exists():
            return False
        with self.claim(run) as free:
            return free is None

    def _claims(self) -> Path:
        folder = self.folder / CLAIMS
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _drop_torn_line(path: Path) -> None:
    """Cuts what stands after the last line end: half a record, of a machine that stopped while writing it."""
    if not path.exists():
        return
    with open_unlinked(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            file.truncate(whole)
