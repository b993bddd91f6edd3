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

from nalora_jax.ops.blockwise_attention import UNSEEN, AttentionConfig
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.split_attention import split_attention
from nalora_jax.ops.split_rows import Row
from nalora_jax.ops.split_shard import Integers, Kernels, Options, on_shard, on_shards
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
    attend = partial(on_shard, config=config, numerics=numerics, kernels=_KERNELS, tile=tile)
    return on_shards(attend, q, k, v, row, window, config, sinks)


def _tile(block: int) -> int:
    """Returns the largest tile that divides a block: a power of two."""
    return min(block & -block, _LARGEST)


class _Visits(NamedTuple):
    """The pairs of tiles with visible keys."""

    first: jax.Array  # int32 [tiles], index of a tile's first query among the keys
    of_queries: jax.Array  # int32 [batch, 2, tiles], first tile of keys and the end of the last one
    of_keys: jax.Array  # int32 [batch, 2, runs, tiles of keys], first tile of queries and the end, by run


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, integers: Integers, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Computes `Kernels.forward`."""
    batch, queries, heads, _ = query.shape
    shapes = (_float32(query.shape), _float32((batch, heads, queries)))
    call = _Call.of(query, key, integers, options)
    out, logsumexp = call.by_queries(_forward_kernel, FORWARD, [query, key, value], shapes)
    return out, logsumexp.swapaxes(1, 2)


def _backward(
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
    by_head = [x.swapaxes(1, 2) for x in (logsumexp, inner)]
    arrays = [query, key, value, g.astype(query.dtype), *by_head]
    call = _Call.of(query, key, integers, options)
    (dq,) = call.by_queries(_queries_kernel, QUERIES, arrays, (_like(query),))
    dk, dv = call.by_keys(_keys_kernel, KEYS, arrays, (_like(key), _like(value)))
    return dq, dk, dv


_KERNELS = Kernels(_forward, _backward)


def _float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _visits(integers: Integers, size: int) -> _Visits:
    """Returns the visited pairs of tiles of ``size`` tokens."""
    queries, window = integers.queries, integers.window
    batch, of_keys = integers.keys.segments.shape
    runs = queries.first.shape[0]
    first, tile = queries.first_of_tiles(size)[None], jnp.arange(of_keys // size)[None, None]
    # Of a tile, the first query sees the earliest key: positions grow by one along a segment.
    earliest = jnp.maximum(first - queries.positions[:, ::size], first - window + 1)
    low = jnp.maximum(earliest, 0) // size
    end = jnp.broadcast_to((first + size - 1) // size + 1, low.shape)
    visited = (low[..., None] <= tile) & (tile < end[..., None])  # [batch, tiles, tiles of keys]
    visited = visited.reshape(batch, runs, -1, of_keys // size)
    # The queries that see a tile of keys are neighbours.
    begin = jnp.argmax(visited, axis=2) + (visited.shape[2] * jnp.arange(runs))[None, :, None]
    visitors = jnp.stack([begin, begin + jnp.sum(visited, axis=2)], axis=1)
    return _Visits(first[0], jnp.stack([low, end], axis=1), visitors)


# ---------------------------------------------------------------- kernels


class _Call(NamedTuple):
    """Shapes, integers and options of the calls of one shard."""

    query: jax.Array  # [batch, queries, heads, head_dim]
    key: jax.Array  # [batch, keys, kv_heads, head_dim]
    of_example: list[jax.Array]  # int32 [batch, ...]: segments of queries, of keys; visits of each
    shared: list[jax.Array]  # int32: `_Visits.first`, window [1]
    options: Options

    @classmethod
    def of(cls, query: jax.Array, key: jax.Array, integers: Integers, options: Options) -> _Call:
        """Returns the calls for a shard's arrays."""
        visits = _visits(integers, options.size)
        of_example = [
            integers.queries.segments,
            integers.keys.segments,
            visits.of_queries,
            visits.of_keys,
        ]
        shared = [visits.first, integers.window[None]]
        of_example, shared = jax.tree.map(lambda x: x.astype(jnp.int32), (of_example, shared))
        return cls(query, key, of_example, shared, options)

    def by_queries(self, kernel: Any, name: str, arrays: list[jax.Array], shapes: Any) -> Any:
        """Runs a kernel for each tile of queries, example and head."""
        from jax.experimental import pallas as pl

        size, (batch, queries, heads, dim) = self.options.size, self.query.shape
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

        size, (batch, keys, kv_heads, dim) = self.options.size, self.key.shape
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
        config = self.options.config

        def whole(x: jax.Array) -> Any:
            return pl.BlockSpec((None, *x.shape[1:]), lambda i, b, h: (b, *(0,) * (x.ndim - 1)))

        specs = [whole(x) for x in self.of_example]
        specs[:2] = [given or spec for given, spec in zip(segments, specs[:2], strict=True)]
        specs += [pl.BlockSpec(x.shape, lambda i, b, h: (0,)) for x in self.shared]
        options: dict[str, Any] = {"name": name, "interpret": config.interpret}
        return pl.pallas_call(
            partial(kernel, size=self.options.size, softcap=config.softcap),
            grid=grid,
            in_specs=[*specs, *in_specs],
            out_specs=out_specs,
            out_shape=out_shape,
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
            **options,
        )(*self.of_example, *self.shared, *arrays)


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
