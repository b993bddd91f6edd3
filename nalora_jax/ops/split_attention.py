"""Causal attention of rows that are split over the mesh axis "context"
(`nalora_jax.ops.split_rows`).

Every shard gathers the keys and values of its rows, which are small for grouped heads, and attends
with its own queries. The backward pass gathers them again and sums their gradients over shards. If
all windows of a layer fit in a block, only the tokens that the window reaches are exchanged.

The plain function computes some queries at a time. Kernels skip tiles after the queries, before
their window and before their segments; an early and a late block per shard see together as many
tiles on every shard.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from nalora_jax.common.devices import BATCH_AXES
from nalora_jax.ops.attention import (
    QKV,
    AttentionConfig,
    Keys,
    attend_in_tiles,
    map_over_devices,
    save_heads,
)
from nalora_jax.ops.dispatch import Numerics, operation
from nalora_jax.ops.split_rows import (
    Row,
    block_numbers,
    gather_rows,
    join_blocks,
    prepend_context,
    split_blocks,
)

# A shard's keys, or values, [batch, 2 * block, ...] -> those of all tokens that its queries see.
Spread = Callable[[Array], Array]


@operation
def split_attention(
    heads: QKV,
    row: Row,
    window: Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    sinks: Array | None = None,
) -> Array:
    """Computes `nalora_jax.ops.attention.attention` of rows from their parts ``[shards * batch, 2 *
    block, ...]``.

    Positions must grow by one along each segment, and the window must be one of ``config.windows``.
    ``config`` has the sharding of the first axis; for ``sinks`` see
    `nalora_jax.ops.attention.Keys`.
    """

    def attend(heads: QKV, of: Integers, spread: Spread, sinks: Array | None) -> Array:
        """Returns the attention of a shard's queries, see `attend_on_shard`."""
        q, k, v = heads
        keys = Keys(spread(k), spread(v), *of.keys, sinks)
        here = of.queries.positions, of.queries.segments
        return attend_in_tiles(q, here, keys, of.window, config, numerics)

    q, k, v = save_heads(heads, config, numerics)
    local = partial(attend_on_shard, config=config, attend=attend)
    out = attend_on_shards(local, (q, k, v), row, window, config, sinks)
    return out.astype(numerics.result)


def attend_on_shards(
    attend: Callable[..., Array],
    heads: QKV,
    row: Row,
    window: Array | int,
    config: AttentionConfig,
    sinks: Array | None,
    *more: Any,
    more_specs: tuple[Any, ...] = (),
) -> Array:
    """Runs attention on every shard of the mesh and returns the parts ``[shards * batch, 2 * block,
    heads, head_dim]``.

    Args:
      attend: called on each device as ``attend(heads, row, window, sinks, *more)``, with its part
        of the queries, keys and values, the integers of its whole rows, and its heads' sinks.
      heads: q, k and v of all parts.
      row: integers of whole rows.
      window: scalar, the same on every device.
      config: has the mesh, and the sharding of the parts.
      sinks: float32 ``[heads]``, or None.
      more: further arguments, with the partition specs ``more_specs``.
      more_specs: one for each of ``more``.
    """
    row_spec = P(BATCH_AXES)
    window_spec = P()
    sinks_spec = P(config.head_axis)
    mapped = map_over_devices(
        attend, config, row_spec, window_spec, sinks_spec, *more_specs
    )
    out: Array = mapped(heads, row, jnp.asarray(window, jnp.int32), sinks, *more)
    return out


def reach(windows: tuple[int, ...], block: int, row: Row) -> int:
    """Returns how many tokens before a block its queries see, with the largest window that fits in
    a block.

    0 if no window fits or ``row.starts`` are given; then all keys of the row are gathered.
    """
    if row.starts is not None:
        return 0
    near = [window - 1 for window in windows if window - 1 <= block]
    return max(near, default=0)


def attend_on_shard(
    heads: QKV,
    row: Row,
    window: Array,
    sinks: Array | None,
    *,
    config: AttentionConfig,
    attend: Callable[..., Array],
    tile: int = 1,
) -> Array:
    """Returns the attention of a shard's part, ``[batch, 2 * block, heads, head_dim]``.

    ``attend(heads, integers, spread, sinks)`` computes it for some queries and for ``spread`` of
    the shard's keys and values. Blocks are preceded by a multiple of ``tile`` keys.
    """
    block = heads[0].shape[1] // 2
    ahead = reach(config.windows, block, row)
    ahead = -(-ahead // tile) * tile  # rounded up

    def near(q: Array, k: Array, v: Array) -> Array:
        """Attends to the shard's blocks and the ``ahead`` tokens before each: enough for a window
        of at most a block."""
        of_keys = row.slices(ahead)
        queries = Queries(
            of_keys.positions[:, ahead:],
            of_keys.segments[:, ahead:],
            jnp.full((1,), ahead),
        )
        spread = partial(prepend_context, ahead=ahead)
        integers = Integers(queries, of_keys, window)
        return join_blocks(attend((split_blocks(q), k, v), integers, spread, sinks))

    def far(*heads: Array) -> Array:
        """Attends to the gathered keys of the entire row."""
        here = row.slices(0)
        first = block * jnp.stack(block_numbers())
        queries = Queries(
            join_blocks(here.positions), join_blocks(here.segments), first
        )
        return attend(heads, Integers(queries, row, window), gather_rows, sinks)

    if not ahead:
        return far(*heads)
    if config.windows[-1] - 1 <= block:
        return near(*heads)
    return lax.cond(window - 1 <= block, near, far, *heads)


class Queries(NamedTuple):
    """Integers of a shard's queries, which consist of equal runs of neighbours in their row."""

    positions: Array  # int [batch, queries]
    segments: Array  # int [batch, queries]
    first: Array  # int [runs], index of the first query of each run among the keys


class Integers(NamedTuple):
    """Integers that decide which keys a shard's queries see."""

    queries: Queries
    keys: Row
    window: Array  # scalar
