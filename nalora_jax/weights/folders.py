"""Output folders that appear complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nalora_jax.errors import NaloraError


@contextmanager
def new_folder(
    folder: str | Path, *, replaces: Collection[str] = (), overwrite: bool = False
) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to ``folder`` if the block succeeds.

    Args:
      folder: must not exist or be empty, unless ``overwrite`` allows more.
      replaces: names of files, relative to ``folder``, that it may contain with ``overwrite``. Any
        other content raises an error, since it was written by another program or user.
      overwrite: replace a folder that contains such files completely.

    Raises:
      NaloraError: the folder has other content, or the file system refused (a full disk, no
        permission). The temporary folder is removed, and ``folder`` stays as it was.
    """
    target = Path(folder)
    _check_free(target, replaces, overwrite=overwrite)
    with _scratch(target) as scratch:
        scratch.chmod(0o755)  # the rename keeps mkdtemp's 0700
        yield scratch
        for path in scratch.iterdir():
            if path.is_file():
                path.chmod(0o644)  # safetensors makes private files; others may need access
        _move(scratch, target)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file name; the file is renamed to ``path`` if the block succeeds.

    Raises:
      NaloraError: ``path`` exists, or the file system refused. Temporary files are removed.
    """
    target = Path(path)
    if os.path.lexists(target):
        expected, remedy = "a new file", "choose another name"
        raise NaloraError(str(target), expected=expected, found="an existing one", remedy=remedy)
    with _scratch(target) as scratch:
        yield scratch / target.name
        (scratch / target.name).rename(target)


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """Yields a temporary folder next to ``target`` and removes it at the end.

    File system errors become a `NaloraError`.
    """
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield scratch
    except (OSError, SafetensorError) as error:  # safetensors' writer wraps the system's errors
        raise NaloraError(
            str(target),
            expected="a place that can be written",
            found=getattr(error, "strerror", None) or str(error),
            remedy="free some space or choose another folder; nothing was left behind",
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def can_exist(path: Path) -> bool:
    """Returns True if the system accepts ``path``; it may not if a name exceeds 255 bytes."""
    try:
        path.exists()
    except OSError:
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON with sorted keys, like PEFT and transformers."""
    path.write_text(
        json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _check_free(target: Path, replaces: Collection[str], *, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        remedy = "choose another name"
        raise NaloraError(str(target), expected="a new folder", found="a file or a link", remedy=remedy)
    foreign = sorted(name for name in _entries(target) if name not in replaces or not overwrite)
    if foreign:
        raise NaloraError(
            str(target),
            expected="a new or empty folder",
            found=f"one that holds {', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}",
            remedy="choose another folder, or empty this one yourself",
        )


def _entries(folder: Path) -> Iterator[str]:
    """Yields names of files in a folder and its subfolders.

    Empty folders and deeper folders are listed with a slash at the end.
    """
    for path in folder.iterdir():
        below = []
        if path.is_dir() and not path.is_symlink():
            below = list(path.iterdir())
        for each in below or [path]:
            yield each.relative_to(folder).as_posix() + ("/" if each.is_dir() else "")


def _move(scratch: Path, target: Path) -> None:
    """Renames ``scratch`` to ``target``; an old folder there is moved aside and removed last."""
    if not target.exists():
        scratch.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(aside / target.name)
    try:
        scratch.rename(target)
    except OSError:
        (aside / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
