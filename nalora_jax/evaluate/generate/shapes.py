"""Array sizes rounded up to a few values, so that few prompt lengths need a new program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common.axes import BATCH_AXES
from nalora_jax.errors import NaloraError

# Place in a row without a token.
GAP = -1


def bucket(size: int, *, minimum: int = 1, multiple: int = 1) -> int:
    """Returns the smallest number of the form ``2^n`` or ``3 * 2^n`` that is at least ``size``.

    At most a third of the result is padding.

    Args:
      size: minimum result.
      minimum: smallest bucket.
      multiple: divisor of the result (the number of shards).

    Example:
      >>> [bucket(n) for n in (1, 5, 7, 40, 65, 100)]
      [1, 6, 8, 48, 96, 128]
    """
    size = max(size, minimum, 1)
    rounded = 1 << (size - 1).bit_length()  # the next power of two
    if rounded >= 4 and size <= rounded * 3 // 4:
        rounded = rounded * 3 // 4
    return -(-rounded // multiple) * multiple


def padded_length(size: int, *, minimum: int, chunk: int = 0) -> int:
    """Returns ``size`` rounded up to a `bucket`; with ``chunk``, to a multiple at most 1/8 larger.

    Example:
      >>> padded_length(40, minimum=16), padded_length(50_000, minimum=16, chunk=2048)
      (48, 51200)
    """
    if not chunk:
        return bucket(size, minimum=minimum)
    eighth = (1 << (size.bit_length() - 1)) // 8
    step = chunk * max(eighth // chunk, 1)
    return -(-size // step) * step


def padded_rows(
    ids: Sequence[Sequence[int]], batch: int, *, chunk: int = 0, uncut: int | None = None
) -> dict[str, np.ndarray]:
    """Returns ``tokens``, padded on the right, and ``lengths`` of a batch; spare rows have one token.

    See `padded_length` for ``chunk``. Runs of the token ``uncut`` are not divided among chunks.
    """
    if chunk and uncut is not None:
        ids = [_with_uncut_runs(row, uncut, chunk) for row in ids]
    tokens = np.zeros((batch, padded_length(max(map(len, ids)), minimum=16, chunk=chunk)), np.int32)
    for row, values in enumerate(ids):
        tokens[row, : len(values)] = values
    return {"tokens": tokens, "lengths": np.array([*map(len, ids), *[1] * (batch - len(ids))], np.int32)}


def _with_uncut_runs(ids: Sequence[int], token: int, chunk: int) -> list[int]:
    """Returns ``ids`` with gaps (`GAP`), so that no run of ``token`` crosses a multiple of ``chunk``.

    Raises:
      NaloraError: a run is longer than a chunk.

    Example:
      >>> _with_uncut_runs([5, 5, 7, 7, 7, 5], 7, 4)
      [5, 5, -1, -1, 7, 7, 7, 5]
    """
    row: list[int] = []
    for is_run, values in groupby(ids, key=lambda value: value == token):
        run = list(values)
        left = -len(row) % chunk
        if is_run and len(run) > chunk:
            expected = f"at least {len(run)}, the image tokens that see each other"
            raise NaloraError("prefill_chunk", expected=expected, found=chunk, remedy="use larger chunks")
        if is_run and len(run) > left:
            row += [GAP] * left
        row += run
    return row


def batch_shards(mesh: Mesh | None) -> int:
    """Returns the number of parts into which the mesh splits a batch."""
    if mesh is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in _batch_axes(mesh))


def place_batch(tree: Any, mesh: Mesh | None) -> Any:
    """Returns host arrays ``[batch, ...]`` placed on the mesh; without a mesh, unchanged."""
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, P(_batch_axes(mesh))))


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
