"""Files and folders: opened without following links, written completely or not at all.

Other users may be able to write to an output folder as well; through a planted link we would
overwrite a file of our user.
"""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from etils import epath

from nalora_jax.errors import NaloraError

# Errors of open(2) with O_NOFOLLOW: of Linux and macOS, and of FreeBSD.
_LINKED = (errno.ELOOP, errno.EMLINK)

if TYPE_CHECKING:
    import numpy as np


def open_unlinked(path: str | Path, mode: str, encoding: str | None = None) -> IO[Any]:
    """Opens a file of an output folder, as `open` does, unless its name is a symbolic link.

    Other users may be able to write to the folder; through a planted link we would overwrite a file
    of our user.

    Raises:
      NaloraError: the name is a symbolic link.
      OSError: the system refused.
    """
    return open(path, mode, encoding=encoding, opener=open_descriptor)


def open_descriptor(path: str | Path, flags: int) -> int:
    """Returns a file descriptor, as `os.open` does; raises as `open_unlinked`."""
    try:
        # 0: systems without the flag open the link
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if error.errno in _LINKED:
            refuse_link(Path(path), "a file")
        raise


def refuse_link(path: Path, expected: str) -> None:
    """Raises a NaloraError if ``path``, of an output folder, is a symbolic link.

    ``expected`` says in the message what it should be.
    """
    if path.is_symlink():
        remedy = "links in an output folder are not followed: remove it, or choose another folder"
        raise NaloraError(
            str(path), expected=expected, found="a symbolic link", remedy=remedy
        )


def refuse_linked_folders(folder: Path) -> None:
    """Raises an error if a symbolic link in an output folder leads to anything but a file.

    Example: through a planted link ``checkpoints``, we would delete old checkpoints of another run.

    Raises:
      NaloraError: it names the link.
    """
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        if not entry.is_file():
            refuse_link(entry, "a folder")


def make_unlinked_folder(folder: Path) -> Path:
    """Creates a folder in an output folder, unless it exists; raises as `refuse_linked_folders`."""
    refuse_link(folder, "a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def refuse_link_out(folder: Path, name: str | Path) -> None:
    """Raises an error if a file of a model's folder is a link that leaves the folder.

    The folder may come from a stranger. Example: through a link ``merges.txt -> ../id_rsa``, the
    key would become a file of the merged model. In the hub's cache, files of
    ``snapshots/REVISION`` are links to ``blobs`` of the same repository.

    Args:
      folder: of the model.
      name: of the file, relative to ``folder``.

    Raises:
      NaloraError: it names the link and its target.
    """
    # Not Path.resolve, which raises an error for a link to itself.
    home = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(folder / name))
    blobs = home
    if home.parent.name == "snapshots":
        blobs = home.parents[1] / "blobs"
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise NaloraError(
            str(folder / name),
            expected="a file of that folder",
            found=f"a link to {target}",
            remedy="if the folder is your own, replace the link by a copy of its file",
        )


def expand_user(path: str | Path) -> Path:
    """Returns ``path`` with a leading ``~`` expanded; unchanged if ``~name`` is an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


@contextmanager
def name_file_in_errors(path: str | Path) -> Iterator[None]:
    """Adds ``path`` to an `OSError` of the block that names no file.

    An example is the error of a write on a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def move_tree(folder: Any, target: Any) -> None:
    """Moves a folder within its file system or bucket, and replaces ``target``.

    In a bucket the files are copied one by one, and then removed.
    """
    source = epath.Path(folder)
    sink = epath.Path(target)
    sink.rmtree(missing_ok=True)
    if "://" not in str(sink):
        sink.parent.mkdir(parents=True, exist_ok=True)
        source.rename(sink)
        return
    for name in list(names_below(source)):
        (source / name).copy(sink / name, overwrite=True)
    source.rmtree()


def write_array(path: Path, array: np.ndarray) -> None:
    """Saves an array like `numpy.save`, which however ignores a full disk in its last flush.

    Raises:
      OSError: the system refused; it names the file, which may be truncated.
    """
    import numpy as np  # not earlier: the command line reads this module before its options

    buffer = io.BytesIO()
    np.save(buffer, array)
    with name_file_in_errors(path):
        path.write_bytes(buffer.getbuffer())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the file ``path`` by ``content`` in one step; text is written in UTF-8.

    Other processes read the old file or the new one. A symbolic link at ``path`` is itself
    replaced.

    Raises:
      NaloraError: the system refused (a full disk, no permission); ``path`` is unchanged.
    """
    if isinstance(content, str):
        # A lone surrogate, of a log that was edited, must not end a run's report.
        content = content.encode(errors="backslashreplace")
    try:
        with scratch_file(path) as file:
            file.write(content)
    except OSError as error:
        raise NaloraError(
            str(path),
            expected="a file that can be written",
            found=error.strerror or error,
            remedy="make room or choose another place; nothing of it was written",
        ) from error


@contextmanager
def scratch_file(target: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file that becomes ``target`` at the end of the block.

    After an error it is removed.
    """
    with (
        name_file_in_errors(target),
        tempfile.NamedTemporaryFile(
            dir=target.parent, prefix=".", delete=False
        ) as file,
    ):
        scratch = Path(file.name)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            scratch.chmod(0o666 & ~umask)  # temporary files are private
            scratch.replace(target)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def names_below(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Yields the paths of all files in ``folder``, of a file system or a bucket, relative to it."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from names_below(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name
