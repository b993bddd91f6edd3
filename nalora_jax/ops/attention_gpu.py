"""Attention on a GPU: cuDNN's flash attention, and Pallas kernels for Triton for long and for split
rows.

cuDNN, through `jax.nn.dot_product_attention`, has priority. It stores no ``[seq, seq]``
probabilities, but visibility is passed as a bf16 mask of that size: 2 GB for a row of 32,768
tokens. If the mask is larger than 256 MB, JAX's kernel for Triton is used, which compares segments
while it computes scores. Cached keys, dropout, and shapes that neither supports use the plain
function, which stores no such array either.

Pallas is imported inside functions, because it costs every process 5 MB and a tenth of a second.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import make_single_device_sharding

from nalora_jax.common.devices import kind_of
from nalora_jax.ops.attention import (
    QKV,
    UNSEEN,
    AttentionConfig,
    Keys,
    apply_sinks,
    is_mapped,
    map_over_devices,
    save_heads,
    self_attention,
    visibility,
)
from nalora_jax.ops.dispatch import AUTO_IMPLEMENTATION, Numerics
from nalora_jax.ops.split_attention import (
    Integers,
    Spread,
    attend_on_shard,
    attend_on_shards,
    split_attention,
)
from nalora_jax.ops.split_rows import Row
from nalora_jax.ops.storage import read_residual, save_residual

log = logging.getLogger(__name__)

CUDNN = "cudnn"
TRITON = "triton"
# Bytes of a mask. With a larger mask a kernel that compares segments is faster.
_LARGEST_BIAS = 256 << 20
# Positions and columns that hold a sink. cuDNN takes even lengths and widths that 8 divides.
_SINK_POSITIONS = 2
_SINK_COLUMNS = 8
# Queries and keys per block of JAX's kernel; the backward pass stores four gradients and uses half
# of it.
_BLOCK = 128
# The names of the kernels for split rows, by which `nalora plan` recognises them, and their matmuls
# of a pair of tiles.
FORWARD = "split_attention_forward"
QUERIES = "split_attention_queries"
KEYS = "split_attention_keys"
PRODUCTS = {FORWARD: 2, QUERIES: 3, KEYS: 4}
SPLIT_TRITON = "split_triton"  # the three kernels in estimates
HEAD_DIMS = (32, 64, 128)
# Most and fewest tokens of a tile.
_LARGEST = 64
_LEAST = 16


@self_attention.implements(CUDNN)
def cudnn_attention(
    q: Array,
    keys: Keys,
    window: Array | int,
    config: AttentionConfig,
    numerics: Numerics,
) -> Array:
    """Computes `self_attention` if cuDNN supports the arguments."""
    rows, seq, heads, head_dim = q.shape
    device_rows = rows
    if config.sharding is not None:
        device_rows, *_ = config.sharding.shard_shape((rows, 1, 1))
    if numerics.operand != "bfloat16" or not cudnn_takes(seq, head_dim, config.softcap):
        return NotImplemented
    if numerics.implementation == AUTO_IMPLEMENTATION and not fits_as_bias(
        device_rows, seq
    ):
        return NotImplemented
    called_seq = seq
    called_dim = head_dim
    if keys.sinks is not None:
        # The operands grow by the sink's key and its columns, see `add_sink_key`.
        called_seq += _SINK_POSITIONS
        called_dim += _SINK_COLUMNS
    q_shape = (rows, called_seq, heads, called_dim)
    k_shape = (rows, called_seq, keys.k.shape[2], called_dim)
    if not compiles(q_shape, k_shape, config.scale, numerics.platform.kind):
        return NotImplemented
    visible = visibility(
        keys.positions, keys.segments, keys.positions, keys.segments, window
    )
    q, k, v = save_heads((q, keys.k, keys.v), config, numerics)
    if keys.sinks is None:
        return dot_product(q, k, v, visible, config.scale).astype(numerics.result)
    operands = add_sink_key(q, k, v, visible, keys.sinks, config.scale)
    out = dot_product(*operands, config.scale)[:, _SINK_POSITIONS:, :, :head_dim]
    return out.astype(numerics.result)


def add_sink_key(
    q: Array, k: Array, v: Array, visible: Array, sinks: Array, scale: float
) -> tuple[Array, Array, Array, Array]:
    """Returns the operands of `dot_product` with one more key, whose score is the sink and whose
    value is 0.

    The key is the first position, which all queries see. The second position is hidden and makes
    the length even. Sinks differ between the query heads that share a key head. Therefore each
    query has the sink in two of the added columns, as the sum of two bf16 numbers, and only the new
    key is not 0 there.

    The arrays have ``seq + 2`` positions and ``head_dim + 8`` columns; the results of `dot_product`
    for the tokens start at position 2.
    """
    scores = lax.stop_gradient(sinks) / scale
    high = lax.reduce_precision(scores, exponent_bits=8, mantissa_bits=7)  # as bf16
    columns = slice(q.shape[-1], q.shape[-1] + 2)
    before = (_SINK_POSITIONS, 0)
    q, k, v = (
        jnp.pad(x, ((0, 0), before, (0, 0), (0, _SINK_COLUMNS))) for x in (q, k, v)
    )
    in_columns = jnp.stack([high, scores - high], axis=-1).astype(q.dtype)
    q = q.at[:, _SINK_POSITIONS:, :, columns].set(in_columns)
    k = k.at[:, 0, :, columns].set(1)
    visible = jnp.pad(visible, ((0, 0), before, before))
    visible = visible.at[:, :, 0].set(True)  # every query sees the sink
    return q, k, v, visible


def cudnn_takes(seq: int, head_dim: int, softcap: float | None) -> bool:
    """Returns True if cuDNN may support rows of ``seq`` tokens; `compiles` tests it."""
    return not softcap and seq % 2 == 0 and head_dim % 8 == 0


def fits_as_bias(rows: float, seq: int) -> bool:
    """Returns True if the bf16 mask ``[rows, 1, seq, seq]`` of a device's rows is small enough."""
    return 2 * rows * seq**2 <= _LARGEST_BIAS


@lru_cache(maxsize=64)
def compiles(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], scale: float, kind: str
) -> bool:
    """Returns True if this version of cuDNN accepts these shapes on GPUs of a kind.

    The program is always lowered for a GPU, and compiled if this process has a GPU of the kind.
    """
    try:
        local = jax.local_devices(backend="gpu")
    except RuntimeError:  # this process has no GPU backend
        local = []
    device = next((device for device in local if kind_of(device) == kind), None)
    place = None
    if device is not None:
        place = make_single_device_sharding(device)
    q, k = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
        for shape in (q_shape, k_shape)
    )
    rows, seq, *_ = q_shape
    visible = jax.ShapeDtypeStruct((rows, seq, seq), jnp.bool_, sharding=place)

    def loss(q: Array, k: Array, v: Array, visible: Array) -> Array:
        return jnp.sum(dot_product(q, k, v, visible, scale))

    try:
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, visible)
        lowered = traced.lower(lowering_platforms=("cuda",))
        if device is not None:
            lowered.compile()
    except Exception as error:  # cuDNN's refusals have no common type
        log.warning(
            "cuDNN attention does not apply to %s (%s); XLA's is used", q_shape, error
        )
        return False
    return True


def dot_product(q: Array, k: Array, v: Array, visible: Array, scale: float) -> Array:
    """Calls cuDNN in bf16 with the conventions of `attention`; ``visible`` is bool ``[batch or 1,
    seq, seq]``."""
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    attend = partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    # Causality is implied by `visible`, but only the flag lets the kernel skip the upper triangle.
    return attend(q, k, v, mask=visible[:, None], is_causal=True).astype(jnp.float32)


@self_attention.implements(TRITON)
def triton_attention(
    q: Array,
    keys: Keys,
    window: Array | int,
    config: AttentionConfig,
    numerics: Numerics,
) -> Array:
    """Computes `self_attention` without sinks, if no window is shorter than the row.

    Positions must grow by one along each segment.
    """
    if not triton_takes(q.shape[1], q.shape[-1], config.windows, config.softcap):
        return NotImplemented
    if keys.sinks is not None or not is_mapped(config, numerics):
        return NotImplemented
    del window
    heads = save_heads((q, keys.k, keys.v), config, numerics)
    segments = jnp.broadcast_to(keys.segments, q.shape[:2])
    attend = map_over_devices(partial(_one_device, config=config), config, config.rows)
    out: Array = attend(tuple(x.astype(numerics.operand) for x in heads), segments)
    return out.astype(numerics.result)


def triton_takes(
    seq: int, head_dim: int, windows: Sequence[int], softcap: float | None
) -> bool:
    """Returns True if the kernel supports rows of ``seq`` tokens: whole blocks, and no shorter
    window."""
    covers_row = bool(windows) and min(windows) >= seq
    return covers_row and seq % _BLOCK == 0 and head_dim in HEAD_DIMS and not softcap


def triton_pairs(seq: int) -> float:
    """Returns the number of query-key pairs in the blocks that causality touches, for one row."""
    return seq * (seq + _BLOCK) / 2


def _one_device(heads: QKV, segments: Array, *, config: AttentionConfig) -> Array:
    """Computes one device's part: ``[batch, seq, heads, head_dim]`` in q's dtype."""
    with warnings.catch_warnings():
        # JAX 0.12 deprecates it in favour of a separate package (tokamax), which has no stable
        # version yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    half = _BLOCK // 2
    sizes = BlockSizes(_BLOCK, _BLOCK, half, half, half, half)
    # The kernel does not group heads: a key head is repeated for every query head that reads it.
    q, k, v = heads
    groups = q.shape[2] // k.shape[2]
    k = jnp.repeat(k, groups, axis=2)
    v = jnp.repeat(v, groups, axis=2)
    out: Array = mha(
        q,
        k,
        v,
        segments,
        sm_scale=config.scale,
        causal=True,
        block_sizes=sizes,
        interpret=config.interpret,
    )
    return out


# ---------------------------------------------------------------- rows split over devices


@split_attention.implements(TRITON)
def triton_split_attention(
    heads: QKV,
    row: Row,
    window: Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    sinks: Array | None = None,
) -> Array:
    """Computes `split_attention` if tiles divide the blocks and the row has no image tokens."""
    _, length, _, head_dim = heads[0].shape
    block = length // 2
    power_of_two = block & -block  # the largest one that divides a block
    tile = min(power_of_two, _LARGEST)
    if tile < _LEAST or head_dim not in HEAD_DIMS or row.starts is not None:
        return NotImplemented

    def attend(heads: QKV, of: Integers, spread: Spread, sinks: Array | None) -> Array:
        """Returns the attention of a shard's queries, see `attend_on_shard`."""
        return _attention(heads, of, sinks, _Options(spread, tile, config, numerics))

    local = partial(attend_on_shard, config=config, attend=attend, tile=tile)
    return attend_on_shards(local, heads, row, window, config, sinks)


class _Options(NamedTuple):
    """Static options of a shard's attention."""

    spread: Spread
    size: int  # queries and keys of a tile
    config: AttentionConfig
    numerics: Numerics


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(
    heads: QKV, integers: Integers, sinks: Array | None, options: _Options
) -> Array:
    """Computes attention of a shard's queries to ``options.spread`` of its keys."""
    return _fwd(heads, integers, sinks, options)[0]


def _fwd(
    heads: QKV, integers: Integers, sinks: Array | None, options: _Options
) -> tuple[Array, Any]:
    """Returns the result ``[batch, queries, heads, head_dim]`` and the residuals of `_bwd`."""
    q, k, v = heads
    save = partial(
        save_residual, dtype=options.numerics.residual, numerics=options.numerics
    )
    arrays = tuple(save(x) for x in (q * options.config.scale, k, v))
    operands = _operands(arrays, options)
    batch, queries, n, _ = q.shape
    results = [
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        jax.ShapeDtypeStruct((batch, n, queries), jnp.float32),
    ]
    out, logsumexp = _call(
        _forward_kernel, FORWARD, operands, results, integers, options
    )
    logsumexp = logsumexp.swapaxes(1, 2)  # [batch, queries, heads]
    if sinks is not None:
        out, logsumexp = apply_sinks(
            out, logsumexp[..., None], sinks[None, None, :, None]
        )
        logsumexp = logsumexp[..., 0]
    saved = save(out)
    total = save_residual(logsumexp, "float32", options.numerics)
    # Empty arrays carry the dtypes of the inputs: residuals have to be arrays.
    like = tuple(jnp.zeros((0,), x.dtype) for x in heads)
    residuals = arrays, saved, total, integers, like
    return read_residual(saved, options.numerics.result), residuals


def _bwd(options: _Options, residuals: Any, g: Array) -> tuple[Any, ...]:
    """Returns the gradients of q, k and v, in the dtypes of the inputs; integers and sinks receive
    none."""
    heads, out, logsumexp, integers, like = residuals
    query, key, value = _operands(heads, options)
    g = g.astype(jnp.float32)
    # [batch, queries, heads]: the mean of the loss's gradient by the probabilities, which the
    # gradient of the softmax subtracts.
    inner = jnp.sum(g * read_residual(out, jnp.float32), axis=-1)
    by_head = [x.swapaxes(1, 2) for x in (read_residual(logsumexp, jnp.float32), inner)]
    arrays = [query, key, value, g.astype(query.dtype), *by_head]
    (dq,) = _call(_queries_kernel, QUERIES, arrays, [query], integers, options)
    dk, dv = _call(_keys_kernel, KEYS, arrays, [key, value], integers, options)
    # The transpose of ``spread`` adds up what all shards computed for this shard's keys.
    part = jax.ShapeDtypeStruct(jax.tree.leaves(heads[1])[0].shape, dk.dtype)
    back = jax.linear_transpose(options.spread, part)
    grads = dq * options.config.scale, *back(dk), *back(dv)
    of_heads = tuple(x.astype(y.dtype) for x, y in zip(grads, like, strict=True))
    return of_heads, None, None


_attention.defvjp(_fwd, _bwd)


def _operands(heads: Any, options: _Options) -> list[Array]:
    """Returns a shard's queries, and the keys and values that they may see, from the saved
    heads."""
    spread = [heads[0], *(jax.tree.map(options.spread, x) for x in heads[1:])]
    return [read_residual(x, options.numerics.operand) for x in spread]


def _visits(integers: Integers, size: int) -> tuple[Array, Array, Array]:
    """Returns the pairs of tiles of ``size`` tokens that have visible keys, as three int arrays.

    Of the tiles of queries: ``[tiles]``, the index of a tile's first query among the keys;
    ``[batch, 2, tiles]``, the first tile of keys that it sees and the end of the last one. Of the
    tiles of keys: ``[batch, 2, runs, tiles of keys]``, the first tile of queries that sees it in
    each run (see `Queries`) and the end of the last one.
    """
    queries = integers.queries
    window = integers.window
    batch, of_keys = integers.keys.segments.shape
    runs = queries.first.shape[0]
    tiles_of_run = queries.positions.shape[1] // size // runs
    offsets = size * jnp.arange(tiles_of_run)
    # [runs, tiles of a run] -> [1, tiles]
    first = (queries.first[:, None] + offsets[None]).reshape(1, -1)
    tile = jnp.arange(of_keys // size)[None, None]
    # Of a tile, the first query sees the earliest key: positions grow by one along a segment.
    earliest = jnp.maximum(first - queries.positions[:, ::size], first - window + 1)
    low = jnp.maximum(earliest, 0) // size
    end = jnp.broadcast_to((first + size - 1) // size + 1, low.shape)
    # [batch, tiles, tiles of keys]
    visited = (low[..., None] <= tile) & (tile < end[..., None])
    visited = visited.reshape(batch, runs, tiles_of_run, of_keys // size)
    # The queries of a run that see a tile of keys are neighbours.
    first_of_run = tiles_of_run * jnp.arange(runs)
    begin = jnp.argmax(visited, axis=2) + first_of_run[None, :, None]
    visitors = jnp.stack([begin, begin + jnp.sum(visited, axis=2)], axis=1)
    return first[0], jnp.stack([low, end], axis=1), visitors


# ---------------------------------------------------------------- kernels


def _call(
    kernel: Any,
    name: str,
    arrays: list[Array],
    results: Any,
    integers: Integers,
    options: _Options,
) -> Any:
    """Runs a kernel for each tile of queries, or of keys for `KEYS`, and each example and head.

    Args:
      kernel: one of the functions below.
      name: its name, by which the grid is chosen.
      arrays: q, k and v ``[batch, tokens, heads, head_dim]``; for a gradient also the gradient of
        the results, like q, and two numbers of each query ``[batch, heads, queries]``.
      results: arrays or descriptions with the shapes and dtypes of the results.
      integers: positions, segments and window.
      options: static options.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    batch, queries, heads, dim = arrays[0].shape
    _, keys, kv_heads, _ = arrays[1].shape
    size = options.size
    config = options.config
    groups = heads // kv_heads
    first, of_queries, of_keys = _visits(integers, size)
    tile = pl.BlockSpec((None, size, None, dim), lambda i, b, h: (b, i, h, 0))
    if name == KEYS:
        grid = (keys // size, batch, kv_heads)
        visits = of_keys
        all_queries = pl.BlockSpec(
            (None, queries, groups, dim), lambda i, b, h: (b, 0, h, 0)
        )
        numbers = pl.BlockSpec((None, groups, queries), lambda i, b, h: (b, h, 0))
        specs = [all_queries, tile, tile, all_queries, numbers, numbers]
        out_specs = [tile, tile]
    else:
        grid = (queries // size, batch, heads)
        visits = of_queries
        all_keys = pl.BlockSpec(
            (None, keys, None, dim), lambda i, b, h: (b, 0, h // groups, 0)
        )
        number = pl.BlockSpec((None, None, size), lambda i, b, h: (b, h, i))
        specs = [tile, all_keys, all_keys, tile, number, number]
        out_specs = [tile, number]

    def of_example(x: Array) -> Any:
        """Returns the spec of one example's ``x``, entire."""
        _, *shape = x.shape
        start = (0,) * len(shape)
        return pl.BlockSpec((None, *shape), lambda i, b, h: (b, *start))

    segments = [integers.queries.segments, integers.keys.segments]
    segment_specs = [of_example(x) for x in segments]
    # The segments of the tile itself; of the other side the kernel reads all.
    segment_specs[int(name == KEYS)] = pl.BlockSpec(
        (None, size), lambda i, b, h: (b, i)
    )
    shared = [first, integers.window[None]]
    shared_specs = [pl.BlockSpec(x.shape, lambda i, b, h: (0,)) for x in shared]
    kernel_options: dict[str, Any] = {"name": name, "interpret": config.interpret}
    return pl.pallas_call(
        partial(kernel, size=size, softcap=config.softcap),
        grid=grid,
        in_specs=[
            *segment_specs,
            of_example(visits),
            *shared_specs,
            *specs[: len(arrays)],
        ],
        out_specs=out_specs[: len(results)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        **kernel_options,
    )(*(x.astype(jnp.int32) for x in (*segments, visits, *shared)), *arrays)


def _seen(
    places: Array,
    segments: Array,
    key_places: Array,
    key_segments: Array,
    window: Array,
) -> Array:
    """Returns whether each query of a tile sees each key of a tile, bool ``[size, size]``;
    ``places`` are indices in the row of keys."""
    distance = places[:, None] - key_places[None, :]
    same_segment = segments[:, None] == key_segments[None, :]
    return same_segment & (distance >= 0) & (distance < window)


def _product(x: Array, y: Array) -> Array:
    return lax.dot(x, y, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, softcap: float) -> Array:
    """Returns the scores of a tile of queries and a tile of keys, float32 ``[size, size]``."""
    scores = _product(q, k.T)
    if not softcap:
        return scores
    return softcap * jnp.tanh(scores / softcap)


def _gradients(
    q: Array, k: Array, v: Array, g: Array, logsumexp: Array, inner: Array, seen: Any,
    softcap: float,
) -> tuple[Array, Array]:  # fmt: skip
    """Returns the probabilities of a pair of tiles and the gradients of its scores, ``[size,
    size]``."""
    scores = _scores(q, k, softcap)
    weights = jnp.where(seen, jnp.exp(scores - logsumexp[:, None]), 0.0)
    slope = weights * (_product(g, v.T) - inner[:, None])
    if softcap:
        # The derivative of the cap, 1 - tanh^2.
        tanh = scores / softcap
        slope = slope * (1 - tanh * tanh)
    return weights, slope


def _forward_kernel(
    segments: Any, key_segments: Any, visits: Any, first: Any, window: Any,
    q: Any, k: Any, v: Any, out: Any, logsumexp: Any, *, size: int, softcap: float,
) -> None:  # fmt: skip
    """Writes one tile of ``out [size, head_dim]`` and its ``logsumexp [size]``, summing the softmax
    over the tiles of keys that the queries reach (arXiv 2205.14135)."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    number = pl.program_id(0)
    span = jnp.arange(size)
    query = triton.load(q)
    places = first[number] + span
    segment = triton.load(segments)

    def body(tile: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        """Adds a tile of keys to the running maximum, sum of weights and weighted values."""
        top, total, mean = carry
        tokens = pl.ds(tile * size, size)
        key = triton.load(k.at[tokens, :])
        value = triton.load(v.at[tokens, :])
        seen = _seen(
            places,
            segment,
            tile * size + span,
            triton.load(key_segments.at[tokens]),
            window[0],
        )
        scores = jnp.where(seen, _scores(query, key, softcap), UNSEEN)
        new = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp(scores - new[:, None])
        # Earlier sums are relative to the earlier maximum.
        before = jnp.exp(top - new)
        mean = mean * before[:, None] + _product(weights.astype(value.dtype), value)
        return new, total * before + jnp.sum(weights, axis=1), mean

    column = jnp.zeros((size,), jnp.float32)
    start = column + UNSEEN, column, jnp.zeros(query.shape, jnp.float32)
    top, total, mean = lax.fori_loop(visits[0, number], visits[1, number], body, start)
    triton.store(out, mean / total[:, None])
    triton.store(logsumexp, top + jnp.log(total))


def _queries_kernel(
    segments: Any, key_segments: Any, visits: Any, first: Any, window: Any,
    q: Any, k: Any, v: Any, g: Any, logsumexp: Any, inner: Any, dq: Any,
    *, size: int, softcap: float,
) -> None:  # fmt: skip
    """Writes the gradient of one tile of queries, ``dq [size, head_dim]``, without the factor
    ``scale``."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    number = pl.program_id(0)
    span = jnp.arange(size)
    query, gradient, total, mean = (triton.load(x) for x in (q, g, logsumexp, inner))
    places = first[number] + span
    segment = triton.load(segments)

    def body(tile: Array, sums: Array) -> Array:
        """Adds the gradient from a tile of keys, ``[size, head_dim]``."""
        tokens = pl.ds(tile * size, size)
        key = triton.load(k.at[tokens, :])
        value = triton.load(v.at[tokens, :])
        seen = _seen(
            places,
            segment,
            tile * size + span,
            triton.load(key_segments.at[tokens]),
            window[0],
        )
        _, slope = _gradients(query, key, value, gradient, total, mean, seen, softcap)
        return sums + _product(slope.astype(key.dtype), key)

    sums = lax.fori_loop(
        visits[0, number], visits[1, number], body, jnp.zeros(query.shape, jnp.float32)
    )
    triton.store(dq, sums.astype(dq.dtype))


def _keys_kernel(
    segments: Any, key_segments: Any, visits: Any, first: Any, window: Any,
    q: Any, k: Any, v: Any, g: Any, logsumexp: Any, inner: Any, dk: Any, dv: Any,
    *, size: int, softcap: float,
) -> None:  # fmt: skip
    """Writes the gradients of one tile of keys and values, ``dk`` and ``dv [size, head_dim]``,
    summed over the query heads that share them."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    number = pl.program_id(0)
    span = jnp.arange(size)
    key = triton.load(k)
    value = triton.load(v)
    of_keys = triton.load(key_segments)

    def body(step: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        """Adds the gradients of keys and values from a tile of queries."""
        # A step is one tile of queries of one query head that shares these keys.
        tile = lax.div(step, groups)
        head = lax.rem(step, groups)
        tokens = pl.ds(tile * size, size)
        query = triton.load(q.at[tokens, head, :])
        gradient = triton.load(g.at[tokens, head, :])
        total = triton.load(logsumexp.at[head, tokens])
        mean = triton.load(inner.at[head, tokens])
        places = first[tile] + span
        segment = triton.load(segments.at[tokens])
        seen = _seen(places, segment, number * size + span, of_keys, window[0])
        weights, slope = _gradients(
            query, key, value, gradient, total, mean, seen, softcap
        )
        to_key = sums[0] + _product(slope.T.astype(query.dtype), query)
        return to_key, sums[1] + _product(weights.T.astype(gradient.dtype), gradient)

    groups = q.shape[1]
    sums = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    for run in range(visits.shape[1]):
        begin = visits[0, run, number]
        end = visits[1, run, number]
        sums = lax.fori_loop(begin * groups, end * groups, body, sums)
    triton.store(dk, sums[0].astype(dk.dtype))
    triton.store(dv, sums[1].astype(dv.dtype))
