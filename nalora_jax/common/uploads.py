"""Writes files and folders to ``gs://`` and ``s3://`` buckets, whole or not at all.

A store shows an object when it is complete, but it cannot show several at once. So the file without
which no tool loads a folder (``config.json``, ``adapter_config.json``) is written last:

    gs://bucket/merged/.nalora-upload        the writing process, and the names that it writes
                      /model.safetensors, ...
                      /config.json           the folder is complete
                      /.nalora-upload        removed

A process that is killed in between leaves objects that no tool loads. The next upload to the same
folder removes them: those that the process's mark names, and no others.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from nalora_jax.common import buckets, downloads
from nalora_jax.common.digests import digest_of
from nalora_jax.errors import NaloraError

MARK = ".nalora-upload"
# Files without which a folder is neither a model nor an adapter.
_LAST = ("adapter_config.json", "config.json")
_BEAT = 30.0  # seconds between two writes of a mark
_STALE = 4 * _BEAT  # age after which a mark of another machine belongs to a process that has ended
_store_errors = partial(buckets.store_errors, access="write")


def stage(where: str) -> Path:
    """Returns the local path at which files for the URL ``where`` are prepared."""
    return downloads.cache_dir() / "uploads" / digest_of(where.rstrip("/"))[:16]


def require_free(where: str) -> None:
    """Raises an error if ``where`` is a file or a folder with files, or is being written.

    Files of an upload that was killed do not count.
    """
    _leftovers(where)


def upload_file(path: Path, where: str) -> None:
    """Uploads a file; the object appears when it is complete.

    Raises:
      NaloraError: it exists, the bucket cannot be reached, or it refuses.
    """
    with _store_errors(where):
        try:
            _put(buckets.filesystem(where), path, where, mode="create")
        except FileExistsError as error:
            raise _taken(where, "an existing file") from error


@contextmanager
def new_tree(where: str, folder: Path) -> Iterator[None]:
    """Claims a folder of a bucket, and uploads the files of ``folder`` to it if the block succeeds.

    Otherwise, uploaded files are removed. On one machine, the caller excludes a second process with
    the same `stage`.

    Args:
      where: URL of a folder without files.
      folder: on this machine.

    Raises:
      NaloraError: the folder has files, another machine writes to it, the bucket cannot be reached,
        or it refuses.
    """
    upload = _Upload(where.rstrip("/"))
    upload.claim()
    stop = threading.Event()
    thread = threading.Thread(target=upload.keep_signing, args=(stop,), name="upload mark", daemon=True)
    thread.start()
    complete = False
    try:
        yield
        upload.send(folder)
        complete = True
    finally:
        stop.set()
        thread.join()
        with suppress(NaloraError):  # otherwise the next upload removes them
            if complete or upload.owns():
                upload.remove([] if complete else upload.names)


class _Upload:
    """One process's upload to a folder."""

    def __init__(self, where: str) -> None:
        self.where, self.token = where, secrets.token_hex(8)
        self.names: list[str] = []
        self._store = buckets.filesystem(where)

    def claim(self) -> None:
        """Removes the files of a killed upload, and writes this one's mark."""
        with _store_errors(self.where):
            self.remove(_leftovers(self.where))
            try:
                self._store.pipe_file(f"{self.where}/{MARK}", self._mark(), mode="create")
            except FileExistsError as error:
                raise _busy(self.where, "another process") from error

    def send(self, folder: Path) -> None:
        """Uploads all files; the files of `_LAST` follow the others."""
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        self.names = sorted(paths, key=lambda name: (name in _LAST, name))
        with _store_errors(self.where):
            self.sign()
            for name in self.names:
                if name in _LAST:
                    self.sign()
                _put(self._store, paths[name], f"{self.where}/{name}")

    def owns(self) -> bool:
        """Returns True if the folder's mark is this process's."""
        return bool(_read_mark(self.where)["token"] == self.token)

    def sign(self) -> None:
        """Writes the mark again, unless another process has taken the folder over."""
        if not self.owns():
            expected, found = "the uploaded files", "those of another process"
            raise NaloraError(self.where, expected=expected, found=found, remedy="start again")
        self._store.pipe_file(f"{self.where}/{MARK}", self._mark())

    def keep_signing(self, stop: threading.Event) -> None:
        """Writes the mark at intervals, so that other machines see that this process lives."""
        while not stop.wait(_BEAT):
            with suppress(Exception):  # of any type; the next write, or the upload, may succeed
                self.sign()

    def remove(self, names: Sequence[str]) -> None:
        """Removes ``names``, from the last one on, and then the mark."""
        with _store_errors(self.where):
            for removed in (names, [MARK, *names]):  # again: a cancelled request may have arrived meanwhile
                present = _sizes(self.where)
                for name in removed[::-1]:
                    if name in present:
                        self._store.rm_file(f"{self.where}/{name}")

    def _mark(self) -> bytes:
        owner = {"host": socket.gethostname(), "stage": str(stage(self.where)), "token": self.token}
        return json.dumps(owner | {"time": time.time(), "names": self.names}).encode()


def _put(store: Any, path: Path, where: str, **options: Any) -> None:
    """Uploads a file; an exception in this thread, such as a signal's, cancels the upload."""
    if not store.async_impl:
        store.put_file(str(path), where, **options)
        return
    upload = asyncio.run_coroutine_threadsafe(store._put_file(str(path), where, **options), store.loop)
    try:
        upload.result()
    finally:
        upload.cancel()


def _leftovers(where: str) -> list[str]:
    """Returns the names of the files that a killed upload left in a folder.

    Raises:
      NaloraError: there are other files, or a living process writes to the folder.
    """
    where = where.rstrip("/")
    sizes = _sizes(where)
    marked = sizes.pop(MARK, None) is not None
    names: list[str] = []
    if marked and not any(name in sizes for name in _LAST):
        mark = _read_mark(where)
        age = time.time() - mark["time"]
        here = (mark["host"], mark["stage"]) == (socket.gethostname(), str(stage(where)))
        if not here and age < _STALE:
            raise _busy(where, f"{mark['host']}, which wrote to it {age:.0f} seconds ago")
        names = mark["names"]
    if "" in sizes:
        raise _taken(where, "an existing file")
    if others := sorted(set(sizes) - set(names)):
        raise _taken(where, f"one that holds {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}")
    return names


def _sizes(where: str) -> dict[str, int]:
    """Returns the size of each file below a folder in a bucket by its relative name."""
    with _store_errors(where):
        store = buckets.filesystem(where)
        start = len(store._strip_protocol(where)) + 1
        return {path[start:]: about["size"] for path, about in store.find(where, detail=True).items()}


def _read_mark(where: str) -> dict[str, Any]:
    """Returns a folder's mark; one without an owner if it is missing or damaged."""
    with _store_errors(where):
        try:
            mark = json.loads(buckets.filesystem(where).cat_file(f"{where}/{MARK}"))
            texts = {name: str(mark[name]) for name in ("host", "stage", "token")}
            return texts | {"time": float(mark["time"]), "names": [str(name) for name in mark["names"]]}
        except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
            return {"host": "", "stage": "", "token": "", "time": 0.0, "names": []}


def _taken(where: str, found: str) -> NaloraError:
    remedy = "choose another name, or empty it yourself"
    return NaloraError(where, expected="a new name in the bucket", found=found, remedy=remedy)


def _busy(where: str, who: str) -> NaloraError:
    remedy = f"wait for it; if it has ended, start again in {_STALE:.0f} seconds"
    return NaloraError(where, expected="a folder that no other process writes to", found=who, remedy=remedy)
