"""Snapshots of interrupted runs: arrays and notes in one file, ignored if it is incomplete."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nalora_jax.common.digests import digest_of
from nalora_jax.common.files import open_unlinked
from nalora_jax.errors import NaloraError

log = logging.getLogger(__name__)

_DIGEST = 64  # hexadecimal digits of a sha256, at the start of the file


class Snapshot(NamedTuple):
    """State of a run at an evaluation."""

    arrays: dict[str, np.ndarray]
    notes: dict[str, Any]


def write_snapshot(path: Path, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> None:
    """Replaces the file atomically, by a rename after its content is synced to the disk.

    Raises:
      NaloraError: the system refused, e.g. because the disk is full; an earlier snapshot stays.
    """
    buffer = io.BytesIO()
    entries: dict[str, Any] = {f"array/{name}": value for name, value in arrays.items()}
    np.savez(buffer, notes=np.array(json.dumps(notes)), **entries)
    content, scratch = buffer.getvalue(), path.with_suffix(".new")
    try:
        with open_unlinked(scratch, "wb") as file:
            file.write(digest_of(content).encode() + content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise NaloraError(
            str(path), expected="to write a snapshot", found=error, remedy="make room"
        ) from error


def read_snapshot(path: Path) -> Snapshot | None:
    """Returns the snapshot; None if there is none, or with a warning if the file is damaged."""
    if not path.exists():
        return None
    content = path.read_bytes()
    if digest_of(content[_DIGEST:]).encode() != content[:_DIGEST]:
        log.warning("  the snapshot %s is damaged: the run starts from scratch", path.name)
        return None
    with np.load(io.BytesIO(content[_DIGEST:])) as saved:
        arrays = {name.removeprefix("array/"): saved[name] for name in saved.files if name != "notes"}
        return Snapshot(arrays, json.loads(str(saved["notes"])))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
