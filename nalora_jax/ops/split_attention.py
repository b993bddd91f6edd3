"""Causal attention of rows that are split over the mesh axis "context" (`nalora_jax.ops.split_rows`).

Every shard gathers the keys and values of its rows, which are small for grouped heads, and attends
with its own queries. The backward pass gathers them again and sums their gradients over shards. If all
windows of a layer fit in a block, only the tokens that the window reaches are exchanged. `Kernels`
compute what is between.

The plain kernels compute tiles of scores with an online softmax, as flash attention does (arXiv
2205.14135). They skip tiles after the queries, before their window and before their segments. An
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

from nalora_jax.common.devices import BATCH_AXES
from nalora_jax.ops.attention import UNSEEN, AttentionConfig, capped, product, visibility, with_sinks
from nalora_jax.ops.dispatch import Numerics, operation
from nalora_jax.ops.split_rows import Row, block_numbers, by_block, by_part, gathered, with_preceding
from nalora_jax.ops.storage import read_residual, save_residual

Spread = Callable[[jax.Array], jax.Array]  # a shard's keys -> all keys that its queries may see
_TILE = 512  # most queries and keys whose scores are computed together


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
    attend = partial(on_shard, config=config, numerics=numerics, kernels=_PLAIN, tile=tile)
    return on_shards(attend, q, k, v, row, window, config, sinks)


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
    kernels: Kernels,
    tile: int,
) -> jax.Array:
    """Computes a shard's part ``[batch, 2 * block, heads, head_dim]``.

    The tiles of ``kernels`` have ``tile`` tokens, which divides a block.
    """
    block = q.shape[1] // 2
    ahead = reach(config.windows, block, row)
    ahead = -(-ahead // tile) * tile

    def near(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        of_keys = row.slices(ahead)
        queries = Queries(of_keys.positions[:, ahead:], of_keys.segments[:, ahead:], jnp.full((1,), ahead))
        options = Options(kernels, _Preceding(ahead), tile, config, numerics)
        return by_part(_attention(by_block(q), k, v, Integers(queries, of_keys, window), sinks, options))

    def far(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        here = row.slices(0)
        queries = Queries(
            by_part(here.positions), by_part(here.segments), block * jnp.stack(block_numbers())
        )
        options = Options(kernels, gathered, tile, config, numerics)
        return _attention(q, k, v, Integers(queries, row, window), sinks, options)

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


class Kernels(NamedTuple):
    """Attention of a shard's queries to all keys that they may see, and its gradients.

    Arrays of heads are ``[batch, tokens, heads, head_dim]`` in `Numerics.operand`, already multiplied by the
    scale; ``g`` is float32; log-sum-exps and ``inner``, the sum of ``g`` times the result, are float32
    ``[batch, queries, heads]``.

    Attributes:
      forward: ``(q, k, v, integers, options)`` to the float32 result and the log-sum-exps.
      backward: ``(q, k, v, g, logsumexp, inner, integers, options)`` to the gradients of q, k and v.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


class Options(NamedTuple):
    """Static options of a shard's attention."""

    kernels: Kernels
    spread: Spread
    size: int  # queries and keys of a tile
    config: AttentionConfig
    numerics: Numerics


@dataclass(frozen=True)
class _Preceding:
    """`with_preceding` as a static argument."""

    ahead: int

    def __call__(self, x: jax.Array) -> jax.Array:
        return with_preceding(x, self.ahead)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    integers: Integers,
    sinks: jax.Array | None,
    options: Options,
) -> jax.Array:
    """Computes attention of a shard's queries to ``options.spread`` of its keys."""
    return _forward(q, k, v, integers, sinks, options)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    integers: Integers,
    sinks: jax.Array | None,
    options: Options,
) -> tuple[jax.Array, Any]:
    numerics = options.numerics
    heads = tuple(save_residual(x, numerics.residual, numerics) for x in (q * options.config.scale, k, v))
    out, logsumexp = options.kernels.forward(*_operands(heads, options), integers, options)
    if sinks is not None:
        out, logsumexp = with_sinks(out, logsumexp[..., None], sinks[None, None, :, None])
        logsumexp = logsumexp[..., 0]
    saved = save_residual(out, numerics.residual, numerics)
    total = save_residual(logsumexp, "float32", numerics)
    like = tuple(jnp.zeros((0,), x.dtype) for x in (q, k, v))
    return read_residual(saved, numerics.result), (*heads, saved, total, integers, like)


def _backward(options: Options, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
    *heads, out, logsumexp, integers, like = residuals
    g = g.astype(jnp.float32)
    inner = jnp.sum(g * read_residual(out, jnp.float32), axis=-1)
    sums = read_residual(logsumexp, jnp.float32), inner
    dq, dk, dv = options.kernels.backward(*_operands(heads, options), g, *sums, integers, options)
    part = jax.ShapeDtypeStruct(jax.tree.leaves(heads[1])[0].shape, dk.dtype)
    back = jax.linear_transpose(options.spread, part)
    grads = dq * options.config.scale, *back(dk), *back(dv)
    return (*(x.astype(y.dtype) for x, y in zip(grads, like, strict=True)), None, None)


_attention.defvjp(_forward, _backward)


def _operands(heads: Any, options: Options) -> list[jax.Array]:
    """Returns a shard's queries, and the keys and values that they may see, from the saved heads."""
    spread = [heads[0], *(jax.tree.map(options.spread, x) for x in heads[1:])]
    return [read_residual(x, options.numerics.operand) for x in spread]


# ---------------------------------------------------------------- plain kernels


class _Keys(NamedTuple):
    key: jax.Array  # [batch, kv_heads, keys, head_dim]
    value: jax.Array
    row: Row  # int [batch, keys]

    @classmethod
    def of(cls, key: jax.Array, value: jax.Array, row: Row) -> _Keys:
        """Returns the keys of ``[batch, keys, kv_heads, head_dim]``."""
        return cls(key.swapaxes(1, 2), value.swapaxes(1, 2), row)


class _Tile(NamedTuple):
    """A tile of queries."""

    query: jax.Array  # [batch, kv_heads, groups, tile, head_dim]
    positions: jax.Array  # int [batch, tile]
    segments: jax.Array  # int [batch, tile]
    first: jax.Array  # int [], index of the first query among the keys


def _tiled(
    query: jax.Array, key: jax.Array, value: jax.Array, integers: Integers, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Computes `Kernels.forward`."""
    keys, kv_heads = _Keys.of(key, value, integers.keys), key.shape[2]

    def attended(_: None, tile: _Tile) -> tuple[None, tuple[jax.Array, jax.Array]]:
        def body(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, out = carry
            key, value, at = _keys_at(keys, number, options.size)
            scores = _scores(tile, key, at, integers.window, options)[0]
            new = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights, before = jnp.exp(scores - new), jnp.exp(top - new)
            out = out * before + product("bkgqt,bktd->bkgqd", weights, value, options.numerics)
            return new, total * before + jnp.sum(weights, axis=-1, keepdims=True), out

        column = jnp.zeros((*tile.query.shape[:-1], 1), jnp.float32)
        start = column + UNSEEN, column, jnp.zeros(tile.query.shape, jnp.float32)
        top, total, out = lax.fori_loop(*_seen_tiles(tile, integers, options.size), body, start)
        return None, (out / total, top + jnp.log(total))

    _, results = lax.scan(attended, None, _tiles(query, integers.queries, kv_heads, options.size))
    out, logsumexp = map(_by_token, results)
    return out, logsumexp[..., 0]


def _tiled_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    g: jax.Array,
    logsumexp: jax.Array,
    inner: jax.Array,
    integers: Integers,
    options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `Kernels.backward`."""
    keys, kv_heads = _Keys.of(key, value, integers.keys), key.shape[2]
    tiles = _tiles(query, integers.queries, kv_heads, options.size)
    of_tiles = [_by_tile(x, kv_heads, options.size) for x in (logsumexp[..., None], g, inner[..., None])]
    softcap, numerics = options.config.softcap, options.numerics

    def gradients(sums: Any, inputs: tuple[_Tile, list[jax.Array]]) -> tuple[Any, jax.Array]:
        tile, (total, g, inner) = inputs

        def body(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            key, value, at = _keys_at(keys, number, options.size)
            scores, unseen = _scores(tile, key, at, integers.window, options)
            weights = jnp.exp(scores - total)
            slope = weights * (product("bkgqd,bktd->bkgqt", g, value, numerics) - inner)
            if softcap:
                slope = slope * jnp.where(unseen, 0.0, 1 - jnp.square(scores / softcap))
            dk = _add(dk, product("bkgqt,bkgqd->bktd", slope, tile.query, numerics), number)
            dv = _add(dv, product("bkgqt,bkgqd->bktd", weights, g, numerics), number)
            return dq + product("bkgqt,bktd->bkgqd", slope, key, numerics), dk, dv

        start = jnp.zeros(tile.query.shape, jnp.float32), *sums
        dq, *sums = lax.fori_loop(*_seen_tiles(tile, integers, options.size), body, start)
        return tuple(sums), dq

    zeros = jnp.zeros(keys.key.shape, jnp.float32)
    (dk, dv), dq = lax.scan(gradients, (zeros, zeros), (tiles, of_tiles))
    return _by_token(dq), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


_PLAIN = Kernels(_tiled, _tiled_gradients)


def _tiles(query: jax.Array, queries: Queries, kv_heads: int, size: int) -> _Tile:
    """Returns all tiles of queries, with a leading axis ``[tiles]``."""
    shape = (query.shape[0], -1, size)
    positions, segments = (jnp.moveaxis(x.reshape(shape), 1, 0) for x in queries[:2])
    return _Tile(_by_tile(query, kv_heads, size), positions, segments, queries.first_of_tiles(size))


def _by_tile(x: jax.Array, kv_heads: int, size: int) -> jax.Array:
    """Returns ``[tiles, batch, kv_heads, groups, tile, n]`` of ``[batch, queries, heads, n]``."""
    x = x.reshape(x.shape[0], -1, size, kv_heads, x.shape[2] // kv_heads, x.shape[3])
    return x.transpose(1, 0, 3, 4, 2, 5)


def _by_token(x: jax.Array) -> jax.Array:
    """Computes the inverse of `_by_tile`."""
    x = x.transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1, x.shape[5])


def _seen_tiles(tile: _Tile, integers: Integers, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first and last (exclusive) tile of keys that the queries may see."""
    row, index = integers.keys, tile.first + jnp.arange(size)
    first = jnp.min(jnp.maximum(index[None] - tile.positions, (index - integers.window + 1)[None]))
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
    tile: _Tile, key: jax.Array, at: Row, window: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Returns capped scores ``[batch, kv_heads, groups, tile, keys]``, `UNSEEN` for unseen keys, and those keys."""
    scores = capped(product("bkgqd,bktd->bkgqt", tile.query, key, options.numerics), options.config)
    visible = visibility(tile.positions, tile.segments, at.positions, at.segments, window, at.starts)
    visible = visible[:, None, None]
    return jnp.where(visible, scores, UNSEEN), ~visible


def _add(total: jax.Array, tile: jax.Array, number: jax.Array) -> jax.Array:
    """Adds the gradients of one tile of keys to the gradients of all keys."""
    start = number * tile.shape[2]
    value = lax.dynamic_slice_in_dim(total, start, tile.shape[2], axis=2) + tile
    return lax.dynamic_update_slice_in_dim(total, value, start, axis=2)
