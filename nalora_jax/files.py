"""Files that are whole: written in one step or not at all, and found out where something changed them afterwards.

A folder carries its own list, ``digests.json``, one entry a file below it:

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

from nalora_jax.errors import NaloraError

DIGESTS = "digests.json"
_BLOCK = 1 << 20  # bytes read at once


def file_digest(path: Any, start: int = 0) -> str:
    """SHA-256 of a file's bytes from ``start`` on, in hexadecimal."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        file.seek(start)
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_digests(folder: Any) -> None:
    """Write ``folder/digests.json`` for all files that lie below ``folder`` now."""
    root = epath.Path(folder)
    listed = {name: file_digest(root / name) for name in sorted(names_below(root)) if name != DIGESTS}
    (root / DIGESTS).write_text(json.dumps(listed, indent=0))


def find_damage(folder: Any) -> str | None:
    """What differs from ``folder/digests.json``, in a few words; None where nothing does.

    Raises:
      FileNotFoundError: the folder has no list.
    """
    root = epath.Path(folder)
    text = (root / DIGESTS).read_bytes()
    try:
        listed = dict(json.loads(text))
    except (ValueError, TypeError):
        return f"{DIGESTS} is damaged itself"
    present = set(names_below(root))
    for name, digest in listed.items():
        if name not in present:
            return f"{name} is missing"
        if file_digest(root / name) != digest:
            return f"{name} is not what was written"
    return None


def remove_tree(folder: Any) -> None:
    """Remove a folder, of a file system or a bucket, with all that is in it; one that is not there is no error."""
    epath.Path(folder).rmtree(missing_ok=True)


def move_tree(folder: Any, target: Any) -> None:
    """Move a folder within its file system or bucket, in place of what is at ``target``; in a bucket file by file."""
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
    """`numpy.save` that fails where the disk is full; numpy's own says nothing if its last flush does.

    Raises:
      OSError: the system refused; the file may be cut off.
    """
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getbuffer())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content`` (text in UTF-8) in one step: readers see the old file or the new, never a half.

    Raises:
      NaloraError: the system refused (a full disk, no permission); ``path`` is what it was.
    """
    scratch: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        scratch = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
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
    """Paths of the files below ``folder``, of a file system or a bucket, relative to it."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from names_below(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name
