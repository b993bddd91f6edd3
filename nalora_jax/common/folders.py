"""Outputs that appear complete or not at all, on a file system or in a bucket.

They are written to a hidden folder next to the output (``.NAME.nalora-partial``), or in the cache
if the output is in a bucket, and moved at the end. A lock shows that the writing process lives: the
next output in the same folder removes the hidden folders of killed processes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from nalora_jax.common import buckets, uploads
from nalora_jax.common.locks import own_folder, remove_abandoned
from nalora_jax.errors import NaloraError

_PARTIAL = ".nalora-partial"
START = "start"  # in the folder of a run: its initial adapters


class RunFolder(Protocol):
    """The folder of a run."""

    @property
    def folder(self) -> Path:
        """The folder."""

    @property
    def resumes(self) -> bool:
        """True if it holds an earlier part of the run, which goes on."""


@contextmanager
def new_folder(
    folder: str | Path, *, replaces: Collection[str] = (), overwrite: bool = False
) -> Iterator[Path]:
    """Yields a temporary folder that becomes ``folder`` if the block succeeds.

    Args:
      folder: a path or the URL of a folder in a bucket. It must not exist or be empty, unless
        ``overwrite`` allows more.
      replaces: names of files, relative to ``folder``, that it may contain with ``overwrite``. Any
        other content raises an error, since it was written by another program or user.
      overwrite: replace a folder that contains such files completely; not in a bucket.

    Raises:
      NaloraError: the folder has other content, another process writes to it, or the file system or
        the bucket refused (a full disk, no permission). The temporary folder is removed, and
        ``folder`` stays as it was.
    """
    where = buckets.bucket_url(folder)
    if where is None:
        target = Path(folder)
        check_free(target, replaces, overwrite=overwrite)
    else:
        target = uploads.stage(where)
    with _hidden_folder(target, where) as hidden:
        scratch = hidden / target.name
        scratch.mkdir()
        scratch.chmod(0o755)  # independent of the umask
        if where is not None:
            with uploads.new_tree(where, scratch):
                yield scratch
            return
        yield scratch
        for path in scratch.iterdir():
            if path.is_file():
                # safetensors makes private files; others may need access
                path.chmod(0o644)
        # another process may have been first
        check_free(target, replaces, overwrite=overwrite)
        _move(scratch, target)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file name; the file becomes ``path`` if the block succeeds.

    ``path`` may be a URL in a bucket.

    Raises:
      NaloraError: ``path`` exists, another process writes it, or the file system or the bucket
        refused. Temporary files are removed.
    """
    where = buckets.bucket_url(path)
    if where is None:
        target = Path(path)
    else:
        target = uploads.stage(where)
        uploads.require_free(where)
    with _hidden_folder(target, where) as hidden:
        _check_new(target)
        yield hidden / target.name
        if where is not None:
            uploads.upload_file(hidden / target.name, where)
        else:
            _check_new(target)  # another process may have been first
            (hidden / target.name).rename(target)


def _check_new(target: Path) -> None:
    """Raises a NaloraError if ``target`` exists, also as a broken link."""
    if os.path.lexists(target):
        raise NaloraError(
            str(target),
            expected="a new file",
            found="an existing one",
            remedy="choose another name",
        )


@contextmanager
def _hidden_folder(target: Path, where: str | None) -> Iterator[Path]:
    """Yields a hidden folder next to ``target``, which no other process has, and removes it last.

    Args:
      target: path of the output, or of its local copy.
      where: URL of the output in a bucket; None for an output on this machine.

    Raises:
      NaloraError: the file system refused, or another process writes the same output.
    """
    hidden = _hidden_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent, _PARTIAL)
        with own_folder(hidden, where or str(target)):
            yield hidden
    # safetensors' writer wraps the system's errors
    except (OSError, SafetensorError) as error:
        if where is None:
            way = " or choose another folder"
        else:
            way = ", or set NALORA_CACHE to another folder"
        raise NaloraError(
            str(target),
            expected="a place that can be written",
            found=getattr(error, "strerror", None) or str(error),
            remedy=f"free some space{way}; nothing was left behind",
        ) from error


def _hidden_name(target: Path) -> Path:
    """Returns the path of the hidden folder in which ``target`` is prepared."""
    return target.parent / f".{target.name}{_PARTIAL}"


def refuse_claimed(target: Path) -> None:
    """Raises a NaloraError if a living process writes to ``target``.

    `new_folder` and `new_file` do so too.
    """
    hidden = _hidden_name(target)
    if hidden.exists():
        # It refuses a folder of another process.
        with own_folder(hidden, str(target)):
            pass


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
        json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )


def check_free(
    target: Path, replaces: Collection[str] = (), *, overwrite: bool = False
) -> None:
    """Raises an error unless ``target`` is new, empty, or has only files that may be replaced."""
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise NaloraError(
            str(target),
            expected="a new folder",
            found="a file or a link",
            remedy="choose another name",
        )
    foreign = sorted(
        name for name in _entries(target) if name not in replaces or not overwrite
    )
    if foreign:
        raise NaloraError(
            str(target),
            expected="a new or empty folder",
            found=f"one that holds {uploads.first_names(foreign)}",
            remedy="choose another folder, or empty this one yourself",
        )


def _entries(folder: Path) -> Iterator[str]:
    """Yields names of files in a folder and its subfolders.

    Empty folders and deeper folders are listed with a slash at the end.
    """
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            below = list(path.iterdir())
        else:
            below = []
        for each in below or [path]:
            name = each.relative_to(folder).as_posix()
            if each.is_dir():
                name += "/"
            yield name


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
