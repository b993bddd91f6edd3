"""Rows whose tokens are split over the mesh axis "context".

A row is divided into two blocks of tokens per shard. Shard i of n has the blocks i and 2 n - 1 - i,
an early and a late one, so that causal attention has the same work on every shard. The shards'
parts are rows of an array whose first axis is split over all axes that split tokens, so that only
functions along a row need to know of the split.

    row    [batch, seq]              blocks 0 1 2 3, for 2 shards
    parts  [2 * batch, 2 * block]    blocks 0 3 of every row, then blocks 1 2 of every row

Functions below "within a shard" are called in `jax.shard_map` with a mapped axis "context".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nalora_jax.common.devices import BATCH_AXES, CONTEXT
from nalora_jax.errors import NaloraError
from nalora_jax.ops.reductions import append_zeros
from nalora_jax.ops.shardings import RowSharding, mesh_sharding

_ALIGNED = 128  # blocks of at least this length are multiples of it, as kernels need


class Row(NamedTuple):
    """Integers of whole rows, padded to whole blocks; every shard has all of its rows' tokens."""

    positions: Array  # int [batch, seq]
    segments: Array  # int [batch, seq]
    starts: Array | None = (
        None  # int [batch, seq], see `nalora_jax.ops.attention.attention`
    )

    def slices(self, ahead: int) -> Row:
        """Returns the integers of this shard's blocks and of the ``ahead`` tokens before each.

        Within a shard. The result is ``[2 * batch, ahead + block]``, each row followed by its late
        block; before the start of a row the segment is -1.
        """
        block = self.positions.shape[1] // (2 * lax.axis_size(CONTEXT))

        def of_blocks(x: Array, fill: int) -> Array:
            """Returns ``[2 * batch, ahead + block]``; ``fill`` is the value before a row's
            start."""
            padded = jnp.pad(x, ((0, 0), (ahead, 0)), constant_values=fill)
            size = ahead + block
            slices = [
                lax.dynamic_slice_in_dim(padded, i * block, size, 1)
                for i in block_numbers()
            ]
            # [batch, 2, size] -> [2 * batch, size]
            return jnp.stack(slices, axis=1).reshape(-1, size)

        starts = self.starts
        if starts is not None:
            starts = of_blocks(starts, 0)
        return Row(of_blocks(self.positions, 0), of_blocks(self.segments, -1), starts)


def shards_of(sharding: RowSharding) -> int:
    """Returns the number of parts of a row of arrays with this sharding; 1 if rows are whole."""
    if sharding is None or not sharding.spec or CONTEXT not in (sharding.spec[0] or ()):
        return 1
    return int(sharding.mesh.shape[CONTEXT])


def whole_row_sharding(sharding: RowSharding) -> RowSharding:
    """Returns the sharding of whole rows for a sharding of their parts."""
    if sharding is None or shards_of(sharding) == 1:
        return sharding
    return mesh_sharding(sharding, BATCH_AXES)


def block_length(seq: int, shards: int) -> int:
    """Returns the tokens of a block; rows are padded at their end to whole blocks.

    Every shard has two blocks. Blocks of `_ALIGNED` tokens or more are rounded up to its
    multiples; shorter ones, which no kernel takes, are not.

    Raises a NaloraError if a row has fewer tokens than blocks.
    """
    blocks = 2 * shards
    if seq < blocks:
        most = max(seq // 2, 1)
        raise NaloraError(
            "--mesh.context",
            expected=f"at most {most} for rows of {seq} tokens (two blocks of tokens a device)",
            found=shards,
            remedy="use longer rows (--data.max-length), or --mesh.fsdp for these devices",
        )
    block = -(-seq // blocks)
    if block < _ALIGNED:
        return block
    return -(-block // _ALIGNED) * _ALIGNED


def pad_to_blocks(x: Array, sharding: RowSharding) -> Array:
    """Returns rows ``[batch, seq, ...]`` with zeros at their end up to whole blocks."""
    shards = shards_of(sharding)
    if shards == 1:
        return x
    seq = x.shape[1]
    whole = 2 * shards * block_length(seq, shards)
    return append_zeros(x, whole - seq, 1)


def split_parts(x: Array, sharding: RowSharding) -> Array:
    """Returns the parts of rows: ``[shards * batch, 2 * block, ...]`` of ``[batch, seq, ...]``.

    Whole rows (one shard) are returned as they are.
    """
    shards = shards_of(sharding)
    if sharding is None or shards == 1:
        return x
    batch = x.shape[0]
    x = pad_to_blocks(x, sharding)
    early = np.arange(shards)
    late = 2 * shards - 1 - early
    order = np.stack([early, late], axis=1)  # [shards, 2], each shard's blocks
    _, _, *rest = x.shape
    # [batch, blocks, block] -> [batch, shards, 2, block] -> [shards, batch, 2 * block]
    x = x.reshape(batch, 2 * shards, -1, *rest)
    x = jnp.moveaxis(x[:, order], 1, 0)
    x = x.reshape(shards, batch, -1, *rest)
    by_shard = mesh_sharding(sharding, CONTEXT, BATCH_AXES)
    x = lax.with_sharding_constraint(x, by_shard)
    x = x.reshape(shards * batch, -1, *rest)
    return lax.with_sharding_constraint(x, sharding)


def join_parts(x: Array, sharding: RowSharding, seq: int) -> Array:
    """Returns rows ``[batch, seq, ...]`` of their parts ``[shards * batch, 2 * block, ...]``: the
    inverse of `split_parts` and `pad_to_blocks`.

    Whole rows (one shard) are returned as they are.
    """
    shards = shards_of(sharding)
    if sharding is None or shards == 1:
        return x
    _, length, *rest = x.shape
    block = length // 2
    # [shards * batch, 2 * block, ...] -> [shards, batch, 2, block, ...] -> [batch, seq, ...]
    x = _natural(x.reshape(shards, -1, 2, block, *rest))
    whole = mesh_sharding(sharding, BATCH_AXES)
    return lax.with_sharding_constraint(x[:, :seq], whole)


def repeat_for_parts(x: Array, sharding: RowSharding) -> Array:
    """Returns an array of rows, ``[batch, ...]``, once for each part of a row: ``[shards * batch,
    ...]``."""
    shards = shards_of(sharding)
    if sharding is None or shards == 1:
        return x
    _, *rest = x.shape
    x = jnp.broadcast_to(x[None], (shards, *x.shape))
    by_shard = mesh_sharding(sharding, CONTEXT, BATCH_AXES)
    x = lax.with_sharding_constraint(x, by_shard)
    return lax.with_sharding_constraint(x.reshape(-1, *rest), sharding)


def _natural(x: Array) -> Array:
    """Returns rows ``[batch, seq, ...]``, in the order of their tokens, of all shards' blocks
    ``[shards, batch, 2, block, ...]``."""
    early = x[:, :, 0]  # [shards, batch, block, ...]
    late = x[::-1, :, 1]  # the last shard has the first of the late blocks
    blocks = jnp.moveaxis(jnp.concatenate([early, late]), 0, 1)
    # [batch, 2 * shards, block, ...] -> [batch, seq, ...]
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])


# ---------------------------------------------------------------- within a shard


def block_numbers() -> tuple[Any, Any]:
    """Returns the numbers of this shard's early and late block, counted along the row."""
    shard = lax.axis_index(CONTEXT)
    return shard, 2 * lax.axis_size(CONTEXT) - 1 - shard


def split_blocks(x: Array) -> Array:
    """Returns ``[2 * batch, block, ...]`` of this shard's ``[batch, 2 * block, ...]``."""
    batch, length, *rest = x.shape
    return x.reshape(2 * batch, length // 2, *rest)


def join_blocks(x: Array) -> Array:
    """Computes the inverse of `split_blocks`."""
    parts, block, *rest = x.shape
    return x.reshape(parts // 2, 2 * block, *rest)


def gather_rows(x: Array) -> Array:
    """Returns rows ``[batch, seq, ...]`` of all shards' parts ``[batch, 2 * block, ...]``."""
    batch, _, *rest = x.shape
    blocks = x.reshape(batch, 2, -1, *rest)
    return _natural(lax.all_gather(blocks, CONTEXT))


@jax.custom_vjp
def gather_rows_exactly(x: Array) -> Array:
    """Computes `gather_rows`; its backward pass exchanges the gradients and sums them in float32.

    It sends as many bytes as the gradient of `gather_rows`, which v5e's compiler makes of the
    entire array on every shard.
    """
    return gather_rows(x)


def _exchanged(_: None, g: Array) -> tuple[Array]:
    """Returns the gradient of a shard's part, ``[batch, 2 * block, ...]``, for ``g [batch, seq,
    ...]``."""
    batch, seq, *rest = g.shape
    shards = lax.axis_size(CONTEXT)
    shape = (shards, batch, 2, seq // (2 * shards), *rest)
    # `_natural` only reorders, so its transpose returns the gradient of each shard's part,
    # [shards, batch, 2, block, ...].
    blocks = jax.ShapeDtypeStruct(shape, g.dtype)
    (parts,) = jax.linear_transpose(_natural, blocks)(g)
    # Each shard receives the gradients of its part from all shards.
    parts = lax.all_to_all(parts, CONTEXT, 0, 0, tiled=True)
    total = jnp.sum(parts.astype(jnp.float32), axis=0).astype(g.dtype)
    return (total.reshape(batch, -1, *rest),)


gather_rows_exactly.defvjp(lambda x: (gather_rows(x), None), _exchanged)


def prepend_context(x: Array, ahead: int) -> Array:
    """Returns this shard's blocks, each after the ``ahead`` tokens before it in the row: ``[2 *
    batch, ahead + block, ...]``.

    ``x`` is the shard's part ``[batch, 2 * block, ...]``; ``ahead`` is at most a block. Only the
    tokens before a block are exchanged, between neighbouring shards. The first block of a row
    follows zeros.
    """
    shards = lax.axis_size(CONTEXT)
    batch, length, *rest = x.shape
    block = length // 2
    early = x[:, :block]
    late = x[:, block:]
    early_tail = early[:, block - ahead :]
    late_tail = late[:, block - ahead :]
    # Shard i of n has the blocks i and 2 n - 1 - i. The early block follows the early block of
    # shard i - 1, and the late one follows the late block of shard i + 1.
    to_next = [(i, i + 1) for i in range(shards - 1)]
    to_previous = [(i + 1, i) for i in range(shards - 1)]
    before_early = lax.ppermute(early_tail, CONTEXT, to_next)
    before_late = lax.ppermute(late_tail, CONTEXT, to_previous)
    # The late block of the last shard follows its own early block, in the middle of the row.
    is_last = lax.axis_index(CONTEXT) == shards - 1
    before_late = jnp.where(is_last, early_tail, before_late)
    early = jnp.concatenate([before_early, early], axis=1)
    late = jnp.concatenate([before_late, late], axis=1)
    # [batch, 2, ahead + block, ...] -> [2 * batch, ahead + block, ...]
    both = jnp.stack([early, late], axis=1)
    return both.reshape(2 * batch, ahead + block, *rest)
