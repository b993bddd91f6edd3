"""Causal attention with grouped heads, segments, sliding windows, soft caps and caches, in plain XLA.

Integers, not a stored mask, decide which keys a query sees: those with its segment, at positions up
to its own and fewer than ``window`` before it. Packing, padding, windows by layer and cached keys
all follow this rule. Tokens of a segment are in order along the sequence, so keys after a query's
block are never read.

Training computes one block of queries at a time. No score outlives its block, forward or backward.
The backward pass recomputes the probabilities from the saved queries, keys and log-sum-exps, as
flash attention does (arXiv 2205.14135). Autodiff would save ``[heads, seq, seq]`` probabilities and
differentiate the softmax in more passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.ops.dispatch import Numerics, operation
from nalora_jax.ops.reductions import in_tiles, of_tiles
from nalora_jax.ops.storage import (
    Kernel,
    Stored,
    expand,
    read_residual,
    round_and_save,
    rounded,
    save_residual,
)

# Queries whose scores are computed together: longer blocks are split, so that memory grows with the
# number of keys only.
PIECE = 256
# Score of unseen keys: far below any score, but finite, so that a row that sees no key (padding)
# has no NaN.
UNSEEN = -1e30
# Cached keys whose scores are computed together. Shorter caches are read as a whole.
CACHE_BLOCK = 1024


@dataclass(frozen=True)
class AttentionConfig:
    """Static options of the scores, and facts that a kernel must know before it runs."""

    scale: float  # multiplies q . k
    softcap: float = 0.0  # c tanh(score / c); 0: none
    dropout: float = 0.0  # rate on the probabilities
    windows: tuple[int, ...] = ()  # all values of the window, ascending; () if no window is used
    sharding: NamedSharding | None = None  # sharding of [batch, seq, d_model] on a mesh
    interpret: bool = False  # run Pallas kernels in Python, for tests
    recomputed: str = ""  # letters of "qkv": arrays that follow from saved ones without a matmul

    @property
    def rows(self) -> P:
        """The spec of arrays ``[batch, ...]`` on the mesh."""
        return P(None if self.sharding is None else (*self.sharding.spec, None)[0])

    @property
    def head_axis(self) -> str | None:
        """The mesh axis that splits heads; None if the mesh does not have it."""
        if self.sharding is None or "tensor" not in self.sharding.mesh.shape:
            return None
        return "tensor"


class Keys(NamedTuple):
    """Keys and values with the integers that decide which queries see them."""

    k: jax.Array  # [batch, keys, kv_heads, head_dim]
    v: jax.Array  # [batch, keys, kv_heads, head_dim]
    positions: jax.Array  # int [batch or 1, keys]
    segments: jax.Array  # int [batch or 1, keys]; 0: empty
    # int [batch or 1, keys], the first position that sees a key, if not the key's own: tokens of one
    # image that see each other all have the position of the image's first token.
    starts: jax.Array | None = None
    # float32 [heads], a score of each head that every query sees and that has no value (`with_sinks`);
    # frozen, not scaled, not capped.
    sinks: jax.Array | None = None
    cached: CachedKeys | None = None  # keys of earlier calls, seen under the same rule


class CachedKeys(NamedTuple):
    """Keys and values of earlier calls in any storage form.

    Their layout is the fastest for matmuls of a single token.
    """

    k: Kernel  # [batch, kv_heads, head_dim, slots]
    v: Kernel  # [batch, kv_heads, slots, head_dim]
    positions: jax.Array  # int [batch or 1, slots]
    segments: jax.Array  # int [batch or 1, slots]; 0: empty


@operation
def attention(
    q: jax.Array,
    keys: Keys,
    window: jax.Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    *,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Computes softmax attention of every token over the tokens that it sees.

    Args:
      q: ``[batch, seq, heads, head_dim]``; head h reads key head ``h // (heads // kv_heads)``.
      keys: keys of the same tokens and of earlier calls.
      window: scalar; a query at position p sees positions in ``(p - window, p]``.
      config: scale, soft cap, dropout.
      numerics: dtypes of operands, of saved arrays and of the result; sums and softmax are float32.
      dropout_rng: key for ``config.dropout``; None for no dropout.

    Returns:
      ``[batch, seq, heads, head_dim]`` in ``numerics.result``.
    """
    chex.assert_rank([q, keys.k, keys.v], 4)
    chex.assert_equal_shape([keys.k, keys.v])
    # A cache without slots: there were no earlier calls.
    if keys.cached is not None and keys.cached.positions.shape[1] == 0:
        keys = keys._replace(cached=None)
    plain = not drops(config, dropout_rng)
    if keys.cached is None and keys.starts is None and plain:
        return _blockwise(q, keys, window, config, numerics)
    if (
        keys.cached is not None
        and q.shape[1] > 1
        and keys.cached.positions.shape[1] > CACHE_BLOCK
        and plain
    ):
        out = attention_over_cache(q, keys, keys.cached, window, config, numerics)
    else:
        out = attend_in_tiles(q, keys[2:4], keys, window, config, numerics, dropout_rng)
    return out.astype(numerics.result)


def drops(config: AttentionConfig, dropout_rng: jax.Array | None) -> bool:
    """Returns True if dropout is applied to the probabilities."""
    return dropout_rng is not None and config.dropout > 0


def fits_kernel(
    keys: Keys, config: AttentionConfig, numerics: Numerics, dropout_rng: jax.Array | None
) -> bool:
    """Returns True if a Pallas kernel can compute `attention`: of tokens over themselves, without dropout.

    The compiler does not partition a Pallas call: on several devices it is mapped over the sharding.
    """
    mapped = config.sharding is not None or numerics.platform.devices == 1
    return mapped and keys.cached is None and keys.starts is None and not drops(config, dropout_rng)


def over_devices(attend: Callable[..., jax.Array], config: AttentionConfig, *more: Any) -> Any:
    """Returns ``attend(q, k, v, *others)``, mapped over the mesh if there is one.

    Each device has its rows and heads of q, k and v. ``more`` are the specs of the other arguments.
    """
    if config.sharding is None:
        return attend
    heads = P(*config.rows, None, config.head_axis)
    specs = (heads, heads, heads, *more)
    return jax.shard_map(
        attend, mesh=config.sharding.mesh, in_specs=specs, out_specs=heads, check_vma=False
    )


# ---------------------------------------------------------------- scores


def visibility(
    positions: jax.Array,
    segments: jax.Array,
    key_positions: jax.Array,
    key_segments: jax.Array,
    window: jax.Array | int,
    key_starts: jax.Array | None = None,
) -> jax.Array:
    """Returns whether each query sees each key: bool ``[batch or 1, queries, keys]``.

    All inputs are int ``[batch or 1, ...]``. A key is seen by queries at its own position and
    later, or starting at ``key_starts``.
    """
    ahead = positions[:, :, None] - key_positions[:, None, :]
    since = ahead
    if key_starts is not None:
        since = positions[:, :, None] - key_starts[:, None, :]
    same = segments[:, :, None] == key_segments[:, None, :]
    return same & (since >= 0) & (ahead < window)


def with_sinks(out: jax.Array, logsumexp: jax.Array, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the result and the log-sum-exps of a softmax with one more score per head, the sink.

    A sink has no value: its probability is lost. Gradients need no other change, since they follow
    from the probabilities ``exp(score - logsumexp)``.

    Args:
      out: results without sinks.
      logsumexp: float32, of the rank of ``out``.
      sinks: float32, of the same rank.
    """
    total = jnp.logaddexp(logsumexp, lax.stop_gradient(sinks))
    return (out * jnp.exp(logsumexp - total)).astype(out.dtype), total


def capped(scores: jax.Array, config: AttentionConfig) -> jax.Array:
    """Returns ``c tanh(score / c)``, or the scores if there is no soft cap."""
    if not config.softcap:
        return scores
    return config.softcap * jnp.tanh(scores / config.softcap)


def by_key_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """Returns ``[batch, kv_heads, groups, seq, head_dim]`` of ``[batch, seq, heads, head_dim]``."""
    batch, seq, _, dim = x.shape
    return x.reshape(batch, seq, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)


def by_token(x: jax.Array) -> jax.Array:
    """Computes the inverse of `by_key_head`."""
    batch, kv_heads, groups, seq, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, seq, kv_heads * groups, dim)


def product(equation: str, x: jax.Array, y: jax.Array, numerics: Numerics) -> jax.Array:
    """Computes `jnp.einsum` with operands rounded to ``numerics.operand`` and a float32 result."""
    operands = (rounded(side, numerics.operand, numerics) for side in (x, y))
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def saved_heads(
    q: jax.Array, k: jax.Array, v: jax.Array, config: AttentionConfig, numerics: Numerics
) -> tuple[jax.Array, ...]:
    """Returns queries, keys and values of a kernel, saved for the backward pass unless ``config`` recomputes them."""
    named = zip("qkv", (q, k, v), strict=True)
    return tuple(x if name in config.recomputed else round_and_save(x, numerics) for name, x in named)


def block_size(seq: int) -> int:
    """Returns the queries per block.

    Blocks are small enough to skip most of the upper triangle; at most 8 are compiled.
    """
    # Measured on a CPU: 32 makes a step with rows of 128 tokens 3% to 5% faster, and steps with
    # rows of 48 or 256 up to 3% slower.
    size = max(32 if 128 <= seq < 256 else 64, -(-seq // 8))
    if size <= PIECE:
        return size
    return -(-size // PIECE) * PIECE


def blocks(seq: int) -> Iterator[tuple[int, int]]:
    """Yields first and last position (exclusive) of every block of queries.

    The length of a long block is a multiple of `PIECE`.
    """
    size, start = block_size(seq), 0
    while start < seq:
        length = min(size, seq - start)
        if length > PIECE:
            length -= length % PIECE
        yield start, start + length
        start += length


# ---------------------------------------------------------------- training


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _blockwise(
    q: jax.Array, keys: Keys, window: jax.Array | int, config: AttentionConfig, numerics: Numerics
) -> jax.Array:
    """Computes `attention` without cached keys, dropout and ``starts``; sinks receive no gradient."""
    return _fwd(q, keys, window, config, numerics)[0]


def _fwd(
    q: jax.Array, keys: Keys, window: jax.Array | int, config: AttentionConfig, numerics: Numerics
) -> tuple[jax.Array, Any]:
    kv_heads = keys.k.shape[2]
    save = partial(save_residual, dtype=numerics.residual, numerics=numerics)
    heads = tuple(save(by_key_head(x, kv_heads)) for x in (q * config.scale, keys.k, keys.v))
    places = keys.positions, keys.segments

    def attended(start: int, end: int) -> Any:
        """Returns the results and log-sum-exps of a block of queries."""
        seen = _Seen.of(heads, places, window, end)

        def step(carry: None, rows: Any) -> tuple[None, Any]:
            scores, unseen = _scores(seen, config, numerics, *rows)
            scores = scores + unseen
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            # The softmax's division follows the matmul with the values: a pass over head_dim instead
            # of all keys.
            out = product("bkgqt,bktd->bkgqd", weights, seen.value, numerics) / total
            return carry, (out, top + jnp.log(total))

        return _by_pieces(step, None, _rows((heads[0], *_columns(places)), start, end))[1]

    outs, totals = zip(*(attended(*block) for block in blocks(q.shape[1])), strict=True)
    # [batch, kv_heads, groups, seq, head_dim or 1]
    out, logsumexp = jnp.concatenate(outs, -2), jnp.concatenate(totals, -2)
    if keys.sinks is not None:
        out, logsumexp = with_sinks(out, logsumexp, keys.sinks.reshape(1, kv_heads, -1, 1, 1))
    like = tuple(jnp.zeros((0,), x.dtype) for x in (q, keys.k, keys.v))
    saved = save(out)
    total = save_residual(logsumexp, "float32", numerics)
    return by_token(read_residual(saved, numerics.result)), (heads, saved, total, places, window, like)


def _bwd(config: AttentionConfig, numerics: Numerics, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
    heads, out, logsumexp, places, window, like = residuals
    kv_heads, seq = heads[1].shape[1], g.shape[1]
    g = by_key_head(g.astype(jnp.float32), kv_heads)
    inner = jnp.sum(g * read_residual(out, jnp.float32), axis=-1, keepdims=True)
    dq: list[jax.Array] = []
    dk = dv = jnp.zeros((g.shape[0], kv_heads, g.shape[-1], seq), jnp.float32)
    by_query = heads[0], *_columns(places), logsumexp, g, inner
    # The last block first: only it adds to all keys, so that the other blocks add to parts of its
    # result in place.
    for start, end in reversed(list(blocks(seq))):
        step = partial(_gradients, _Seen.of(heads, places, window, end), config, numerics)
        sums = (dk[..., :end], dv[..., :end])
        sums, dq_block = _by_pieces(step, sums, _rows(by_query, start, end))
        dk, dv = (x.at[..., :end].set(new) for x, new in zip((dk, dv), sums, strict=True))
        dq.append(dq_block)
    # The barrier keeps XLA:CPU from fusing the transpose into a matmul, which it cannot run in
    # bf16.
    dk, dv = (x.swapaxes(2, 3)[:, :, None] for x in lax.optimization_barrier((dk, dv)))
    grads = (by_token(jnp.concatenate(dq[::-1], -2)) * config.scale, by_token(dk), by_token(dv))
    dq_all, dk, dv = (x.astype(y.dtype) for x, y in zip(grads, like, strict=True))
    return dq_all, Keys(dk, dv, None, None), None  # type: ignore[arg-type]


def _gradients(
    seen: _Seen,
    config: AttentionConfig,
    numerics: Numerics,
    sums: tuple[jax.Array, jax.Array],
    rows: tuple[Any, ...],
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Adds the contributions of some queries to ``dk`` and ``dv``, and returns their ``dq``, too.

    ``dk`` and ``dv`` are ``[..., head_dim, keys]``.
    """
    query, positions, segments, logsumexp, g, inner = rows
    scores, unseen = _scores(seen, config, numerics, query, positions, segments)
    weights = jnp.exp(scores + (unseen - logsumexp))
    slope = weights * (product("bkgqd,bktd->bkgqt", g, seen.value, numerics) - inner)
    if config.softcap:
        slope = slope * (1 - jnp.square(scores / config.softcap))
    # Queries on the left: a matmul transposes its left operand, and scores are wider than heads.
    dk = sums[0] + product("bkgqd,bkgqt->bkdt", read_residual(query, jnp.float32), slope, numerics)
    dv = sums[1] + product("bkgqd,bkgqt->bkdt", g, weights, numerics)
    return (dk, dv), product("bkgqt,bktd->bkgqd", slope, seen.key, numerics)


_blockwise.defvjp(_fwd, _bwd)


def _by_pieces(step: Any, carry: Any, rows: tuple[Any, ...]) -> Any:
    """Runs ``step(carry, rows)`` on pieces of the rows and joins the results.

    Rows are on axis -2.
    """
    length = rows[0].shape[-2]
    if length <= PIECE:
        return step(carry, rows)
    split = partial(_split, count=length // PIECE)
    carry, outputs = lax.scan(step, carry, jax.tree.map(split, rows))
    return carry, jax.tree.map(_unsplit, outputs)


def _split(x: jax.Array, count: int) -> jax.Array:
    """Returns ``[count, ..., rows / count, n]`` of ``[..., rows, n]``."""
    return jnp.moveaxis(x.reshape(*x.shape[:-2], count, -1, x.shape[-1]), -3, 0)


def _unsplit(x: jax.Array) -> jax.Array:
    """Computes the inverse of `_split`."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _rows(arrays: Any, start: int, end: int) -> Any:
    """Returns some rows (axis -2) of arrays or of saved ones in any storage form."""
    return jax.tree.map(lambda leaf: leaf[..., start:end, :], arrays)


def _columns(places: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns positions and segments ``[batch or 1, seq, 1]``, with the axis of rows that `_rows` reads."""
    positions, segments = places
    return positions[..., None], segments[..., None]


class _Seen(NamedTuple):
    """The keys up to a block's end, which the block's queries may see."""

    key: jax.Array  # [batch, kv_heads, keys, head_dim]
    value: jax.Array  # the same
    positions: jax.Array  # int [batch or 1, keys]
    segments: jax.Array  # int [batch or 1, keys]
    window: jax.Array | int

    @classmethod
    def of(cls, heads: Any, places: tuple[jax.Array, ...], window: jax.Array | int, end: int) -> _Seen:
        """Returns the first ``end`` of the saved ``[batch, kv_heads, 1, seq, head_dim]``."""
        saved = jax.tree.map(lambda leaf: leaf[:, :, 0, :end], heads[1:])
        key, value = (read_residual(x, jnp.float32) for x in saved)
        positions, segments = (x[:, :end] for x in places)
        return cls(key, value, positions, segments, window)


def _scores(
    seen: _Seen,
    config: AttentionConfig,
    numerics: Numerics,
    query: jax.Array | Stored,
    positions: jax.Array,
    segments: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns capped scores ``[batch, kv_heads, groups, rows, keys]`` and their mask.

    The mask is 0 for seen keys and `UNSEEN` for the others.
    """
    # The barrier ties the mask to the queries. Without it XLA computes the masks of all layers
    # first: [batch, seq, seq] each.
    floats, positions = lax.optimization_barrier((read_residual(query, jnp.float32), positions))
    scores = capped(product("bkgqd,bktd->bkgqt", floats, seen.key, numerics), config)
    visible = visibility(positions[..., 0], segments[..., 0], seen.positions, seen.segments, seen.window)
    return scores, jnp.where(visible[:, None, None], 0.0, UNSEEN)


# ---------------------------------------------------------------- short caches, dropout, given keys


def attend_in_tiles(
    q: jax.Array,
    here: tuple[jax.Array, jax.Array],
    keys: Keys,
    window: jax.Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Computes attention of queries to all given keys, at most `PIECE` queries at a time, in float32.

    ``here`` has the queries' positions and segments, int ``[batch or 1, seq]``. If there are several
    tiles, the backward pass recomputes the scores of each.
    """
    seq = q.shape[1]
    tiles = -(-seq // PIECE)
    attend = partial(_attend, keys=keys, window=window, config=config, numerics=numerics)
    if tiles == 1:
        return attend(q, here, rng=dropout_rng)

    @jax.checkpoint
    def tile(_: None, rows: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        number, query, positions, segments = rows
        rng = None if dropout_rng is None else jax.random.fold_in(dropout_rng, number)
        return None, attend(query, (positions, segments), rng=rng)

    out = lax.scan(tile, None, (jnp.arange(tiles), *(in_tiles(x, tiles) for x in (q, *here))))[1]
    return of_tiles(out, seq)


def _attend(
    q: jax.Array,
    here: tuple[jax.Array, jax.Array],
    keys: Keys,
    window: jax.Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    rng: jax.Array | None,
) -> jax.Array:
    """Computes one block of queries against given keys; its scores are not stored outside of it."""
    batch, seq, heads, dim = q.shape
    groups = heads // keys.k.shape[2]
    # [batch, kv_heads, groups * seq, head_dim]: one matrix per key head
    q = by_key_head(q, keys.k.shape[2]).reshape(batch, -1, groups * seq, dim)
    sources = [source for source in (keys.cached, keys) if source is not None]

    def masked_scores(source: Keys | CachedKeys) -> jax.Array:
        """Returns masked scores ``[batch, kv_heads, groups, seq, keys]`` in float32."""
        if isinstance(source, CachedKeys):
            scores, starts = product("bkqd,bkdt->bkqt", q, expand(source.k), numerics), None
        else:
            scores = product("bkqd,bktd->bkqt", q, source.k.transpose(0, 2, 1, 3), numerics)
            starts = source.starts
        scores = capped(scores * config.scale, config)
        visible = visibility(*here, source.positions, source.segments, window, starts)
        scores = scores.reshape(*scores.shape[:2], groups, -1, scores.shape[-1])
        return jnp.where(visible[:, None, None], scores, UNSEEN)

    # [batch, kv_heads, groups, seq, all keys]
    scored = jnp.concatenate([masked_scores(source) for source in sources], -1)
    top = lax.stop_gradient(jnp.max(scored, axis=-1, keepdims=True))
    if keys.sinks is not None:
        sink = lax.stop_gradient(keys.sinks).reshape(1, -1, groups, 1, 1)
        top = jnp.maximum(top, sink)
    weights = jnp.exp(scored - top)
    # The softmax's division follows the matmul with the values: a pass over [seq, head_dim] instead
    # of [seq, keys].
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if keys.sinks is not None:
        total = total + jnp.exp(sink - top)
    if rng is not None and config.dropout > 0:
        remaining = jax.random.bernoulli(rng, 1.0 - config.dropout, weights.shape)
        weights = jnp.where(remaining, weights / (1.0 - config.dropout), 0.0)
    out, first = jnp.zeros((), jnp.float32), 0
    for source in sources:
        last = first + source.positions.shape[1]
        weights_of_block = weights[..., first:last].reshape(batch, -1, groups * seq, last - first)
        values = expand(source.v) if isinstance(source, CachedKeys) else source.v.transpose(0, 2, 1, 3)
        out = out + product("bkqt,bktd->bkqd", weights_of_block, values, numerics)
        first = last
    return by_token(out.reshape(batch, -1, groups, seq, dim) / total)


# ---------------------------------------------------------------- long caches


Sums = tuple[jax.Array, jax.Array, jax.Array]  # largest score, sum of weights, weighted values


def attention_over_cache(
    q: jax.Array,
    keys: Keys,
    cached: CachedKeys,
    window: jax.Array | int,
    config: AttentionConfig,
    numerics: Numerics,
) -> jax.Array:
    """Computes `attention` without dropout, with at least `CACHE_BLOCK` cached keys.

    The softmax is summed while blocks are read (arXiv 1805.02867), so that memory does not grow with
    the number of cached keys. Only blocks with keys are read. There is no gradient.
    """
    k, v = expand(cached.k), expand(cached.v)
    slots = cached.positions.shape[1]
    index = jnp.arange(slots)
    used = jnp.max(jnp.where(jnp.any(cached.segments > 0, axis=0), index + 1, 0))

    def attend(start: int, end: int) -> jax.Array:
        """Returns the results of a block of queries."""
        # [batch, kv_heads, groups, block, head_dim]
        queries = by_key_head(q[:, start:end], keys.k.shape[2])
        here = keys.positions[:, start:end], keys.segments[:, start:end]

        def add(
            sums: Sums, k: jax.Array, v: jax.Array, places: tuple[jax.Array, jax.Array], starts: Any = None
        ) -> Sums:
            top, total, out = sums
            scores = capped(product("bkgqd,bkdt->bkgqt", queries, k, numerics) * config.scale, config)
            visible = visibility(*here, *places, window, starts) & (places[1] > 0)[:, None, :]
            visible = visible[:, None, None]
            scores = jnp.where(visible, scores, UNSEEN)
            higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights, faded = jnp.where(visible, jnp.exp(scores - higher), 0.0), jnp.exp(top - higher)
            values = product("bkgqt,bktd->bkgqd", weights, v, numerics)
            return higher, total * faded + jnp.sum(weights, axis=-1, keepdims=True), out * faded + values

        def step(i: jax.Array, sums: Sums) -> Sums:
            start = jnp.minimum(i * CACHE_BLOCK, slots - CACHE_BLOCK)
            block = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=CACHE_BLOCK)
            again = block(index, axis=0) < i * CACHE_BLOCK  # the last block overlaps the one before it
            segments = jnp.where(again[None], 0, block(cached.segments, axis=1))
            return add(
                sums, block(k, axis=3), block(v, axis=2), (block(cached.positions, axis=1), segments)
            )

        last = end if keys.starts is None else q.shape[1]  # later keys may be visible
        new_k, new_v = keys.k[:, :last].transpose(0, 2, 3, 1), keys.v[:, :last].transpose(0, 2, 1, 3)
        places = keys.positions[:, :last], keys.segments[:, :last]
        sums = add(_start(queries, keys.sinks), new_k, new_v, places, keys.starts)
        _, total, out = lax.fori_loop(0, (used + CACHE_BLOCK - 1) // CACHE_BLOCK, step, sums)
        # Padding sees no key; its result must be finite, because its values are multiplied by 0 later.
        return by_token(out / jnp.where(total > 0, total, 1.0))

    return jnp.concatenate([attend(*block) for block in blocks(q.shape[1])], axis=1)


def _start(queries: jax.Array, sinks: jax.Array | None) -> Sums:
    """Returns the sums before any key; a sink is a score without a value."""
    shape = (*queries.shape[:-1], 1)
    out = jnp.zeros(queries.shape, jnp.float32)
    if sinks is None:
        return jnp.full(shape, UNSEEN, jnp.float32), jnp.zeros(shape, jnp.float32), out
    top = jnp.broadcast_to(sinks.reshape(1, shape[1], shape[2], 1, 1), shape)
    return top, jnp.ones(shape, jnp.float32), out


# ---------------------------------------------------------------- encoders


@operation
def full_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    numerics: Numerics,
    *,
    scale: float,
    mask: jax.Array | None = None,
    causal: bool = False,
) -> jax.Array:
    """Computes softmax attention; scores, softmax and sums are float32.

    Args:
      q: ``[batch, queries, heads, head_dim]``.
      k, v: ``[batch, keys, heads, head_dim]``.
      numerics: dtype of the matmuls' operands.
      scale: multiplies the scores.
      mask: bool ``[batch, keys]``, False for masked keys. A row without any key averages all of
        them.
      causal: a query sees keys up to its own position only.

    Returns:
      float32 ``[batch, queries, heads, head_dim]``.
    """
    chex.assert_rank([q, k, v], 4)
    chex.assert_equal_shape([k, v])
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    # [batch, heads, queries, keys]
    scores = product("bhqd,bhkd->bhqk", q, k, numerics) * scale
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, UNSEEN)
    if causal:
        visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(visible[None, None], scores, UNSEEN)
    out = product("bhqk,bhkd->bhqd", jax.nn.softmax(scores, axis=-1), v, numerics)
    return out.transpose(0, 2, 1, 3)
