"""Locks between processes, by `filelock`: of a run, of a study's files and of folders that are
being written.

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
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nalora_jax.common.files import open_unlinked, refuse_link
from nalora_jax.common.redaction import redact
from nalora_jax.errors import NaloraError

RUN_LOCK = "run.lock"
_OWNER = "owner.json"  # in a folder of `own_folder`
_OWNER_BYTES = 1 << 16  # a lock's file has fewer
_BEAT = 5.0  # seconds between two touches
# Seconds without a touch after which a holder on another host counts as gone: if this process
# watches the file, and by the file's time alone.
_STALE = 20.0
_ABANDONED = 86_400.0
# Errors of file systems without locks.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


def _acquire(path: Path, lock: FileLock) -> bool | None:
    """Tries to take the lock of a file.

    Returns:
      True with the lock, False if another process holds it, None on a file system without locks.

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
def hold_lock(path: Path, *, wait: bool = False) -> Iterator[bool | None]:
    """Locks the file ``path``, created if missing, for the block.

    Args:
      path: the file; no other file may be replaced by it.
      wait: wait while another process holds the lock.

    Yields:
      What `_acquire` returns, which also raises.
    """
    timeout = 0
    if wait:
        timeout = -1  # without a limit
    lock = FileLock(path, timeout=timeout)
    held = _acquire(path, lock)
    try:
        yield held
    finally:
        lock.release()


class RunLock:
    """The lock of a folder, held by this process.

    Its file names the process, and is touched while the process lives.

    Args:
      path: the file, in the folder.
      where, expected, remedy: of the error if another process holds it.

    Raises:
      NaloraError: a living process holds it; its host, process id and command are named.
      OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        where: str = "",
        expected: str = "a folder that no other run writes to",
        remedy: str = "wait for that run or stop it, or choose another --output",
    ) -> None:
        """Takes the lock, and starts the thread that touches the file."""
        self.path = path
        self._stop = threading.Event()
        self._lock = FileLock(path, timeout=0, thread_local=False)
        where = where or f"--output {path.parent}"
        while not self._claim(where, expected, remedy):
            pass  # its holder removed the file meanwhile
        threading.Thread(target=self._beat, name="output lock", daemon=True).start()

    def _claim(self, where: str, expected: str, remedy: str) -> bool:
        """Takes the lock, and writes this process into its file.

        Returns:
          True with the lock, False if its holder removed the file meanwhile.

        Raises:
          NaloraError: a living process holds the lock.
        """
        held = _acquire(self.path, self._lock)
        holder = _process_of(self.path)
        with ExitStack() as failure:  # releases the lock unless all succeeds
            failure.callback(self._lock.release)
            if held is False:
                taken = self.path.exists()
            else:
                taken = _is_touched(self.path, holder, held)
            if taken:
                unknown = {"pid": "?", "host": "?", "since": "?", "command": "?"}
                text = "process {pid} on {host} since {since} ({command})"
                raise NaloraError(
                    where,
                    expected=expected,
                    found=text.format_map(unknown | holder),
                    remedy=remedy,
                )
            if held is False or not self.path.exists():
                return False
            with open_unlinked(self.path, "w", encoding="utf-8") as file:
                command = redact(" ".join(sys.argv))[:200]
                process = {"host": socket.gethostname(), "pid": os.getpid()}
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                json.dump(process | {"since": since, "command": command}, file)
            failure.pop_all()
        return True

    def release(self) -> None:
        """Releases the lock; later calls have no effect."""
        if self._stop.is_set():
            return
        self._stop.set()
        # Before the lock is released, so that no other process can have locked this file.
        self.path.unlink(missing_ok=True)
        self._lock.release()

    def _beat(self) -> None:
        """Touches the file at intervals until `release`, to show other hosts that we live."""
        while not self._stop.wait(_BEAT):
            try:
                os.utime(self.path)
            except OSError:
                # the folder is gone or unreachable: the run's writes will raise
                return


def _is_touched(path: Path, holder: dict[str, Any], held: bool | None) -> bool:
    """Returns True if the holder of a file touches it within `_STALE` seconds.

    It is for locks that the kernel does not see: another host's and, if ``held`` is None, all.

    Args:
      path: the lock's file.
      holder: the process that it names.
      held: what `_acquire` returned.
    """
    is_here = holder.get("host") == socket.gethostname()
    if not holder or (held and is_here):
        return False
    until = time.monotonic() + _STALE
    with suppress(FileNotFoundError):  # the other host has released its lock
        touched = path.stat().st_mtime_ns
        while time.monotonic() < until and not _is_old(path):
            time.sleep(0.2)
            if path.stat().st_mtime_ns != touched:
                return True
    return False


def _is_old(path: Path) -> bool:
    """Returns True if a file has not been touched for a day.

    A day is far more than the difference between the clocks of two hosts.
    """
    return time.time() - path.stat().st_mtime > _ABANDONED


def _process_of(path: Path) -> dict[str, Any]:
    """Returns the process that a lock's file names: ``host``, ``pid``, ``since`` and ``command``.

    It is empty if the file is missing or damaged.
    """
    try:
        return dict(json.loads(path.read_bytes()[:_OWNER_BYTES]))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


# ---------------------------------------------------------------- folders of this process


@contextmanager
def own_folder(folder: Path, where: str = "") -> Iterator[None]:
    """Makes a folder, or takes it over from a process that has ended, and removes it at the end.

    Args:
      folder: for this process alone; `RunLock` locks it.
      where: the output in the error if another process has it.

    Raises:
      NaloraError: a living process has it.
      OSError: it cannot be written, or has files of another program.
    """
    owner = folder / _OWNER
    folder.mkdir(exist_ok=True)
    if not owner.exists() and any(folder.iterdir()):
        raise FileExistsError(
            errno.EEXIST, "it has files of another program", str(folder)
        )
    remedy = f"wait for it, or choose another name; if it has ended, remove {folder}"
    lock = RunLock(owner, where, "a name that no other process writes", remedy)
    try:
        _empty(folder)
        yield
    finally:
        _empty(folder)
        lock.release()  # last: by its file, a later process finds what this one has not removed
        with suppress(OSError):  # another process has already taken it
            folder.rmdir()


def _empty(folder: Path) -> None:
    """Removes all files and folders in ``folder`` except the lock's."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _OWNER:
            path.unlink(missing_ok=True)


def remove_abandoned(parent: Path, suffix: str) -> None:
    """Removes the folders ``parent/.*<suffix>`` of `own_folder` whose processes have ended.

    A process of another host counts as ended if it has not touched its file for a day. Folders of
    other programs and users are left alone.
    """
    for owner in parent.glob(f".*{suffix}/{_OWNER}"):
        with suppress(OSError, NaloraError):
            if _process_of(owner).get("host") == socket.gethostname() or _is_old(owner):
                # It takes the folder over, and removes it.
                with own_folder(owner.parent):
                    pass


@contextmanager
def scratch_folder(parent: Path, suffix: str) -> Iterator[Path]:
    """Yields a temporary folder in ``parent`` and removes it at the end.

    It first removes those of killed processes with the same ``suffix``.
    """
    remove_abandoned(parent, suffix)
    folder = parent / f".{secrets.token_hex(8)}{suffix}"
    with own_folder(folder):
        scratch = folder / "files"
        scratch.mkdir(0o700)
        yield scratch
