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

UPLOAD_MARK = ".nalora-upload"
# Files without which a folder is neither a model nor an adapter.
_LAST = ("adapter_config.json", "config.json")
_BEAT = 30.0  # seconds between two writes of a mark
# age after which a mark of another machine belongs to a process that has ended
_STALE = 4 * _BEAT
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
    where = where.rstrip("/")
    names = list[str]()
    stop = threading.Event()
    owner = {
        "host": socket.gethostname(),
        "stage": str(stage(where)),
        "token": secrets.token_hex(8),
    }
    store = buckets.filesystem(where)

    def write_mark(**options: Any) -> None:
        """Writes the file that marks the folder as being written by this process."""
        mark = json.dumps(owner | {"time": time.time(), "names": names})
        store.pipe_file(f"{where}/{UPLOAD_MARK}", mark.encode(), **options)

    def owns() -> bool:
        return bool(_read_mark(where)["token"] == owner["token"])

    def sign() -> None:
        """Writes the mark again, unless another process has taken the folder over."""
        if not owns():
            raise NaloraError(
                where,
                expected="the uploaded files",
                found="those of another process",
                remedy="start again",
            )
        write_mark()

    def keep_signing() -> None:
        """Signs at intervals, so that other machines see that this process lives."""
        while not stop.wait(_BEAT):
            # of any type; the next write, or the upload, may succeed
            with suppress(Exception):
                sign()

    with _store_errors(where):
        _remove(where, _leftovers(where))
        try:
            write_mark(mode="create")
        except FileExistsError as error:
            raise _busy(where, "another process") from error
    thread = threading.Thread(target=keep_signing, name="upload mark", daemon=True)
    thread.start()
    complete = False
    try:
        yield
        paths = {
            path.relative_to(folder).as_posix(): path
            for path in folder.rglob("*")
            if path.is_file()
        }
        # False sorts before True, so that the files of _LAST are uploaded last.
        names += sorted(paths, key=lambda name: (name in _LAST, name))
        with _store_errors(where):
            sign()
            for name in names:
                if name in _LAST:
                    sign()
                _put(store, paths[name], f"{where}/{name}")
        complete = True
    finally:
        stop.set()
        thread.join()
        with suppress(NaloraError):  # otherwise the next upload removes them
            if complete:
                _remove(where, [])  # the mark alone
            elif owns():
                _remove(where, names)


def _remove(where: str, names: Sequence[str]) -> None:
    """Removes files of a bucket's folder, in reverse order, and then the mark."""
    with _store_errors(where):
        # Twice: a cancelled request may have arrived meanwhile.
        for removed in (names, [UPLOAD_MARK, *names]):
            present = _names(where)
            for name in removed[::-1]:
                if name in present:
                    buckets.filesystem(where).rm_file(f"{where}/{name}")


def _put(store: Any, path: Path, where: str, **options: Any) -> None:
    """Uploads a file; an exception in this thread, such as a signal's, cancels the upload."""
    if not store.async_impl:
        store.put_file(str(path), where, **options)
        return
    upload = asyncio.run_coroutine_threadsafe(
        store._put_file(str(path), where, **options), store.loop
    )
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
    names = list[str]()
    present = _names(where)
    if UPLOAD_MARK in present and not present.intersection(_LAST):
        mark = _read_mark(where)
        age = time.time() - mark["time"]
        here = socket.gethostname(), str(stage(where))
        is_ours = (mark["host"], mark["stage"]) == here
        if not is_ours and age < _STALE:
            raise _busy(
                where, f"{mark['host']}, which wrote to it {age:.0f} seconds ago"
            )
        names = mark["names"]
    if "" in present:  # ``where`` is itself a file
        raise _taken(where, "an existing file")
    if others := sorted(present - {UPLOAD_MARK, *names}):
        raise _taken(where, f"one that holds {first_names(others)}")
    return names


def first_names(names: Sequence[str]) -> str:
    """Returns the first three of names as text."""
    text = ", ".join(names[:3])
    if len(names) > 3:
        text += ", ..."
    return text


def _names(where: str) -> set[str]:
    """Returns the relative names of the files below a folder in a bucket."""
    with _store_errors(where):
        store = buckets.filesystem(where)
        start = len(store._strip_protocol(where)) + 1  # of the relative part of a path
        return {path[start:] for path in store.find(where)}


def _read_mark(where: str) -> dict[str, Any]:
    """Returns a folder's mark; one without an owner if it is missing or damaged."""
    invalid = (
        FileNotFoundError,
        ValueError,
        TypeError,
        KeyError,
        RecursionError,
        OverflowError,
    )
    with _store_errors(where), suppress(*invalid):
        mark = json.loads(buckets.filesystem(where).cat_file(f"{where}/{UPLOAD_MARK}"))
        texts = {name: str(mark[name]) for name in ("host", "stage", "token")}
        return texts | {
            "time": float(mark["time"]),
            "names": [str(name) for name in mark["names"]],
        }
    return {"host": "", "stage": "", "token": "", "time": 0.0, "names": []}


def _taken(where: str, found: str) -> NaloraError:
    """Returns the error for an output in a bucket that exists."""
    return NaloraError(
        where,
        expected="a new name in the bucket",
        found=found,
        remedy="choose another name, or empty it yourself",
    )


def _busy(where: str, who: str) -> NaloraError:
    """Returns the error for a folder in a bucket to which the process ``who`` writes."""
    return NaloraError(
        where,
        expected="a folder that no other process writes to",
        found=who,
        remedy=f"wait for it; if it has ended, start again in {_STALE:.0f} seconds",
    )
