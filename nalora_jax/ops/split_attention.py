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
    over_devices,
    saved_heads,
)
from nalora_jax.ops.dispatch import Numerics, operation
from nalora_jax.ops.split_rows import (
    Row,
    block_numbers,
    by_block,
    by_part,
    gathered,
    with_preceding,
)

Spread = Callable[[Array], Array]  # a shard's keys -> all keys that its queries may see


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
        keys = Keys(spread(heads[1]), spread(heads[2]), *of.keys, sinks)
        return attend_in_tiles(
            heads[0], of.queries[:2], keys, of.window, config, numerics
        )

    q, k, v = saved_heads(heads, config, numerics)
    local = partial(on_shard, config=config, attend=attend)
    return on_shards(local, (q, k, v), row, window, config, sinks).astype(
        numerics.result
    )


def on_shards(
    attend: Callable[..., Array],
    heads: QKV,
    row: Row,
    window: Array | int,
    config: AttentionConfig,
    sinks: Array | None,
    *more: Any,
    more_specs: tuple[Any, ...] = (),
) -> Array:
    """Returns ``attend(heads, row, window, sinks, *more)``, mapped over all axes of the mesh."""
    mapped = over_devices(
        attend, config, P(BATCH_AXES), P(), P(config.head_axis), *more_specs
    )
    out: Array = mapped(heads, row, jnp.asarray(window, jnp.int32), sinks, *more)
    return out


def reach(windows: tuple[int, ...], block: int, row: Row) -> int:
    """Returns the most tokens before a block that a window within a block reaches; 0: keys are
    gathered."""
    if row.starts is not None:
        return 0
    return max((window - 1 for window in windows if window - 1 <= block), default=0)


def on_shard(
    heads: QKV,
    row: Row,
    window: Array,
    sinks: Array | None,
    *,
    config: AttentionConfig,
    attend: Callable[..., Array],
    tile: int = 1,
) -> Array:
    """Computes a shard's part ``[batch, 2 * block, heads, head_dim]``.

    ``attend(heads, integers, spread, sinks)`` computes attention of the shard's queries to
    ``spread`` of its keys, whose number before a block is a multiple of ``tile``.
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
        spread = partial(with_preceding, ahead=ahead)
        return by_part(
            attend(
                (by_block(q), k, v), Integers(queries, of_keys, window), spread, sinks
            )
        )

    def far(*heads: Array) -> Array:
        """Attends to the gathered keys of the entire row."""
        here = row.slices(0)
        first = block * jnp.stack(block_numbers())
        queries = Queries(by_part(here.positions), by_part(here.segments), first)
        return attend(heads, Integers(queries, row, window), gathered, sinks)

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
