"""Writes files whole or not at all, never through symbolic links, and detects later changes by digests.

The file ``digests.json`` of a folder has one entry per file in it:

    {"metadata": "9f86d081884c7d65...", "d/1f0a...": "60303ae22b998861..."}
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath

from nalora_jax.errors import NaloraError

DIGESTS = "digests.json"
_BLOCK = 1 << 20  # bytes read at once
_ABANDONED = 86_400.0  # seconds without a change after which a folder of another host is removed
_LINKED = (errno.ELOOP, errno.EMLINK)  # of open(2) with O_NOFOLLOW: Linux and macOS, FreeBSD


def open_unlinked(path: str | Path, mode: str, encoding: str | None = None) -> IO[Any]:
    """Opens a file of an output folder, as `open` does, unless its name is a symbolic link.

    Other users may be able to write to the folder; through a planted link we would overwrite a file of our user.

    Raises:
      NaloraError: the name is a symbolic link.
      OSError: the system refused.
    """
    return open(path, mode, encoding=encoding, opener=open_descriptor)


def open_descriptor(path: str | Path, flags: int) -> int:
    """Returns a file descriptor, as `os.open` does; raises as `open_unlinked`."""
    try:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if error.errno not in _LINKED or not Path(path).is_symlink():
            raise
        remedy = "links in an output folder are not followed: remove it, or choose another folder"
        raise NaloraError(str(path), expected="a file", found="a symbolic link", remedy=remedy) from error


def expand_user(path: str | Path) -> Path:
    """Returns ``path`` with a leading ``~`` expanded; that of an unknown user stays, and is no existing file."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Adds ``path`` to an `OSError` of the block that names no file, such as a write's on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def file_digest(path: Any, start: int = 0) -> str:
    """Returns the SHA-256, in hexadecimal, of a file's bytes starting at ``start``."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        file.seek(start)
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_digests(folder: Any) -> None:
    """Writes ``folder/digests.json`` for all files in ``folder`` and its subfolders."""
    root = epath.Path(folder)
    listed = {name: file_digest(root / name) for name in sorted(names_below(root)) if name != DIGESTS}
    (root / DIGESTS).write_text(json.dumps(listed, indent=0))


def find_damage(folder: Any) -> str | None:
    """Describes the first difference from ``folder/digests.json``; returns None without any.

    Raises:
      FileNotFoundError: the folder has no list.
    """
    root = epath.Path(folder)
    text = (root / DIGESTS).read_bytes()
    try:
        listed = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return f"{DIGESTS} is damaged itself"
    present = set(names_below(root))
    for name, digest in listed.items():
        if name not in present:
            return f"{name} is missing"
        if file_digest(root / name) != digest:
            return f"{name} is not what was written"
    return None


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Makes a temporary folder in ``parent`` and removes it at the end, with those of processes that were killed.

    The kernel's lock on a folder shows that its process is alive. Hosts that share storage may not see each other's
    locks: a folder of another host counts as abandoned after a day without a change.
    """
    with _lock(parent):  # so that no other process sees the new folder before it is locked
        _remove_abandoned(parent, prefix)
        scratch = Path(tempfile.mkdtemp(dir=parent, prefix=f"{prefix}{socket.gethostname()}-"))
        held = ExitStack()
        held.enter_context(_lock(scratch))
    with held:
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        with suppress(OSError), _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as free:
            ours = folder.name.startswith(f"{prefix}{socket.gethostname()}-")
            changed = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if (free and ours) or time.time() - changed > _ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Locks a folder for the block; yields False if another process holds it or the file system has no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, how)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def remove_tree(folder: Any) -> None:
    """Removes a folder of a file system or a bucket with its content; does not fail if there is none."""
    epath.Path(folder).rmtree(missing_ok=True)


def move_tree(folder: Any, target: Any) -> None:
    """Moves a folder within its file system or bucket, and replaces ``target``; in a bucket file by file."""
    source, sink = epath.Path(folder), epath.Path(target)
    remove_tree(sink)
    if "://" not in str(sink):
        sink.parent.mkdir(parents=True, exist_ok=True)
        source.rename(sink)
        return
    for name in list(names_below(source)):
        with (source / name).open("rb") as read, (sink / name).open("wb") as write:
            shutil.copyfileobj(read, write, _BLOCK)
    remove_tree(source)


def write_array(path: Path, array: np.ndarray) -> None:
    """Saves an array as `numpy.save` does, which however ignores a full disk in its last flush.

    Raises:
      OSError: the system refused; it names the file, which may be truncated.
    """
    buffer = io.BytesIO()
    np.save(buffer, array)
    with naming(path):
        path.write_bytes(buffer.getbuffer())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces ``path`` by ``content`` (text in UTF-8) in one step: readers see the old file or the new one.

    A symbolic link at ``path`` is itself replaced.

    Raises:
      NaloraError: the system refused (a full disk, no permission); ``path`` is unchanged.
    """
    scratch: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        scratch = Path(name)
        with os.fdopen(handle, "wb") as file:
            # A lone surrogate, of a log that was edited, must not end a run's report.
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o666 & ~umask)  # mkstemp makes private files
        scratch.replace(path)
    except OSError as error:
        raise NaloraError(
            str(path),
            expected="a file that can be written",
            found=error.strerror or error,
            remedy="make room or choose another place; nothing of it was written",
        ) from error
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def names_below(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Yields the paths of all files in ``folder``, of a file system or a bucket, relative to it."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from names_below(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name
