"""Causal attention of rows that are split over the mesh axis "context" (`nalora_jax.ops.split_rows`).

Every shard gathers the keys and values of its rows, which are small for grouped heads, and attends
with its own queries. The backward pass gathers them again and sums their gradients over shards. If all
windows of a layer fit in a block, only the tokens that the window reaches are exchanged.

The plain function computes tiles of scores with an online softmax, as flash attention does (arXiv
2205.14135). It skips tiles after the queries, before their window and before their segments. An
early and a late block per shard see together as many tiles on every shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from nalora_jax.distributed.mesh import BATCH_AXES
from nalora_jax.ops.blockwise_attention import (
    UNSEEN,
    AttentionConfig,
    capped,
    product,
    visibility,
    with_sinks,
)
from nalora_jax.ops.dispatch import Numerics, operation
from nalora_jax.ops.split_rows import Row, block_numbers, by_block, by_part, gathered, with_preceding
from nalora_jax.ops.storage import read_residual, save_residual

_TILE = 512  # most queries and keys whose scores are computed together

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
      numerics, sinks: as for `attention`.

    Returns:
      ``[shards * batch, 2 * block, heads, head_dim]`` in ``numerics.result``.
    """
    block = q.shape[1] // 2
    tile = max(n for n in range(1, min(_TILE, block) + 1) if block % n == 0)
    attend = partial(on_shard, config=config, numerics=numerics, attend=_tiled, tile=tile)
    return on_shards(attend, q, k, v, row, window, config, sinks)


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
    sharding = config.sharding
    assert sharding is not None
    by_head = P(sharding.spec[0], None, config.head_axis)
    specs = (by_head, by_head, by_head, P(BATCH_AXES), P(), P(config.head_axis), *more_specs)
    mapped = jax.shard_map(attend, mesh=sharding.mesh, in_specs=specs, out_specs=by_head, check_vma=False)
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
    numerics: Numerics,
    attend: Callable[..., jax.Array],
    tile: int,
) -> jax.Array:
    """Computes a shard's part ``[batch, 2 * block, heads, head_dim]``.

    ``attend`` has the arguments of `_tiled`; its tiles have ``tile`` tokens, which divides a block.
    """
    block = q.shape[1] // 2
    ahead = reach(config.windows, block, row)
    ahead = -(-ahead // tile) * tile
    options = (window, sinks, config, numerics)

    def near(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        of_keys = row.slices(ahead)
        queries = Queries(of_keys.positions[:, ahead:], of_keys.segments[:, ahead:], jnp.full((1,), ahead))
        spread = _Preceding(ahead)
        return by_part(attend(by_block(q), k, v, queries, of_keys, *options, Tiling(spread, tile)))

    def far(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        here = row.slices(0)
        queries = Queries(
            by_part(here.positions), by_part(here.segments), block * jnp.stack(block_numbers())
        )
        return attend(q, k, v, queries, row, *options, Tiling(gathered, tile))

    if not ahead:
        return far(q, k, v)
    if config.windows[-1] - 1 <= block:
        return near(q, k, v)
    return lax.cond(window - 1 <= block, near, far, q, k, v)


# ---------------------------------------------------------------- tiles


class Queries(NamedTuple):
    """Integers of a shard's queries, which consist of equal runs of neighbours in their row."""

    positions: jax.Array  # int [batch, queries]
    segments: jax.Array  # int [batch, queries]
    first: jax.Array  # int [runs], index of the first query of each run among the keys


@dataclass(frozen=True)
class _Preceding:
    """`with_preceding` as a static argument."""

    ahead: int

    def __call__(self, x: jax.Array) -> jax.Array:
        return with_preceding(x, self.ahead)


class Tiling(NamedTuple):
    """Static options of `_tiled`."""

    spread: Spread
    size: int  # queries and keys of a tile


class _Keys(NamedTuple):
    key: jax.Array  # [batch, kv_heads, keys, head_dim]
    value: jax.Array
    row: Row  # int [batch, keys]


class _Tile(NamedTuple):
    """A tile of queries."""

    query: jax.Array  # [batch, kv_heads, groups, tile, head_dim]
    positions: jax.Array  # int [batch, tile]
    segments: jax.Array  # int [batch, tile]
    first: jax.Array  # int [], index of the first query among the keys


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _tiled(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Queries,
    row: Row,
    window: jax.Array,
    sinks: jax.Array | None,
    config: AttentionConfig,
    numerics: Numerics,
    tiling: Tiling,
) -> jax.Array:
    """Computes attention of a shard's queries to ``tiling.spread`` of its keys, whose integers are ``row``."""
    return _tiled_fwd(q, k, v, queries, row, window, sinks, config, numerics, tiling)[0]


def _tiled_fwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Queries,
    row: Row,
    window: jax.Array,
    sinks: jax.Array | None,
    config: AttentionConfig,
    numerics: Numerics,
    tiling: Tiling,
) -> tuple[jax.Array, Any]:
    heads = tuple(save_residual(x, numerics.residual, numerics) for x in (q * config.scale, k, v))
    keys, kv_heads = _spread(heads, row, tiling), k.shape[2]

    def attended(_: None, tile: _Tile) -> tuple[None, tuple[jax.Array, jax.Array]]:
        def body(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, out = carry
            key, value, at = _keys_at(keys, number, tiling.size)
            scores = _scores(tile, key, at, window, config, numerics)[0]
            new = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights, before = jnp.exp(scores - new), jnp.exp(top - new)
            out = out * before + product("bkgqt,bktd->bkgqd", weights, value, numerics)
            return new, total * before + jnp.sum(weights, axis=-1, keepdims=True), out

        column = jnp.zeros((*tile.query.shape[:-1], 1), jnp.float32)
        start = column + UNSEEN, column, jnp.zeros(tile.query.shape, jnp.float32)
        top, total, out = lax.fori_loop(*_seen_tiles(tile, row, window, tiling.size), body, start)
        return None, (out / total, top + jnp.log(total))

    _, (out, logsumexp) = lax.scan(attended, None, _tiles(heads[0], queries, kv_heads, tiling.size))
    if sinks is not None:  # [tiles, batch, kv_heads, groups, tile, 1]
        out, logsumexp = with_sinks(out, logsumexp, sinks.reshape(1, 1, kv_heads, -1, 1, 1))
    saved = save_residual(_by_token(out), numerics.residual, numerics)
    total = save_residual(logsumexp, "float32", numerics)
    like = tuple(jnp.zeros((0,), x.dtype) for x in (q, k, v))
    residuals = (*heads, saved, total, queries, row, window, like)
    return read_residual(saved, numerics.result), residuals


def _tiled_bwd(
    config: AttentionConfig, numerics: Numerics, tiling: Tiling, residuals: Any, g: jax.Array
) -> tuple[Any, ...]:
    *heads, out, logsumexp, queries, row, window, like = residuals
    keys, kv_heads = _spread(heads, row, tiling), _shape_of(heads[1])[2]
    g = g.astype(jnp.float32)
    inner = jnp.sum(g * read_residual(out, jnp.float32), axis=-1, keepdims=True)
    tiles = _tiles(heads[0], queries, kv_heads, tiling.size)
    g, inner = (_by_tile(x, kv_heads, tiling.size) for x in (g, inner))

    def gradients(
        sums: Any, inputs: tuple[_Tile, jax.Array, jax.Array, jax.Array]
    ) -> tuple[Any, jax.Array]:
        tile, total, g, inner = inputs

        def body(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            key, value, at = _keys_at(keys, number, tiling.size)
            scores, unseen = _scores(tile, key, at, window, config, numerics)
            weights = jnp.exp(scores - total)
            slope = weights * (product("bkgqd,bktd->bkgqt", g, value, numerics) - inner)
            if config.softcap:
                slope = slope * jnp.where(unseen, 0.0, 1 - jnp.square(scores / config.softcap))
            dk = _add(dk, product("bkgqt,bkgqd->bktd", slope, tile.query, numerics), number)
            dv = _add(dv, product("bkgqt,bkgqd->bktd", weights, g, numerics), number)
            return dq + product("bkgqt,bktd->bkgqd", slope, key, numerics), dk, dv

        start = jnp.zeros(tile.query.shape, jnp.float32), *sums
        dq, *sums = lax.fori_loop(*_seen_tiles(tile, row, window, tiling.size), body, start)
        return tuple(sums), dq

    zeros = jnp.zeros(keys.key.shape, jnp.float32)
    (dk, dv), dq = lax.scan(gradients, (zeros, zeros), (tiles, logsumexp, g, inner))
    back = jax.linear_transpose(tiling.spread, jax.ShapeDtypeStruct(_shape_of(heads[1]), jnp.float32))
    dk, dv = (back(x.transpose(0, 2, 1, 3))[0] for x in (dk, dv))
    grads = _by_token(dq) * config.scale, dk, dv
    return (*(x.astype(y.dtype) for x, y in zip(grads, like, strict=True)), None, None, None, None)


_tiled.defvjp(_tiled_fwd, _tiled_bwd)


def _shape_of(x: Any) -> tuple[int, ...]:
    """Returns the shape of a saved array in any storage form."""
    shape: tuple[int, ...] = jax.tree.leaves(x)[0].shape
    return shape


def _spread(heads: Any, row: Row, tiling: Tiling) -> _Keys:
    """Returns the keys and values that a shard's queries may see, from the saved heads."""
    spread = [jax.tree.map(tiling.spread, x) for x in heads[1:]]
    key, value = (read_residual(x, jnp.float32).transpose(0, 2, 1, 3) for x in spread)
    return _Keys(key, value, row)


def _tiles(query: Any, queries: Queries, kv_heads: int, size: int) -> _Tile:
    """Returns all tiles of queries, with a leading axis ``[tiles]``."""
    floats, (batch, count) = read_residual(query, jnp.float32), queries.positions.shape
    tiles = count // size
    runs = tiles // queries.first.shape[0]
    first = (queries.first[:, None] + size * jnp.arange(runs)[None]).reshape(-1)
    positions, segments = (jnp.moveaxis(x.reshape(batch, tiles, size), 1, 0) for x in queries[:2])
    return _Tile(_by_tile(floats, kv_heads, size), positions, segments, first)


def _by_tile(x: jax.Array, kv_heads: int, size: int) -> jax.Array:
    """Returns ``[tiles, batch, kv_heads, groups, tile, n]`` of ``[batch, queries, heads, n]``."""
    x = x.reshape(x.shape[0], -1, size, kv_heads, x.shape[2] // kv_heads, x.shape[3])
    return x.transpose(1, 0, 3, 4, 2, 5)


def _by_token(x: jax.Array) -> jax.Array:
    """Computes the inverse of `_by_tile`."""
    x = x.transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1, x.shape[5])


def _seen_tiles(tile: _Tile, row: Row, window: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first and last (exclusive) tile of keys that the queries may see."""
    index = tile.first + jnp.arange(size)
    first = jnp.min(jnp.maximum(index[None] - tile.positions, (index - window + 1)[None]))
    last = (tile.first + size - 1) // size + 1
    if row.starts is not None:  # later tokens of an image are seen
        last = jnp.asarray(row.positions.shape[1] // size)
    return jnp.maximum(first, 0) // size, last


def _keys_at(keys: _Keys, number: jax.Array, size: int) -> tuple[jax.Array, jax.Array, Row]:
    """Returns keys, values and integers of one tile of keys."""
    key, value = (lax.dynamic_slice_in_dim(x, number * size, size, axis=2) for x in keys[:2])
    integers = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, number * size, size, axis=1), keys.row)
    return key, value, integers


def _scores(
    tile: _Tile, key: jax.Array, at: Row, window: jax.Array, config: AttentionConfig, numerics: Numerics
) -> tuple[jax.Array, jax.Array]:
    """Returns capped scores ``[batch, kv_heads, groups, tile, keys]``, `UNSEEN` for unseen keys, and those keys."""
    scores = capped(product("bkgqd,bktd->bkgqt", tile.query, key, numerics), config)
    visible = visibility(tile.positions, tile.segments, at.positions, at.segments, window, at.starts)[
        :, None, None
    ]
    return jnp.where(visible, scores, UNSEEN), ~visible


def _add(total: jax.Array, tile: jax.Array, number: jax.Array) -> jax.Array:
    """Adds the gradients of one tile of keys to the gradients of all keys."""
    start = number * tile.shape[2]
    value = lax.dynamic_slice_in_dim(total, start, tile.shape[2], axis=2) + tile
    return lax.dynamic_update_slice_in_dim(total, value, start, axis=2)
