"""JSON Lines with random access: an index of line starts in memory, the file on disk."""

from __future__ import annotations

import hashlib
import json
import mmap
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.errors import NaloraError


class JsonLines:
    """Objects of a JSON Lines file, by index; blank lines are skipped.

    One pass over the file computes the line offsets and the sha256; memory is 8 bytes a line.

    Args:
      path: path of the file.
      name: name of the file in messages, its path by default.

    Raises:
      NaloraError: on opening, if the file is missing or has no lines.
    """

    def __init__(self, path: str | Path, name: str = "") -> None:
        self.path, self.name = Path(path), name or str(path)
        try:
            self._starts, self._blanks, self.sha256 = _index(self.path)
            if not len(self._starts):
                raise NaloraError(self.name, expected="at least one JSON line", found="an empty file")
            with self.path.open("rb") as handle:
                self._bytes = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            expected, actual = "a readable file of JSON lines", error.strerror or error
            remedy = "check the path"
            raise NaloraError(self.name, expected=expected, found=actual, remedy=remedy) from error

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the object on line ``index``.

        Raises:
          NaloraError: the line is not a JSON object; the message names the line.
        """
        start = int(self._starts[index])
        end = self._bytes.find(b"\n", start)
        try:
            value = json.loads(self._bytes[start : len(self._bytes) if end < 0 else end])
        except (ValueError, RecursionError) as error:  # ValueError: bad JSON or bad UTF-8
            raise NaloraError(
                self.where(index),
                expected="a JSON object",
                found=error,
                remedy="fix or remove this line",
            ) from error
        if not isinstance(value, dict):
            kind = type(value).__name__
            expected, actual = "a JSON object", f"a {kind}"
            remedy = "fix this line"
            raise NaloraError(self.where(index), expected=expected, found=actual, remedy=remedy)
        return value

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns the objects at ``indices``."""
        return [self[index] for index in indices]

    def where(self, index: int) -> str:
        """Returns ``path:line``, with lines counted from 1 as in editors."""
        skipped = int(np.searchsorted(self._blanks, self._starts[index]))
        return f"{self.name}:{range(len(self))[index] + skipped + 1}"


def _index(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns the byte offsets of lines with text and of blank lines, and the file's sha256."""
    starts, blanks, digest, position = array("q"), array("q"), hashlib.sha256(), 0
    with path.open("rb") as handle:
        for line in handle:
            (starts if line.strip() else blanks).append(position)
            position += len(line)
            digest.update(line)
    return np.array(starts, np.int64), np.array(blanks, np.int64), digest.hexdigest()
