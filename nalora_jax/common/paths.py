"""Opens files of output folders, which other users may write to as well, and makes temporary folders."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from nalora_jax.errors import NaloraError

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
        raise _refusal(path, "a file") from error


def refuse_linked_folders(folder: Path) -> None:
    """Raises an error if an entry of an output folder is a symbolic link, unless it leads to a file.

    Example: through a planted link ``checkpoints``, we would delete old checkpoints of another run.

    Raises:
      NaloraError: it names the link.
    """
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() and not entry.is_file():
            raise _refusal(entry, "a folder")


def make_unlinked_folder(folder: Path) -> Path:
    """Creates a folder in an output folder, unless it exists; raises as `refuse_linked_folders`."""
    if folder.is_symlink():
        raise _refusal(folder, "a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def refuse_link_out(folder: Path, name: str | Path) -> None:
    """Raises an error if a file of a model's folder, which may be a stranger's, is a link that leaves the folder.

    Example: through a link ``merges.txt -> ../id_rsa``, the key would become a file of the merged model. In the hub's
    cache, files of ``snapshots/REVISION`` are links to ``blobs`` of the same repository.

    Args:
      folder: of the model.
      name: of the file, relative to ``folder``.

    Raises:
      NaloraError: it names the link and its target.
    """
    # Not Path.resolve, which raises an error for a link to itself.
    home, target = (Path(os.path.realpath(path)) for path in (folder, folder / name))
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise NaloraError(
            str(folder / name),
            expected="a file of that folder",
            found=f"a link to {target}",
            remedy="if the folder is your own, replace the link by a copy of its file",
        )


def _refusal(path: str | Path, expected: str) -> NaloraError:
    remedy = "links in an output folder are not followed: remove it, or choose another folder"
    return NaloraError(str(path), expected=expected, found="a symbolic link", remedy=remedy)


def expand_user(path: str | Path) -> Path:
    """Returns ``path`` with a leading ``~`` expanded, and ``~name`` of an unknown user unchanged."""
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


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Makes a temporary folder in ``parent`` and removes it at the end; also removes folders of killed processes.

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
