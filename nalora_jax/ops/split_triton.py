"""Attention of rows that are split over GPUs (`nalora_jax.ops.split_attention`): Pallas kernels for Triton.

JAX's kernel (`nalora_jax.ops.triton_attention`) takes queries and keys of the same tokens. A shard's
queries are two distant runs of tokens, an early and a late one, so these kernels take the index of
each tile of queries in its row. They are flash attention (arXiv 2307.08691): one kernel for the forward
pass, one for the gradient of queries, one for the gradients of keys and values. Each visits only pairs
of tiles with a visible key by causality and window, and no tile of keys before the queries' segments.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.ops.blockwise_attention import UNSEEN, AttentionConfig, with_sinks
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.split_attention import Queries, Tiling, on_shard, on_shards, split_attention
from nalora_jax.ops.split_rows import Row
from nalora_jax.ops.storage import read_residual, save_residual
from nalora_jax.ops.triton_attention import TRITON

# The kernels' names, by which `nalora plan` recognises them, and their matmuls of a pair of tiles.
FORWARD, QUERIES, KEYS = "split_attention_forward", "split_attention_queries", "split_attention_keys"
PRODUCTS = {FORWARD: 2, QUERIES: 3, KEYS: 4}
NAME = "split_triton"  # of the three kernels in estimates
HEAD_DIMS = (32, 64, 128)
_LARGEST, _LEAST = 64, 16  # tokens of a tile


@TRITON.implements(split_attention)
def triton_split_attention(
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
    """Computes `split_attention` if tiles divide the blocks and images have no tokens in the row."""
    tile = _tile(q.shape[1] // 2)
    if tile < _LEAST or q.shape[-1] not in HEAD_DIMS or row.starts is not None:
        return NotImplemented
    attend = partial(on_shard, config=config, numerics=numerics, attend=_attention, tile=tile)
    return on_shards(attend, q, k, v, row, window, config, sinks)


def _tile(block: int) -> int:
    """Returns the largest tile that divides a block: a power of two."""
    return min(block & -block, _LARGEST)


class _Visits(NamedTuple):
    """The pairs of tiles with visible keys."""

    first: jax.Array  # int32 [tiles], index of a tile's first query among the keys
    of_queries: jax.Array  # int32 [batch, 2, tiles], first tile of keys and the end of the last one
    of_keys: jax.Array  # int32 [batch, 2, runs, tiles of keys], first tile of queries and the end, by run


class _Integers(NamedTuple):
    """The kernels' integers."""

    queries: jax.Array  # int32 [batch, queries], segments
    keys: jax.Array  # int32 [batch, keys], segments
    window: jax.Array  # int32 [1]
    visits: _Visits


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _attention(
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
    return _forward(q, k, v, queries, row, window, sinks, config, numerics, tiling)[0]


def _forward(
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
    query, key, value = _operands(heads, numerics, tiling)
    integers = _integers(queries, row, window, tiling.size)
    shapes = (
        jax.ShapeDtypeStruct(query.shape, jnp.float32),
        jax.ShapeDtypeStruct((query.shape[0], query.shape[2], query.shape[1]), jnp.float32),
    )
    call = _Call(query, key, integers, config, tiling.size)
    out, logsumexp = call.by_queries(_forward_kernel, FORWARD, [query, key, value], shapes)
    if sinks is not None:
        by_head = logsumexp.swapaxes(1, 2)[..., None]
        out, by_head = with_sinks(out, by_head, sinks[None, None, :, None])
        logsumexp = by_head[..., 0].swapaxes(1, 2)
    saved = save_residual(out, numerics.residual, numerics)
    total = save_residual(logsumexp, "float32", numerics)
    like = tuple(jnp.zeros((0,), x.dtype) for x in (q, k, v))
    return read_residual(saved, numerics.result), (*heads, saved, total, queries, row, window, like)


def _backward(
    config: AttentionConfig, numerics: Numerics, tiling: Tiling, residuals: Any, g: jax.Array
) -> tuple[Any, ...]:
    *heads, out, logsumexp, queries, row, window, like = residuals
    query, key, value = _operands(heads, numerics, tiling)
    inner = jnp.sum(g.astype(jnp.float32) * read_residual(out, jnp.float32), axis=-1).swapaxes(1, 2)
    call = _Call(query, key, _integers(queries, row, window, tiling.size), config, tiling.size)
    arrays = [query, key, value, g.astype(query.dtype), read_residual(logsumexp, jnp.float32), inner]
    (dq,) = call.by_queries(
        _queries_kernel, QUERIES, arrays, (jax.ShapeDtypeStruct(query.shape, query.dtype),)
    )
    dk, dv = call.by_keys(_keys_kernel, KEYS, arrays, (jax.ShapeDtypeStruct(key.shape, key.dtype),) * 2)
    part = jax.ShapeDtypeStruct(jax.tree.leaves(heads[1])[0].shape, key.dtype)
    back = jax.linear_transpose(tiling.spread, part)
    grads = dq * config.scale, *back(dk), *back(dv)
    return (*(x.astype(y.dtype) for x, y in zip(grads, like, strict=True)), None, None, None, None)


_attention.defvjp(_forward, _backward)


def _operands(heads: Any, numerics: Numerics, tiling: Tiling) -> list[jax.Array]:
    """Returns a shard's queries, and the keys and values that they may see, from the saved heads."""
    spread = [heads[0], *(jax.tree.map(tiling.spread, x) for x in heads[1:])]
    return [read_residual(x, numerics.operand) for x in spread]


def _integers(queries: Queries, row: Row, window: jax.Array, size: int) -> _Integers:
    """Returns the kernels' integers for tiles of ``size`` tokens."""
    batch, count = queries.positions.shape
    runs, tiles, of_keys = queries.first.shape[0], count // size, row.segments.shape[1] // size
    first = (queries.first[:, None] + size * jnp.arange(tiles // runs)[None]).reshape(1, -1)
    # Of a tile, the first query sees the earliest key: positions grow by one along a segment.
    earliest = jnp.maximum(first - queries.positions[:, ::size], first - window + 1)
    low = jnp.maximum(earliest, 0) // size
    end = jnp.broadcast_to((first + size - 1) // size + 1, low.shape)
    tile = jnp.arange(of_keys)[None, None]
    visited = (low[..., None] <= tile) & (tile < end[..., None])  # [batch, tiles, tiles of keys]
    visited = visited.reshape(batch, runs, tiles // runs, of_keys)
    # The queries that see a tile of keys are neighbours.
    begin = jnp.argmax(visited, axis=2) + (tiles // runs * jnp.arange(runs))[None, :, None]
    visitors = jnp.stack([begin, begin + jnp.sum(visited, axis=2)], axis=1)
    visits = _Visits(first[0], jnp.stack([low, end], axis=1), visitors)
    integers = _Integers(queries.segments, row.segments, window[None], visits)
    return jax.tree.map(lambda x: x.astype(jnp.int32), integers)


# ---------------------------------------------------------------- kernels


class _Call(NamedTuple):
    """Shapes and options of the calls of one shard."""

    query: jax.Array  # [batch, queries, heads, head_dim]
    key: jax.Array  # [batch, keys, kv_heads, head_dim]
    integers: _Integers
    config: AttentionConfig
    size: int

    def by_queries(self, kernel: Any, name: str, arrays: list[jax.Array], shapes: Any) -> Any:
        """Runs a kernel for each tile of queries, example and head."""
        from jax.experimental import pallas as pl

        size, (batch, queries, heads, dim) = self.size, self.query.shape
        groups, keys = heads // self.key.shape[2], self.key.shape[1]
        tile = pl.BlockSpec((None, size, None, dim), lambda i, b, h: (b, i, h, 0))
        all_keys = pl.BlockSpec((None, keys, None, dim), lambda i, b, h: (b, 0, h // groups, 0))
        number = pl.BlockSpec((None, None, size), lambda i, b, h: (b, h, i))  # one per query
        specs = [tile, all_keys, all_keys, tile, number, number][: len(arrays)]
        segments = pl.BlockSpec((None, size), lambda i, b, h: (b, i))
        out_specs = (tile, number)[: len(shapes)]
        grid = (queries // size, batch, heads)
        return self._run(kernel, name, grid, arrays, (specs, out_specs, shapes), segments=(segments, None))

    def by_keys(self, kernel: Any, name: str, arrays: list[jax.Array], shapes: Any) -> Any:
        """Runs a kernel for each tile of keys, example and head of keys."""
        from jax.experimental import pallas as pl

        size, (batch, keys, kv_heads, dim) = self.size, self.key.shape
        queries, groups = self.query.shape[1], self.query.shape[2] // kv_heads
        tile = pl.BlockSpec((None, size, None, dim), lambda i, b, h: (b, i, h, 0))
        all_queries = pl.BlockSpec((None, queries, groups, dim), lambda i, b, h: (b, 0, h, 0))
        numbers = pl.BlockSpec((None, groups, queries), lambda i, b, h: (b, h, 0))
        specs = [all_queries, tile, tile, all_queries, numbers, numbers]
        segments = pl.BlockSpec((None, size), lambda i, b, h: (b, i))
        grid = (keys // size, batch, kv_heads)
        return self._run(
            kernel, name, grid, arrays, (specs, (tile, tile), shapes), segments=(None, segments)
        )

    def _run(
        self, kernel: Any, name: str, grid: Any, arrays: list[jax.Array], blocks: Any, *, segments: Any
    ) -> Any:
        # Imported here, because Pallas costs every process 5 MB and a tenth of a second.
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton

        in_specs, out_specs, out_shape = blocks
        visits = self.integers.visits

        def of_example(x: jax.Array) -> Any:
            return pl.BlockSpec((None, *x.shape[1:]), lambda i, b, h: (b, *(0,) * (x.ndim - 1)))

        integers = [self.integers.queries, self.integers.keys, visits.of_queries, visits.of_keys]
        specs = [of_example(x) for x in integers]
        specs[:2] = [given or spec for given, spec in zip(segments, specs[:2], strict=True)]
        shared = [visits.first, self.integers.window]
        specs += [pl.BlockSpec(x.shape, lambda i, b, h: (0,)) for x in shared]
        options: dict[str, Any] = {"name": name, "interpret": self.config.interpret}
        return pl.pallas_call(
            partial(kernel, size=self.size, softcap=self.config.softcap),
            grid=grid,
            in_specs=[*specs, *in_specs],
            out_specs=out_specs,
            out_shape=out_shape,
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
            **options,
        )(*integers, *shared, *arrays)


class _Tile(NamedTuple):
    """Places and segments of a tile of tokens."""

    places: jax.Array  # int [size], in the order of the keys
    segments: jax.Array  # int [size]


def _seen(query: _Tile, key: _Tile, window: jax.Array) -> jax.Array:
    """Returns whether each query sees each key, bool ``[size, size]``."""
    ahead = query.places[:, None] - key.places[None, :]
    return (query.segments[:, None] == key.segments[None, :]) & (ahead >= 0) & (ahead < window)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return lax.dot(x, y, preferred_element_type=jnp.float32)


def _scores(q: jax.Array, k: jax.Array, softcap: float) -> jax.Array:
    scores = _product(q, k.T)
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


def _gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, logsumexp: jax.Array, inner: jax.Array, seen: Any,
    softcap: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Returns the probabilities of a pair of tiles and the gradients of its scores, ``[size, size]``."""
    scores = _scores(q, k, softcap)
    weights = jnp.where(seen, jnp.exp(scores - logsumexp[:, None]), 0.0)
    slope = weights * (_product(g, v.T) - inner[:, None])
    if softcap:
        slope = slope * (1 - (scores / softcap) * (scores / softcap))
    return weights, slope


def _forward_kernel(
    segments: Any, key_segments: Any, visits: Any, visitors: Any, first: Any, window: Any,
    q: Any, k: Any, v: Any, out: Any, logsumexp: Any, *, size: int, softcap: float,
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    del visitors
    number, span = pl.program_id(0), jnp.arange(size)
    query, reach = triton.load(q), window[0]
    queries = _Tile(first[number] + span, triton.load(segments))

    def body(tile: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, mean = carry
        tokens = pl.ds(tile * size, size)
        key, value = triton.load(k.at[tokens, :]), triton.load(v.at[tokens, :])
        seen = _seen(queries, _Tile(tile * size + span, triton.load(key_segments.at[tokens])), reach)
        scores = jnp.where(seen, _scores(query, key, softcap), UNSEEN)
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, before = jnp.exp(scores - new[:, None]), jnp.exp(top - new)
        mean = mean * before[:, None] + _product(weights.astype(value.dtype), value)
        return new, total * before + jnp.sum(weights, axis=1), mean

    column = jnp.zeros((size,), jnp.float32)
    start = column + UNSEEN, column, jnp.zeros(query.shape, jnp.float32)
    top, total, mean = lax.fori_loop(visits[0, number], visits[1, number], body, start)
    triton.store(out, mean / total[:, None])
    triton.store(logsumexp, top + jnp.log(total))


def _queries_kernel(
    segments: Any, key_segments: Any, visits: Any, visitors: Any, first: Any, window: Any,
    q: Any, k: Any, v: Any, g: Any, logsumexp: Any, inner: Any, dq: Any, *, size: int, softcap: float,
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    del visitors
    number, span = pl.program_id(0), jnp.arange(size)
    query, gradient, total, mean = (triton.load(x) for x in (q, g, logsumexp, inner))
    queries, reach = _Tile(first[number] + span, triton.load(segments)), window[0]

    def body(tile: jax.Array, sums: jax.Array) -> jax.Array:
        tokens = pl.ds(tile * size, size)
        key, value = triton.load(k.at[tokens, :]), triton.load(v.at[tokens, :])
        seen = _seen(queries, _Tile(tile * size + span, triton.load(key_segments.at[tokens])), reach)
        _, slope = _gradients(query, key, value, gradient, total, mean, seen, softcap)
        return sums + _product(slope.astype(key.dtype), key)

    sums = lax.fori_loop(visits[0, number], visits[1, number], body, jnp.zeros(query.shape, jnp.float32))
    triton.store(dq, sums.astype(dq.dtype))


def _keys_kernel(
    segments: Any, key_segments: Any, visits: Any, visitors: Any, first: Any, window: Any,
    q: Any, k: Any, v: Any, g: Any, logsumexp: Any, inner: Any, dk: Any, dv: Any, *, size: int, softcap: float,
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    del visits
    number, span, reach = pl.program_id(0), jnp.arange(size), window[0]
    key, value = triton.load(k), triton.load(v)
    keys = _Tile(number * size + span, triton.load(key_segments))

    def body(step: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tile, head = lax.div(step, groups), lax.rem(step, groups)
        tokens = pl.ds(tile * size, size)
        query, gradient = triton.load(q.at[tokens, head, :]), triton.load(g.at[tokens, head, :])
        total, mean = triton.load(logsumexp.at[head, tokens]), triton.load(inner.at[head, tokens])
        queries = _Tile(first[tile] + span, triton.load(segments.at[tokens]))
        seen = _seen(queries, keys, reach)
        weights, slope = _gradients(query, key, value, gradient, total, mean, seen, softcap)
        to_key = sums[0] + _product(slope.T.astype(query.dtype), query)
        return to_key, sums[1] + _product(weights.T.astype(gradient.dtype), gradient)

    groups = q.shape[1]
    sums = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    for run in range(visitors.shape[1]):
        begin, end = visitors[0, run, number], visitors[1, run, number]
        sums = lax.fori_loop(begin * groups, end * groups, body, sums)
    triton.store(dk, sums[0].astype(dk.dtype))
    triton.store(dv, sums[1].astype(dv.dtype))
