"""Locks between processes, by `filelock`: of a run, of a study's files and of folders that are being written.

The kernel releases a process's locks when the process ends for any reason, so that no stale lock
remains on one host. On storage shared between hosts, the kernel may not see locks of other hosts.
So the holder of a folder's lock also touches its file every 5 seconds. A process that reads another
host's name in the file watches it for 20 seconds, and takes the lock over if it is not touched.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nalora_jax.common.files import open_unlinked, refuse_link
from nalora_jax.common.redaction import redacted
from nalora_jax.errors import NaloraError

RUN_LOCK = "run.lock"
OWNER = "owner.json"  # in a folder of `owned_folder`: host and id of the process, which holds a lock on it
_BEAT = 5.0  # seconds between two touches
_STALE = 20.0  # seconds without a touch after which a holder on another host counts as gone
# Seconds without a change after which a folder is removed if locks do not tell: of another host, or
# on a file system without locks.
_ABANDONED = 86_400.0
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)  # of file systems without locks


def _acquire(path: Path, lock: FileLock) -> bool | None:
    """Returns True with the lock, False if another process holds it, None on a file system without locks.

    Raises:
      NaloraError: ``path`` is a symbolic link.
      OSError: the file cannot be opened.
    """
    refuse_link(path, "a file")
    try:
        lock.acquire()
    except Timeout:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
    return True


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool | None]:
    """Locks the file ``path``, created if missing, for the block.

    Args:
      path: the file; no other file may be replaced by it.
      wait: wait while another process holds the lock.

    Yields:
      True with the lock, False if another process holds it, None on a file system without locks.

    Raises:
      NaloraError: ``path`` is a symbolic link.
      OSError: the file cannot be opened.
    """
    lock = FileLock(path, timeout=-1 if wait else 0)
    held = _acquire(path, lock)
    try:
        yield held
    finally:
        lock.release()


class RunLock:
    """The lock of a run's folder, held by this process; its file names the process.

    Args:
      path: the file, in the folder.

    Raises:
      NaloraError: a living process holds it; its host, process id and command are named.
      OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._stop = path, threading.Event()
        self._lock = FileLock(path, timeout=0, thread_local=False)
        while not self._acquired():
            pass
        try:
            with open_unlinked(path, "w", encoding="utf-8") as file:
                file.write(json.dumps(_this_process()))
        except BaseException:
            self._lock.release()
            raise
        threading.Thread(target=self._beat, name="output lock", daemon=True).start()

    def _acquired(self) -> bool:
        """Returns True with the lock of the file at the path, False if its holder removed it meanwhile."""
        if _acquire(self.path, self._lock) is False:
            if self.path.exists():
                raise _held(self.path, _process_of(self.path))
            return False
        try:
            if _is_touched_by_another_host(self.path):
                raise _held(self.path, _process_of(self.path))
            if self.path.exists():
                return True
        except BaseException:
            self._lock.release()
            raise
        self._lock.release()
        return False

    def release(self) -> None:
        """Releases the lock; later calls have no effect."""
        if self._stop.is_set():
            return
        self._stop.set()
        # Before the lock is released, so that no other process can have locked this file.
        self.path.unlink(missing_ok=True)
        self._lock.release()

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT):
            try:
                os.utime(self.path)
            except OSError:  # the folder is gone or unreachable: the run's writes will raise
                return


def _is_touched_by_another_host(path: Path) -> bool:
    """Returns True if a holder on another host, whose lock the kernel may not see, touches the file."""
    holder = _process_of(path)
    if not holder or holder.get("host") == socket.gethostname():
        return False
    until = time.monotonic() + _STALE
    with suppress(FileNotFoundError):  # the other host has released its lock
        touched = path.stat().st_mtime_ns
        while time.monotonic() < until:
            time.sleep(0.2)
            if path.stat().st_mtime_ns != touched:
                return True
    return False


def _process_of(path: Path) -> dict[str, Any]:
    """Returns the process that a lock's file names; empty without a name."""
    try:
        return dict(json.loads(path.read_bytes()[: 1 << 16]))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _this_process() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": since,
        "command": redacted(" ".join(sys.argv))[:200],
    }


def _held(path: Path, holder: dict[str, Any]) -> NaloraError:
    who = "process {pid} on {host} since {since} ({command})".format(
        **{name: holder.get(name, "?") for name in ("pid", "host", "since", "command")}
    )
    return NaloraError(
        f"--output {path.parent}",
        expected="a folder that no other run writes to",
        found=who,
        remedy="wait for that run or stop it, or choose another --output",
    )


def owned_folder(parent: Path, suffix: str) -> tuple[Path, FileLock]:
    """Makes a folder ``parent/.RANDOM<suffix>``, kept by `remove_abandoned` until the lock is released."""
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=".", suffix=suffix))
    new = folder / f"{OWNER}.new"
    lock = FileLock(new, timeout=0, thread_local=False)
    _acquire(new, lock)
    new.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    new.rename(folder / OWNER)  # no process sees it before it is locked
    return folder, lock


def owner_of(folder: Path) -> dict[str, Any]:
    """Returns host and id of the process that made a folder by `owned_folder`; empty if unknown."""
    return _process_of(folder / OWNER)


def remove_abandoned(folder: Path) -> None:
    """Removes a folder of `owned_folder` if its process has ended.

    Hosts that share storage may not see each other's locks: a folder of another host counts as
    abandoned after a day without a change. Folders of other programs and users are left alone.
    """
    owner = folder / OWNER
    if owner.is_symlink() or not owner.is_file():
        return
    with suppress(OSError), locked(owner) as free:
        if free is False:
            return
        ended = free and owner_of(folder).get("host") == socket.gethostname()
        changed = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
        if ended or time.time() - changed > _ABANDONED:
            aside = folder.with_name(f".{secrets.token_hex(8)}{folder.suffix}")
            folder.rename(aside)  # at once, while the lock is held
            remove_owned(aside)


def remove_owned(folder: Path) -> None:
    """Removes a folder of `owned_folder`; its owner's file last, by which a later process finds what remains."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != OWNER:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def scratch_folder(parent: Path, suffix: str) -> Iterator[Path]:
    """Makes a temporary folder in ``parent`` and removes it at the end; also removes those of killed processes."""
    for folder in parent.glob(f".*{suffix}"):
        remove_abandoned(folder)
    folder, lock = owned_folder(parent, suffix)
    try:
        scratch = folder / "files"
        scratch.mkdir(0o700)
        yield scratch
    finally:
        remove_owned(folder)
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)  # on NFS only possible once the file is closed
