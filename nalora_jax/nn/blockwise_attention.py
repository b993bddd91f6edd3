"""Self-attention of training in plain XLA: blocks of queries, forward and backward, no score outlives its block.

The backward pass makes the probabilities again from the kept queries, keys and log-sum-exp, as flash attention does
(arXiv 2205.14135); autodiff would keep ``[heads, seq, seq]`` of them, and differentiate the softmax in more passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.cpu import native
from nalora_jax.nn.matmul import restored, rounded, stored

if TYPE_CHECKING:
    from nalora_jax.nn.attention import Scoring

# Queries whose scores are made at once: longer blocks go piece by piece, so that memory grows with the keys alone.
PIECE = 256
# Scores of unseen keys: far below any score, but finite, so that a row that sees nothing (padding) has no NaN.
UNSEEN = -1e30


def block_size(seq: int) -> int:
    """Queries per block: small enough to skip most of the upper triangle, at most 8 blocks to compile."""
    # Measured on CPU: 32 make a step of 128 tokens a row 3% to 5% faster, steps of 48 or 256 up to 3% slower.
    size = max(32 if 128 <= seq < 256 else 64, -(-seq // 8))
    return size if size <= PIECE else -(-size // PIECE) * PIECE


def visibility(
    positions: jax.Array,
    segments: jax.Array,
    key_positions: jax.Array,
    key_segments: jax.Array,
    window: jax.Array | int,
) -> jax.Array:
    """Whether each query sees each key: bool ``[batch or 1, queries, keys]`` from int ``[batch or 1, ...]``."""
    ahead = positions[:, :, None] - key_positions[:, None, :]
    same = segments[:, :, None] == key_segments[:, None, :]
    return same & (ahead >= 0) & (ahead < window)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    window: jax.Array | int,
    scoring: Scoring,
) -> jax.Array:
    """Softmax attention of every token over the tokens of its segment up to itself, within the window.

    Args:
      q: ``[batch, seq, heads, head_dim]``; head h reads key head ``h // (heads // kv_heads)``.
      k: ``[batch, seq, kv_heads, head_dim]``.
      v: the same.
      positions: int ``[batch or 1, seq]``, in order along each segment.
      segments: int ``[batch or 1, seq]``.
      window: scalar.
      scoring: scale, soft cap, dtypes; its dropout is not applied.

    Returns:
      ``[batch, seq, heads, head_dim]`` in ``scoring.result``.
    """
    return _fwd(q, k, v, positions, segments, window, scoring)[0]


def _fwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    window: jax.Array | int,
    scoring: Scoring,
) -> tuple[jax.Array, Any]:
    if _is_native(scoring):
        return _native_fwd(q, k, v, positions, segments, window, scoring)
    heads = tuple(stored(by_key_head(x, k.shape[2]), scoring.kept) for x in (q * scoring.scale, k, v))
    outs, totals = [], []
    for start, end in blocks(q.shape[1]):
        seen = _seen(heads, positions, segments, window, end)
        rows = (heads[0][..., start:end, :], *_own(positions, segments, start, end))
        _, (out, total) = _by_pieces(partial(_attended, seen, scoring), None, rows)
        outs.append(out)
        totals.append(total)
    out, logsumexp = _joined(outs), _joined(totals)  # [batch, kv_heads, groups, seq, head_dim or 1]
    like = tuple(jnp.zeros((0,), x.dtype) for x in (q, k, v))
    held = stored(out, scoring.kept)
    kept = (*heads, held, stored(logsumexp, "float32"), positions, segments, window, like)
    return by_token(restored(held, scoring.result)), kept


def _is_native(scoring: Scoring) -> bool:
    """Whether `nalora_jax.cpu.native` does the work: it reads and keeps bf16, and nothing else."""
    return scoring.operand == scoring.kept == "bfloat16" and native.available()


def _native_fwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    window: jax.Array | int,
    scoring: Scoring,
) -> tuple[jax.Array, Any]:
    heads = native.Heads(
        stored(q * scoring.scale, scoring.kept),
        stored(k, scoring.kept),
        stored(v, scoring.kept),
        positions,
        segments,
        window,
    )
    out, logsumexp = native.attention(heads, scoring.softcap)
    out, logsumexp = stored(out, scoring.kept), stored(logsumexp, "float32")
    like = tuple(jnp.zeros((0,), x.dtype) for x in (q, k, v))
    held = out if native.needs_result(q.shape[1], scoring.softcap) else None
    return restored(out, scoring.result), (heads, held, logsumexp, like)


def _native_bwd(scoring: Scoring, residuals: Any, g: jax.Array) -> tuple[Any, ...]:
    heads, out, logsumexp, like = residuals
    dq, dk, dv = native.attention_gradient(heads, out, logsumexp, rounded(g, scoring.kept), scoring.softcap)
    grads = (rounded(x, y.dtype) for x, y in zip((dq * scoring.scale, dk, dv), like, strict=True))
    return *grads, None, None, None


def _attended(seen: _Seen, scoring: Scoring, carry: None, rows: tuple[jax.Array, ...]) -> tuple[None, Any]:
    """Results and log-sum-exps of some queries."""
    scores, unseen = _scores(seen, scoring, *rows)
    scores = scores + unseen
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # The softmax's division comes after the product with the values: a pass over head_dim, not over all keys.
    out = product("bkgqt,bktd->bkgqd", weights, seen.value, scoring.operand) / total
    return carry, (out, top + jnp.log(total))


def _bwd(scoring: Scoring, kept: Any, g: jax.Array) -> tuple[Any, ...]:
    if _is_native(scoring):
        return _native_bwd(scoring, kept, g)
    *heads, out, logsumexp, positions, segments, window, like = kept
    kv_heads, seq = heads[1].shape[1], g.shape[1]
    g = by_key_head(g.astype(jnp.float32), kv_heads)
    inner = jnp.sum(g * restored(out, jnp.float32), axis=-1, keepdims=True)
    dq: list[jax.Array] = []
    dk = dv = jnp.zeros((g.shape[0], kv_heads, g.shape[-1], seq), jnp.float32)
    # The last block first: it alone adds to all keys, so that the others add to a part of what it made, in place.
    for start, end in reversed(list(blocks(seq))):
        seen = _seen(heads, positions, segments, window, end)
        by_query = (x[..., start:end, :] for x in (logsumexp, g, inner))
        rows = (heads[0][..., start:end, :], *_own(positions, segments, start, end), *by_query)
        sums = (dk[..., :end], dv[..., :end])
        sums, dq_block = _by_pieces(partial(_gradients, seen, scoring), sums, rows)
        dk, dv = (x.at[..., :end].set(new) for x, new in zip((dk, dv), sums, strict=True))
        dq.append(dq_block)
    # The barrier keeps XLA:CPU from turning a product instead of its result, which it then cannot run in bf16.
    dk, dv = (x.swapaxes(2, 3)[:, :, None] for x in lax.optimization_barrier((dk, dv)))
    grads = (by_token(_joined(dq[::-1])) * scoring.scale, by_token(dk), by_token(dv))
    return (*(x.astype(y.dtype) for x, y in zip(grads, like, strict=True)), None, None, None)


def _gradients(
    seen: _Seen, scoring: Scoring, sums: tuple[jax.Array, jax.Array], rows: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """``dk`` and ``dv``, ``[..., head_dim, keys]``, with what some queries add to them, and those queries' ``dq``."""
    query, positions, segments, logsumexp, g, inner = rows
    scores, unseen = _scores(seen, scoring, query, positions, segments)
    weights = jnp.exp(scores + (unseen - logsumexp))
    slope = weights * (product("bkgqd,bktd->bkgqt", g, seen.value, scoring.operand) - inner)
    if scoring.softcap:
        slope = slope * (1 - jnp.square(scores / scoring.softcap))
    # Queries on the left: a product wants its left operand turned, and scores are wider than heads.
    dk = sums[0] + product("bkgqd,bkgqt->bkdt", restored(query, jnp.float32), slope, scoring.operand)
    dv = sums[1] + product("bkgqd,bkgqt->bkdt", g, weights, scoring.operand)
    return (dk, dv), product("bkgqt,bktd->bkgqd", slope, seen.key, scoring.operand)


blockwise_attention.defvjp(_fwd, _bwd)


def blocks(seq: int) -> Iterator[tuple[int, int]]:
    """First and last position (exclusive) of every block of queries; a long one is a multiple of `PIECE`."""
    size, start = block_size(seq), 0
    while start < seq:
        length = min(size, seq - start)
        length -= length % PIECE if length > PIECE else 0
        yield start, start + length
        start += length


def _by_pieces(step: Any, carry: Any, rows: tuple[jax.Array, ...]) -> Any:
    """``step(carry, rows)`` on pieces of the rows (axis -2), one after the other, the results joined on that axis."""
    length = rows[0].shape[-2]
    if length <= PIECE:
        return step(carry, rows)
    carry, made = lax.scan(step, carry, tuple(_split(x, length // PIECE) for x in rows))
    return carry, jax.tree.map(_unsplit, made)


def _split(x: jax.Array, count: int) -> jax.Array:
    """``[..., rows, n]`` -> ``[count, ..., rows / count, n]``."""
    return jnp.moveaxis(x.reshape(*x.shape[:-2], count, -1, x.shape[-1]), -3, 0)


def _unsplit(x: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


class _Seen(NamedTuple):
    """What the queries of a block may see: the keys up to its end."""

    key: jax.Array  # [batch, kv_heads, keys, head_dim]
    value: jax.Array  # the same
    positions: jax.Array  # int [batch or 1, keys]
    segments: jax.Array  # int [batch or 1, keys]
    window: jax.Array | int


def _seen(heads: Any, positions: jax.Array, segments: jax.Array, window: jax.Array | int, end: int) -> _Seen:
    key, value = (restored(x[:, :, 0, :end], jnp.float32) for x in heads[1:])
    return _Seen(key, value, positions[:, :end], segments[:, :end], window)


def _own(positions: jax.Array, segments: jax.Array, start: int, end: int) -> tuple[jax.Array, jax.Array]:
    """Positions and segments of a block's queries, ``[batch or 1, block, 1]``: rows on the axis that all rows have."""
    return positions[:, start:end, None], segments[:, start:end, None]


def _scores(
    seen: _Seen, scoring: Scoring, query: jax.Array, positions: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scores ``[batch, kv_heads, groups, rows, keys]``, soft cap applied, and which of them are seen."""
    # Tied to the queries, or the mask of every layer would be made ahead of them all and held: [batch, seq, seq].
    query, positions = lax.optimization_barrier((restored(query, jnp.float32), positions))
    scores = capped(product("bkgqd,bktd->bkgqt", query, seen.key, scoring.operand), scoring)
    visible = visibility(positions[..., 0], segments[..., 0], seen.positions, seen.segments, seen.window)
    return scores, jnp.where(visible[:, None, None], 0.0, UNSEEN)


def capped(scores: jax.Array, scoring: Scoring) -> jax.Array:
    """``c tanh(score / c)`` where there is a soft cap."""
    return scoring.softcap * jnp.tanh(scores / scoring.softcap) if scoring.softcap else scores


def by_key_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """``[batch, seq, heads, head_dim]`` -> ``[batch, kv_heads, groups, seq, head_dim]``."""
    batch, seq, _, dim = x.shape
    return x.reshape(batch, seq, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)


def by_token(x: jax.Array) -> jax.Array:
    """The inverse of `by_key_head`."""
    batch, kv_heads, groups, seq, dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, seq, kv_heads * groups, dim)


def _joined(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts, axis=-2) if len(parts) > 1 else parts[0]


def product(equation: str, x: jax.Array, y: jax.Array, operand: str) -> jax.Array:
    """`jnp.einsum` with operands rounded to ``operand`` and a float32 result."""
    return jnp.einsum(equation, rounded(x, operand), rounded(y, operand), preferred_element_type=jnp.float32)
