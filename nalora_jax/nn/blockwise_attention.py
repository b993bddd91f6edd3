"""Self-attention of training in plain XLA: blocks of queries, forward and backward, no score outlives its block.

The backward pass makes the probabilities again from the kept queries, keys and log-sum-exp, as flash attention does
(arXiv 2205.14135); autodiff would keep ``[heads, seq, seq]`` of them, and differentiate the softmax in more passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.nn.matmul import restored, rounded, stored

if TYPE_CHECKING:
    from nalora_jax.nn.attention import Scoring

# Scores of unseen keys: far below any score, but finite, so that a row that sees nothing (padding) has no NaN.
UNSEEN = -1e30


def block_size(seq: int) -> int:
    """Queries per block: small enough to skip most of the upper triangle, at most 8 blocks to compile."""
    return max(64, -(-seq // 8))


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
      ``[batch, seq, heads, head_dim]`` float32.
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
    heads = tuple(stored(by_key_head(x, k.shape[2]), scoring.kept) for x in (q * scoring.scale, k, v))
    outs, totals = [], []
    for start, end in blocks(q.shape[1]):
        query, key, value = _block(heads, start, end)
        scores, unseen = _scores(query, key, positions, segments, window, start, end, scoring)
        scores = scores + unseen
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        # The softmax's division comes after the product with the values: a pass over head_dim, not over all keys.
        outs.append(product("bkgqt,bktd->bkgqd", weights, value, scoring.operand) / total)
        totals.append(top + jnp.log(total))
    out, logsumexp = _joined(outs), _joined(totals)  # [batch, kv_heads, groups, seq, head_dim or 1]
    like = tuple(jnp.zeros((0,), x.dtype) for x in (q, k, v))
    held = stored(out, scoring.kept)
    kept = (*heads, held, stored(logsumexp, "float32"), positions, segments, window, like)
    return by_token(restored(held, jnp.float32)), kept


def _bwd(scoring: Scoring, kept: Any, g: jax.Array) -> tuple[Any, ...]:
    *heads, out, logsumexp, positions, segments, window, like = kept
    kv_heads, seq = heads[1].shape[1], g.shape[1]
    g = by_key_head(g, kv_heads)
    inner = jnp.sum(g * restored(out, jnp.float32), axis=-1, keepdims=True)
    dq: list[jax.Array] = []
    batch, dim = g.shape[0], g.shape[-1]
    dk = dv = jnp.zeros((batch, kv_heads, 1, seq, dim), jnp.float32)
    for start, end in blocks(seq):
        query, key, value = _block(heads, start, end)
        scores, unseen = _scores(query, key, positions, segments, window, start, end, scoring)
        rows = slice(start, end)
        weights = jnp.exp(scores + (unseen - logsumexp[..., rows, :]))
        back = g[..., rows, :]
        slope = weights * (product("bkgqd,bktd->bkgqt", back, value, scoring.operand) - inner[..., rows, :])
        if scoring.softcap:
            slope = slope * (1 - jnp.square(scores / scoring.softcap))
        dq.append(product("bkgqt,bktd->bkgqd", slope, key, scoring.operand))
        dk = dk.at[:, :, 0, :end].add(product("bkgqt,bkgqd->bktd", slope, query, scoring.operand))
        dv = dv.at[:, :, 0, :end].add(product("bkgqt,bkgqd->bktd", weights, back, scoring.operand))
    grads = (by_token(_joined(dq)) * scoring.scale, by_token(dk), by_token(dv))
    return (*(x.astype(y.dtype) for x, y in zip(grads, like, strict=True)), None, None, None)


blockwise_attention.defvjp(_fwd, _bwd)


def blocks(seq: int) -> Iterator[tuple[int, int]]:
    """First and last position (exclusive) of every block of queries."""
    size = block_size(seq)
    return ((start, min(start + size, seq)) for start in range(0, seq, size))


def _block(heads: Any, start: int, end: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries of one block, ``[batch, kv_heads, groups, block, head_dim]``, and the keys and values up to its end."""
    q, k, v = heads
    rows = (q[:, :, :, start:end], k[:, :, 0, :end], v[:, :, 0, :end])
    query, key, value = (restored(x, jnp.float32) for x in rows)
    return query, key, value


def _scores(
    query: jax.Array,
    key: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    window: jax.Array | int,
    start: int,
    end: int,
    scoring: Scoring,
) -> tuple[jax.Array, jax.Array]:
    """Scores ``[batch, kv_heads, groups, block, keys]``, soft cap applied, and which of them are seen."""
    # Tied to the queries, or the mask of every layer would be made ahead of them all and held: [batch, seq, seq].
    query, positions = lax.optimization_barrier((query, positions))
    scores = capped(product("bkgqd,bktd->bkgqt", query, key, scoring.operand), scoring)
    own = (positions[:, start:end], segments[:, start:end])
    seen = visibility(*own, positions[:, :end], segments[:, :end], window)[:, None, None]
    return scores, jnp.where(seen, 0.0, UNSEEN)


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
