"""Sums over a batch: which positions of a row are sampled, and which shards add up their rows.

A sum over a batch that the mesh splits needs a reduction over devices, and inside a loop over
layers it needs one per layer. Sums by shard need none there: they leave the loops with an axis
``[shards]`` and are summed once after the last layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from nalora_jax.ops.shardings import RowSharding, mesh_axes, mesh_sharding, ways

SAMPLED_RUN = 8  # positions that are taken together if only some are sampled


def count(rows: RowSharding) -> int:
    """Returns the number of shards of arrays ``[batch, ...]``; 1 without a sharding."""
    if rows is None or not rows.spec:
        return 1
    return ways(rows.mesh, mesh_axes(rows.spec[0]))


def append_zeros(x: Array, count: int, axis: int) -> Array:
    """Returns ``x`` with ``count`` zeros at the end of an axis."""
    if not count:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count)
    return jnp.pad(x, widths)


def split_tiles(x: Array, tiles: int) -> Array:
    """Returns ``[tiles, batch, tile, ...]`` of ``[batch, seq, ...]``, padded with zeros."""
    batch, seq, *rest = x.shape
    tile = -(-seq // tiles)
    padded = append_zeros(x, tiles * tile - seq, 1)
    return jnp.moveaxis(padded.reshape(batch, tiles, tile, *rest), 1, 0)


def join_tiles(x: Array, seq: int) -> Array:
    """Computes the inverse of `split_tiles`."""
    tiles, batch, tile, *rest = x.shape
    rows = jnp.moveaxis(x, 0, 1).reshape(batch, tiles * tile, *rest)
    return rows[:, :seq]


def sum_by_shard(sums: Callable[..., Any], rows: RowSharding, *arrays: Any) -> Any:
    """Returns ``sums(*arrays)`` for the rows of each shard of arrays ``[batch, ...]`` with the
    sharding ``rows``.

    Rows of zeros, whose sums must be zeros, are appended if the shards do not divide the batch. The
    sums have a leading axis ``[shards]`` unless there is one shard.

    Example: 8 rows over 4 shards, ``sums=lambda z: {"total": z.sum((0, 1))}``
      z [8, seq, d_ff] -> [4, 2, seq, d_ff] -> {"total": [4, d_ff]}
    """
    shards = count(rows)
    if shards == 1:
        return sums(*arrays)

    def parted(x: Array) -> Any:
        """Returns ``[shards, rows of a shard, ...]`` of ``[batch, ...]``."""
        x = append_zeros(x, -x.shape[0] % shards, 0)
        return pin_to_shards(x.reshape(shards, -1, *x.shape[1:]), rows)

    parts = jax.tree.map(parted, arrays)
    return pin_to_shards(jax.vmap(sums)(*parts), rows)


def pin_to_shards(tree: Any, rows: RowSharding, axis: int = 0) -> Any:
    """Returns ``tree`` with a sharding of the axis ``[shards]``; the compiler places all other
    axes."""
    if rows is None or count(rows) == 1:
        return tree

    def pin(x: Array) -> Array:
        """Returns an array with the axis ``[shards]`` split over the mesh."""
        spec: list[Any] = [P.UNCONSTRAINED] * x.ndim
        spec[axis] = rows.spec[0]
        return lax.with_sharding_constraint(x, mesh_sharding(rows, *spec))

    return jax.tree.map(pin, tree)


def first_alone(value: Array, rows: RowSharding) -> Array:
    """Returns sums of a whole batch, ``[...]``, as sums by shard, ``[shards, ...]``: all in the
    first shard, zeros in the others.

    They are unchanged if there is one shard.
    """
    shards = count(rows)
    if shards == 1:
        return value
    zeros = jnp.zeros((shards, *value.shape), value.dtype)
    alone: Array = pin_to_shards(zeros.at[0].set(value), rows)
    return alone


# ---------------------------------------------------------------- positions


def sample_positions(
    x: Array, weights: Array, stride: int, run: int = SAMPLED_RUN
) -> Array:
    """Returns one in ``stride`` positions of every row, with real tokens preferred to padding.

    Positions are taken in runs of 8, one of every ``stride`` runs: the run with most real tokens,
    or the middle one in a full row. If groups of ``8 stride`` do not divide the length, single
    positions are taken: the first real one of every ``stride``. The choice depends on the row
    alone, so a row counts the same in any batch.

    A TPU tile has 8 positions, so a run is read without its neighbours. Single positions would read
    the whole array and write a copy: for two strides 3% of the HBM traffic of a LoRA step.

        stride 2, 32 real positions                    8 to 15 and 24 to 31
        stride 2, 32 positions, the first 6 real       0 to 7 and 24 to 31 (whose weights are 0)
        stride 2, 6 real positions                     0, 2, 4

    Returns ``[..., taken, n]`` of ``[..., positions, n]``; weights ``[..., positions]`` are 0 for
    padding.
    """
    chex.assert_equal_shape_prefix([x, weights], weights.ndim)
    if stride == 1:
        return x
    run, groups = _grouping(weights.shape[-1], stride, run)
    chosen = _chosen(weights, stride, run)
    missing = groups * stride * run - weights.shape[-1]
    x = append_zeros(x, missing, -2)
    # [..., groups, stride, run, n], of which one of every stride
    x = x.reshape(*x.shape[:-2], groups, stride, run, x.shape[-1])
    index = chosen[..., None, None, None]  # [..., groups, 1, 1, 1]
    runs = jnp.take_along_axis(x, index, axis=-3, mode="promise_in_bounds")
    return runs.reshape(*weights.shape[:-1], groups * run, x.shape[-1])


def sampled_weights(weights: Array, stride: int) -> Array:
    """Returns float32 ``weights [..., positions]``, 0 at positions that are not sampled."""
    if stride == 1:
        return weights.astype(jnp.float32)
    run, groups = _grouping(weights.shape[-1], stride, SAMPLED_RUN)
    # [..., groups, stride]
    mask = jax.nn.one_hot(_chosen(weights, stride, run), stride, dtype=bool)
    mask = mask.reshape(*weights.shape[:-1], groups * stride)
    mask = jnp.repeat(mask, run, axis=-1)[..., : weights.shape[-1]]
    return jnp.where(mask, weights.astype(jnp.float32), 0.0)


def _grouping(length: int, stride: int, run: int) -> tuple[int, int]:
    """Returns how many positions are taken together, and the number of groups in a row.

    Positions are taken one by one if groups of ``stride`` runs do not divide the length.
    """
    if length % (run * stride):
        run = 1
    return run, -(-length // (stride * run))


def _chosen(weights: Array, stride: int, run: int) -> Array:
    """Returns the index of the run that is taken in each group, int32 ``[..., groups]``."""
    groups = -(-weights.shape[-1] // (stride * run))
    real = lax.stop_gradient(weights) > 0
    real = append_zeros(real, groups * stride * run - weights.shape[-1], -1)
    by_run = real.reshape(*weights.shape[:-1], groups, stride, run)
    counts = jnp.sum(by_run, axis=-1, dtype=jnp.int32)  # [..., groups, stride]
    # Among runs with as many real tokens, the middle one is taken; of single positions the first.
    middle = stride // 2 if run > 1 else 0
    preferred = jnp.arange(stride, dtype=jnp.int32) == middle
    ranks = 2 * counts + jnp.broadcast_to(preferred, counts.shape).astype(jnp.int32)
    return jnp.argmax(ranks, axis=-1).astype(jnp.int32)
