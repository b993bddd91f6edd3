"""Sums over the rows of a batch that every shard makes of its own rows.

A sum over a batch that the mesh splits needs a reduction over devices, and one in a loop over layers needs it in every
layer. Sums by shard need none: they leave the loops with an axis ``[shards]``, which is summed once, behind them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def count(rows: NamedSharding | None) -> int:
    """Shards of arrays ``[batch, ...]`` that are laid out like this; 1 without a layout."""
    axes = None if rows is None or not rows.spec else rows.spec[0]
    if rows is None or axes is None:
        return 1
    return math.prod(rows.mesh.shape[name] for name in ((axes,) if isinstance(axes, str) else axes))


def by_shard(sums: Callable[..., Any], rows: NamedSharding | None, *arrays: Any) -> Any:
    """``sums(*arrays)`` of each shard's rows apart.

    Args:
      sums: maps arrays ``[rows, ...]`` to sums over rows; those of rows of zeros must be zeros.
      rows: where arrays ``[batch, ...]`` live. Where the shards don't divide the batch, rows of zeros fill it up.
      arrays: trees of arrays ``[batch, ...]``.

    Returns:
      What ``sums`` returns, every array with a leading axis ``[shards]``; if there is one shard, without it.

    Example: 8 rows over 4 shards, ``sums=lambda z: {"total": z.sum((0, 1))}``
      z [8, seq, d_ff] -> [4, 2, seq, d_ff] -> {"total": [4, d_ff]}
    """
    if count(rows) == 1:
        return sums(*arrays)
    parts = jax.tree.map(partial(_parted, rows=rows), arrays)
    return pinned(jax.vmap(sums)(*parts), rows)


def pinned(tree: Any, rows: NamedSharding | None, axis: int = 0) -> Any:
    """``tree`` with the axis ``[shards]`` of its arrays laid out; all other axes are the compiler's choice."""
    if rows is None or count(rows) == 1:
        return tree

    def pin(x: Array) -> Array:
        spec: list[Any] = [P.UNCONSTRAINED] * x.ndim
        spec[axis] = rows.spec[0]
        return lax.with_sharding_constraint(x, NamedSharding(rows.mesh, P(*spec)))

    return jax.tree.map(pin, tree)


def first_alone(value: Array, rows: NamedSharding | None) -> Array:
    """Sums of a whole batch, ``[...]``, as those of the first shard: ``[shards, ...]``, zero but for its first."""
    shards = count(rows)
    if shards == 1:
        return value
    alone: Array = pinned(jnp.zeros((shards, *value.shape), value.dtype).at[0].set(value), rows)
    return alone


def _parted(x: Array, rows: NamedSharding | None) -> Array:
    """``[batch, ...]`` -> ``[shards, batch / shards, ...]``."""
    shards = count(rows)
    missing = -x.shape[0] % shards
    x = jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]) if missing else x
    parted: Array = pinned(x.reshape(shards, -1, *x.shape[1:]), rows)
    return parted
