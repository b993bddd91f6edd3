"""A run's folder on an object store (``gs://bucket/run``, ``s3://bucket/run``).

The first process writes to a local folder. Its finished files are copied to the store every 30
seconds and once more at the end; files that the run removed are removed from the store. A resumed
run, on the same or another machine, first fetches the files of the store. Other processes fetch
them too, but write no files.

In Google's store, all processes write checkpoints directly, through Orbax, and a commit file
completes each; they are never copied. In other stores, one process copies its checkpoints like the
other files. The digests are copied first, so that an incomplete copy is detected as damaged, and
the previous checkpoint is restored.

Paths are etils' `epath`, which supports ``gs://`` and ``s3://`` through fsspec's packages.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import path as ocp_path

from nalora_jax.common import buckets, downloads, files
from nalora_jax.errors import NaloraError
from nalora_jax.layout.distributed import on_first_process
from nalora_jax.train.lock import FILE as LOCK

log = logging.getLogger(__name__)
HOLDER = "remote.lock"  # in the store: the machine that copies to it, and the time of its last copy
_EVERY = 30.0  # seconds between two copies
_DIRECT = "gs://"  # paths that Orbax and TensorStore write directly


def is_written_directly(where: str) -> bool:
    """Returns True if all processes write checkpoints directly to the URL ``where``."""
    return where.startswith(_DIRECT)


def listing(names: Sequence[str]) -> str:
    """Returns the first names of a folder's files, for messages."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def write_text(folder: str, name: str, text: str) -> None:
    """Writes a file of ``folder``, a path or a URL, in one step.

    Raises:
      NaloraError: the folder cannot be written.
    """
    where = buckets.url(folder)
    if where is None:
        files.write_atomically(Path(folder) / name, text)
        return
    with _store_errors(where, "a folder that can be written"):
        (open_store(where) / name).write_text(text)


@contextmanager
def mirrored(
    where: str, *, fresh: bool, without: tuple[str, ...] = (), every: float = _EVERY
) -> Iterator[Mirror]:
    """Opens a local folder whose finished files are copied to the URL ``where``.

    Copying stops when the context ends. With several processes, each has a local folder. Only the
    first one's is copied; the others are empty until `Mirror.fetch`.

    Args:
      where: the run's folder in the store.
      fresh: require an empty folder in the store; otherwise its files are fetched first.
      without: names of top-level folders that are neither fetched nor copied.
      every: seconds between two copies.

    Raises:
      NaloraError: the store cannot be reached or written; another machine writes to that folder; or
        ``fresh`` and the folder contains a run. At the end: the last copy failed; the message names
        the local folder, which still contains all files.
    """
    name = hashlib.sha256(where.encode()).hexdigest()[:16]
    if jax.process_index():  # several processes may share a machine
        name += f"-{jax.process_index()}"
    folder = downloads.cache_dir() / "runs" / name
    mirror = Mirror(where, open_store(where), folder, without)

    def begin() -> None:
        with _store_errors(where, "a folder that can be read and written"):
            mirror.refuse_others(fresh=fresh)
            mirror.claim()
            mirror.fetch()
            mirror.push()

    on_first_process(begin)
    if jax.process_index():
        yield mirror
        return
    stop = threading.Event()
    thread = threading.Thread(
        target=_keep_copying, args=(mirror, stop, every), name="output copies", daemon=True
    )
    thread.start()
    try:
        yield mirror
    finally:
        stop.set()
        thread.join()
        with _store_errors(where, f"to take the last files of the run, which are in {folder}"):
            mirror.push()
            mirror.release()
        log.info("output: %s", where)


@dataclass
class Mirror:
    """Copy of one local folder in one folder of a store."""

    where: str
    store: epath.Path
    folder: Path
    without: tuple[str, ...] = ()  # folders at its top that are neither fetched nor copied
    # Size and time of each file at its last copy.
    _copied: dict[str, tuple[int, int]] = field(default_factory=dict)
    _copies: threading.Lock = field(default_factory=threading.Lock)

    def claim(self) -> None:
        """Records in the store that this machine writes there.

        Raises:
          NaloraError: another machine writes there.
        """
        lock = self.store / HOLDER
        if lock.exists():
            try:
                holder = json.loads(lock.read_text())
                age = time.time() - float(holder["time"])
            except (ValueError, KeyError, TypeError, RecursionError):
                holder, age = {}, 0.0
            if holder.get("host") != socket.gethostname() and age < 4 * _EVERY:
                raise NaloraError(
                    f"--output {self.where}",
                    expected="a folder that no other run writes to",
                    found=f"that {holder.get('host', 'another machine')} wrote to it {age:.0f} seconds ago",
                    remedy=f"wait for that run or stop it; if it is gone, start again in {4 * _EVERY:.0f} seconds",
                )
        self._sign()

    def release(self) -> None:
        """Removes the record of `claim`."""
        (self.store / HOLDER).unlink(missing_ok=True)

    def refuse_others(self, *, fresh: bool) -> None:
        """Checks that the store's folder is empty if the run is ``fresh``.

        Raises:
          NaloraError: it is not empty.
        """
        if fresh and (names := sorted(self._held())):
            raise NaloraError(
                "--output",
                expected="a new or empty folder",
                found=f"{self.where}, which holds {listing(names)}",
                remedy="choose another folder, or continue that run with --resume",
            )

    def fetch(self, within: str = "") -> None:
        """Replaces the local folder, or a folder ``within`` it, by its copy in the store."""
        here = self.folder / within
        if here.exists():  # of an earlier run on this machine; the store has its last copies
            shutil.rmtree(here)
        here.mkdir(parents=True, exist_ok=True)
        for name in self._held():
            if name.partition("/")[0] in self.without or not name.startswith(
                f"{within}/" if within else ""
            ):
                continue
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with (self.store / name).open("rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            self._copied[name] = _state(target)

    def push(self) -> None:
        """Copies new and changed files, and removes deleted ones."""
        with self._copies:
            self._sign()
            self._push()

    def _push(self) -> None:
        states = {name: _state(self.folder / name) for name in finished(self.folder)}
        for name in sorted(states, key=_order):
            if self._copied.get(name) == states[name]:
                continue
            with (self.folder / name).open("rb") as source, (self.store / name).open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            self._copied[name] = states[name]
        for name in [name for name in self._copied if name not in states]:
            (self.store / name).unlink(missing_ok=True)
            del self._copied[name]

    def _held(self) -> Iterator[str]:
        """Returns the names of the run's files in the store."""
        if not self.store.exists():
            return iter(())
        names = files.names_below(self.store)
        return (name for name in names if name != HOLDER and not name.startswith("."))

    def _sign(self) -> None:
        (self.store / HOLDER).write_text(json.dumps({"host": socket.gethostname(), "time": time.time()}))


def finished(folder: Path) -> list[str]:
    """Returns the files below ``folder`` except scratch files and uncommitted checkpoints."""
    names_found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if ocp_path.atomicity_types.TMP_DIR_SUFFIX not in name]
        within = Path(root).relative_to(folder)
        names_found += [str(within / name) for name in names if not name.startswith(".") and name != LOCK]
    return names_found


def _order(name: str) -> tuple[bool, str]:
    """Returns a sort key that puts digests first: they list the files that have to follow."""
    return (Path(name).name != files.DIGESTS, name)


def _keep_copying(mirror: Mirror, stop: threading.Event, every: float) -> None:
    warned = False
    while not stop.wait(every):
        try:
            mirror.push()
            warned = False
        except FileNotFoundError:  # the run removed a file during the copy
            continue
        except Exception as error:  # stores raise any type; the last copy does not suppress it
            if not warned:
                log.warning("%s cannot be written (%s); trying again", mirror.where, error)
            warned = True


def open_store(where: str) -> epath.Path:
    """Returns the folder in the store.

    Raises:
      NaloraError: the store's package is missing, or the store cannot be read.
    """
    try:
        if is_written_directly(where):
            _see_what_others_write()
        store = epath.Path(where)
        store.exists()
    except (ImportError, ValueError, KeyError) as error:
        raise buckets.missing_package("--output", where) from error
    except Exception as error:
        raise _unreachable(where, "a folder that can be read", error) from error
    return store


def _see_what_others_write() -> None:
    """Disables gcsfs's cache of folder listings, so that it lists files of other processes."""
    from fsspec.config import conf

    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def _state(path: Path) -> tuple[int, int]:
    """Returns size and modification time, which change with a file's content."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def _store_errors(where: str, expected: str) -> Iterator[None]:
    """Converts all errors of a store to this library's error."""
    try:
        yield
    except NaloraError:
        raise
    except Exception as error:
        raise _unreachable(where, expected, error) from error


def _unreachable(where: str, expected: str, error: Any) -> NaloraError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return NaloraError(
        f"--output {where}", expected=expected, found=reason, remedy="check the bucket and your rights"
    )
