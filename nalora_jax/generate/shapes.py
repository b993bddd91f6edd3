"""Array sizes rounded up to a few values, so that few prompt lengths need a new program."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Mesh axes that split the rows of a batch.
_BATCH_AXES = ("data", "fsdp")


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
    power = 1 << (size - 1).bit_length()  # the next power of two
    rounded = power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power
    return -(-rounded // multiple) * multiple


def batch_shards(mesh: Mesh | None) -> int:
    """Returns the number of parts into which the mesh splits a batch."""
    count = 1
    for axis in _batch_axes(mesh):
        assert mesh is not None
        count *= mesh.shape[axis]
    return count


def place_batch(tree: Any, mesh: Mesh | None) -> Any:
    """Returns host arrays, whose leading axis is the batch, placed on the mesh; without a mesh, unchanged."""
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, P(_batch_axes(mesh))))


def _batch_axes(mesh: Mesh | None) -> tuple[str, ...]:
    return () if mesh is None else tuple(axis for axis in _BATCH_AXES if axis in mesh.axis_names)
