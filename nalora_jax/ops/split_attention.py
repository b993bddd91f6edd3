"""Causal attention of rows that are split over the mesh axis "context" (`nalora_jax.ops.split_rows`).

Every shard gathers the keys and values of its rows, which are small for grouped heads, and attends
with its own queries. The backward pass gathers them again and sums their gradients over shards. If all
windows of a layer fit in a block, only the tokens that the window reaches are exchanged.

The plain function computes some queries at a time. Kernels skip tiles after the queries, before their
window and before their segments; an early and a late block per shard see together as many tiles on every
shard.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from nalora_jax.common.devices import BATCH_AXES
from nalora_jax.ops.attention import AttentionConfig, Keys, attend_in_tiles, over_devices, saved_heads
from nalora_jax.ops.dispatch import Numerics, operation
from nalora_jax.ops.split_rows import Row, block_numbers, by_block, by_part, gathered, with_preceding

Spread = Callable[[jax.Array], jax.Array]  # a shard's keys -> all keys that its queries may see


@operation
def split_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row: Row,
    window: jax.Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    *,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Computes `nalora_jax.ops.attention.attention` of rows from their parts.

    Positions must grow by one along each segment.

    Args:
      q: ``[shards * batch, 2 * block, heads, head_dim]``.
      k, v: ``[shards * batch, 2 * block, kv_heads, head_dim]``.
      row: integers of whole rows.
      window: scalar, one of ``config.windows``.
      config: with the sharding of q's first axis.
      numerics: as for `attention`.
      sinks: see `nalora_jax.ops.attention.Keys`.

    Returns:
      ``[shards * batch, 2 * block, heads, head_dim]`` in ``numerics.result``.
    """

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, of: Integers, spread: Spread, sinks: jax.Array | None
    ) -> jax.Array:
        keys = Keys(spread(k), spread(v), *of.keys, sinks)
        return attend_in_tiles(q, of.queries[:2], keys, of.window, config, numerics)

    q, k, v = saved_heads(q, k, v, config, numerics)
    local = partial(on_shard, config=config, attend=attend)
    return on_shards(local, q, k, v, row, window, config, sinks).astype(numerics.result)


# ---------------------------------------------------------------- a shard


def on_shards(
    attend: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row: Row,
    window: jax.Array | int,
    config: AttentionConfig,
    sinks: jax.Array | None,
    *more: Any,
    more_specs: tuple[Any, ...] = (),
) -> jax.Array:
    """Returns ``attend(q, k, v, row, window, sinks, *more)``, mapped over all axes of the mesh."""
    specs = P(BATCH_AXES), P(), P(config.head_axis), *more_specs
    mapped = over_devices(attend, config, *specs)
    out: jax.Array = mapped(q, k, v, row, jnp.asarray(window, jnp.int32), sinks, *more)
    return out


def reach(windows: tuple[int, ...], block: int, row: Row) -> int:
    """Returns the most tokens before a block that a window within a block reaches; 0: keys are gathered."""
    if row.starts is not None:
        return 0
    return max((window - 1 for window in windows if window - 1 <= block), default=0)


def on_shard(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    row: Row,
    window: jax.Array,
    sinks: jax.Array | None,
    *,
    config: AttentionConfig,
    attend: Callable[..., jax.Array],
    tile: int = 1,
) -> jax.Array:
    """Computes a shard's part ``[batch, 2 * block, heads, head_dim]``.

    ``attend(q, k, v, integers, spread, sinks)`` computes attention of the shard's queries to
    ``spread`` of its keys, whose number before a block is a multiple of ``tile``.
    """
    block = q.shape[1] // 2
    ahead = reach(config.windows, block, row)
    ahead = -(-ahead // tile) * tile

    def near(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        of_keys = row.slices(ahead)
        queries = Queries(of_keys.positions[:, ahead:], of_keys.segments[:, ahead:], jnp.full((1,), ahead))
        integers = Integers(queries, of_keys, window)
        return by_part(attend(by_block(q), k, v, integers, partial(with_preceding, ahead=ahead), sinks))

    def far(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        here = row.slices(0)
        queries = Queries(
            by_part(here.positions), by_part(here.segments), block * jnp.stack(block_numbers())
        )
        return attend(q, k, v, Integers(queries, row, window), gathered, sinks)

    if not ahead:
        return far(q, k, v)
    if config.windows[-1] - 1 <= block:
        return near(q, k, v)
    return lax.cond(window - 1 <= block, near, far, q, k, v)


class Queries(NamedTuple):
    """Integers of a shard's queries, which consist of equal runs of neighbours in their row."""

    positions: jax.Array  # int [batch, queries]
    segments: jax.Array  # int [batch, queries]
    first: jax.Array  # int [runs], index of the first query of each run among the keys

    def first_of_tiles(self, size: int) -> jax.Array:
        """Returns the index of the first query of each tile of ``size`` among the keys, int ``[tiles]``."""
        tiles = self.positions.shape[1] // size // self.first.shape[0]
        return (self.first[:, None] + size * jnp.arange(tiles)[None]).reshape(-1)


class Integers(NamedTuple):
    """Integers that decide which keys a shard's queries see."""

    queries: Queries
    keys: Row
    window: jax.Array  # scalar
