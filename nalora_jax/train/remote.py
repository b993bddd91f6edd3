"""A run's folder on an object store (``gs://bucket/run``, ``s3://bucket/run``).

The first process writes to a folder of its machine; whatever is finished there is copied to the store, every half
minute and once more at the end, and what the run removed is removed there. A run that is continued, here or on another
machine, takes what the store holds; other processes take it too, and write nothing.

Checkpoints in Google's store are written there by Orbax, by all processes, and committed by a file; they are never
copied. In other stores they are copied like the rest, from one process: the digests go first, so that a copy that was
cut off is found to be damaged, and the checkpoint before it is taken.

Paths are etils' (`epath`), which has ``gs://`` and ``s3://`` with fsspec's packages for them.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import path as ocp_path

from nalora_jax import buckets, downloads, files
from nalora_jax.distributed import on_first_process
from nalora_jax.errors import NaloraError
from nalora_jax.train.lock import FILE as LOCK

log = logging.getLogger(__name__)
HOLDER = "remote.lock"  # in the store: who copies to it, and when last
_EVERY = 30.0  # seconds between two copies
_DIRECT = "gs://"  # whose paths Orbax and TensorStore write themselves


def is_written_directly(where: str) -> bool:
    """Whether checkpoints go to the URL ``where`` without a folder in between, from any number of processes."""
    return where.startswith(_DIRECT)


@contextmanager
def mirrored(where: str, *, fresh: bool, without: tuple[str, ...] = (), every: float = _EVERY) -> Iterator[Mirror]:
    """A folder of this machine whose finished files are copied to the URL ``where``, until it is left.

    With several processes every one has such a folder. The first one's is copied; the others' are empty until they
    fetch what is in the store.

    Args:
      where: the run's folder in the store.
      fresh: the run may not find another one there; else what is there is fetched first.
      without: names of folders in it that are left alone.
      every: seconds between two copies.

    Raises:
      NaloraError: the store cannot be reached, or not be written; another machine writes to that folder; ``fresh``, and
        it holds a run. At the end: the last copy failed, which leaves everything in the folder that is named.
    """
    own = f"-{jax.process_index()}" if jax.process_index() else ""  # several processes may share a machine
    folder = downloads.cache_dir() / "runs" / (hashlib.sha256(where.encode()).hexdigest()[:16] + own)
    mirror = Mirror(where, _opened(where), folder, without)

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
    thread = threading.Thread(target=_keep_copying, args=(mirror, stop, every), name="output copies", daemon=True)
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
    """Copies one folder to one place of a store."""

    where: str
    store: epath.Path
    folder: Path
    without: tuple[str, ...] = ()  # folders at its top that are neither fetched nor copied
    _copied: dict[str, tuple[int, int]] = field(default_factory=dict)  # size and time of what the store has, by name
    _copies: threading.Lock = field(default_factory=threading.Lock)

    def claim(self) -> None:
        """Note in the store that this machine writes there.

        Raises:
          NaloraError: another machine does.
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
        """The other way round."""
        (self.store / HOLDER).unlink(missing_ok=True)

    def refuse_others(self, *, fresh: bool) -> None:
        """Where the run is ``fresh``, the store may hold nothing.

        Raises:
          NaloraError: it does.
        """
        names = sorted(self._held()) if fresh else []
        if names:
            raise NaloraError(
                "--output",
                expected="a new or empty folder",
                found=f"{self.where}, which holds {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}",
                remedy="choose another folder, or continue that run with --resume",
            )

    def fetch(self, within: str = "") -> None:
        """Make the folder, or a folder ``within`` it, what the store holds."""
        here = self.folder / within
        if here.exists():  # what an earlier run left on this machine; its last copies are in the store
            shutil.rmtree(here)
        here.mkdir(parents=True, exist_ok=True)
        for name in self._held():
            if name.partition("/")[0] in self.without or not name.startswith(f"{within}/" if within else ""):
                continue
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with (self.store / name).open("rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            self._copied[name] = _state(target)

    def push(self) -> None:
        """Copy what is new or has changed, and remove what is gone."""
        with self._copies:
            self._sign()
            self._push()

    def _push(self) -> None:
        found = {name: _state(self.folder / name) for name in finished(self.folder)}
        for name in sorted(found, key=_order):
            if self._copied.get(name) == found[name]:
                continue
            with (self.folder / name).open("rb") as source, (self.store / name).open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            self._copied[name] = found[name]
        for name in [name for name in self._copied if name not in found]:
            (self.store / name).unlink(missing_ok=True)
            del self._copied[name]

    def _held(self) -> Iterator[str]:
        """Names of what a run left in the store."""
        names = files.names_below(self.store) if self.store.exists() else ()
        return (name for name in names if name != HOLDER and not name.startswith("."))

    def _sign(self) -> None:
        (self.store / HOLDER).write_text(json.dumps({"host": socket.gethostname(), "time": time.time()}))


def finished(folder: Path) -> list[str]:
    """Names of the files below ``folder`` that nobody is writing: no scratch files, no checkpoints under way."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if ocp_path.atomicity_types.TMP_DIR_SUFFIX not in name]
        within = Path(root).relative_to(folder)
        found += [str(within / name) for name in names if not name.startswith(".") and name != LOCK]
    return found


def _order(name: str) -> tuple[bool, str]:
    """Digests first: they say what else has to be there."""
    return (Path(name).name != files.DIGESTS, name)


def _keep_copying(mirror: Mirror, stop: threading.Event, every: float) -> None:
    warned = False
    while not stop.wait(every):
        try:
            mirror.push()
            warned = False
        except FileNotFoundError:  # removed by the run while it was looked at
            continue
        except Exception as error:  # stores raise errors of their own; the last copy raises
            if not warned:
                log.warning("%s cannot be written (%s); trying again", mirror.where, error)
            warned = True


def _opened(where: str) -> epath.Path:
    """The path in the store, whose packages are there."""
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
    """Has gcsfs ask the store for what is in a folder, instead of what it was told of it before."""
    from fsspec.config import conf

    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextmanager
def _store_errors(where: str, expected: str) -> Iterator[None]:
    """Whatever a store raises, as this library's error."""
    try:
        yield
    except NaloraError:
        raise
    except Exception as error:
        raise _unreachable(where, expected, error) from error


def _unreachable(where: str, expected: str, error: Any) -> NaloraError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return NaloraError(f"--output {where}", expected=expected, found=reason, remedy="check the bucket and your rights")
