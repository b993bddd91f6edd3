"""A lock file that names the process that writes to a folder.

The kernel releases a process's lock on the file when the process ends for any reason, so that no
stale lock remains on one host. On storage shared between hosts, the kernel may not see locks of
other hosts. So the holder also touches the file every 5 seconds. A process that reads another
host's name in the file watches it for 20 seconds, and takes the lock over if it is not touched.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nalora_jax.common.paths import open_descriptor
from nalora_jax.common.redaction import redacted
from nalora_jax.errors import NaloraError

FILE = "run.lock"
_BEAT = 5.0  # seconds between two touches
_STALE = 20.0  # seconds without a touch after which a holder on another host counts as gone
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)  # file systems without locks


@dataclass
class Lock:
    """The lock of a folder, held by this process."""

    path: Path
    descriptor: int
    _stop: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def acquire(cls, path: Path) -> Lock:
        """Acquires the lock, or takes it over from a process that has ended.

        Raises:
          NaloraError: a living process holds it; its host, process id and command are named.
          OSError: the file cannot be written.
        """
        descriptor = _open_locked(path)
        try:
            _wait_for_other_host(path, descriptor)
            removed = not _is_at(path, descriptor)  # the other host has released its lock meanwhile
            if not removed:
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_own_name()).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        if removed:
            os.close(descriptor)
            return cls.acquire(path)
        lock = cls(path, descriptor)
        threading.Thread(target=lock._beat, name="output lock", daemon=True).start()
        return lock

    def release(self) -> None:
        """Releases the lock; later calls have no effect."""
        if self._stop.is_set():
            return
        self._stop.set()
        # Before the lock is released, so that no other process can have locked this file.
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT):
            try:
                os.utime(self.path)
            except OSError:  # the folder is gone or unreachable: the run's writes will raise
                return


def _open_locked(path: Path) -> int:
    """Opens and locks the file at ``path``; retries if its previous holder removed it meanwhile."""
    while True:
        descriptor = open_descriptor(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                holder = _read(descriptor)
                os.close(descriptor)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise _held(path, holder) from None
                raise
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Returns True if ``path`` is the name of the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _wait_for_other_host(path: Path, descriptor: int) -> None:
    """Raises an error if a holder on another host still touches the file."""
    holder = _read(descriptor)
    if not holder or holder.get("host") == socket.gethostname():
        return
    touched, until = os.fstat(descriptor).st_mtime_ns, time.monotonic() + _STALE
    while time.monotonic() < until:
        time.sleep(0.2)
        # Of the open file: a holder that releases its lock removes the name.
        if os.fstat(descriptor).st_mtime_ns != touched:
            raise _held(path, holder)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 1 << 16, 0))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(holder, dict):
        return {}
    return holder


def _own_name() -> dict[str, Any]:
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
