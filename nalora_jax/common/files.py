"""Writes files completely or not at all, and detects later changes by digests.

The file ``digests.json`` of a folder has one entry per file in it:

    {"metadata": "9f86d081884c7d65...", "d/1f0a...": "60303ae22b998861..."}
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from nalora_jax.common.paths import naming
from nalora_jax.errors import NaloraError

DIGESTS = "digests.json"
_BLOCK = 1 << 20  # bytes read at once


def file_digest(path: Any, start: int = 0) -> str:
    """Returns the SHA-256, in hexadecimal, of a file's bytes starting at ``start``."""
    with epath.Path(path).open("rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Saves an array like `numpy.save`, which however ignores a full disk in its last flush.

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
    if isinstance(content, str):
        # A lone surrogate, of a log that was edited, must not end a run's report.
        content = content.encode(errors="backslashreplace")
    scratch: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        scratch = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o666 & ~umask)  # mkstemp makes private files
        scratch.replace(path)
    except OSError as error:
        expected, actual = "a file that can be written", error.strerror or error
        remedy = "make room or choose another place; nothing of it was written"
        raise NaloraError(str(path), expected=expected, found=actual, remedy=remedy) from error
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
