"""Causal attention with grouped heads, segments, sliding windows and soft caps, behind one function.

What a query sees is decided by integers, not by a stored mask: keys of its own segment, at positions up to its own,
fewer than ``window`` before it. So packing, padding, windows that differ by layer and cached keys are one rule. Tokens
of a segment lie in order along the sequence, so keys after a query's block are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from nalora_jax.cpu import native
from nalora_jax.nn import attention_kernels
from nalora_jax.nn.attention_kernels import Kernel
from nalora_jax.nn.blockwise_attention import (
    UNSEEN,
    blocks,
    blockwise_attention,
    by_key_head,
    by_token,
    capped,
    product,
    visibility,
)
from nalora_jax.nn.matmul import kept, unpack_leaf

# With dropout: from this length stored probabilities would outweigh all other activations, so they are made again.
_RECOMPUTE_FROM = 1024
PLATFORM = Kernel()


@dataclass(frozen=True)
class Scoring:
    """How scores are made; static."""

    scale: float  # multiplies q . k
    softcap: float = 0.0  # c tanh(score / c); 0: none
    operand: str = "float32"  # dtype of the products' operands; sums and softmax are float32
    kept: str = "float32"  # what queries, keys, values and the result are rounded to for the backward pass
    dropout: float = 0.0  # rate on the probabilities
    result: str = "float32"  # dtype of the result


class Keys(NamedTuple):
    """Keys, values and what decides who sees them."""

    k: jax.Array  # [batch, keys, kv_heads, head_dim]
    v: jax.Array  # [batch, keys, kv_heads, head_dim]
    positions: jax.Array  # int [batch or 1, keys]
    segments: jax.Array  # int [batch or 1, keys]; 0: nothing there


class CachedKeys(NamedTuple):
    """Keys and values of earlier calls, laid out as the products of one token read them; bf16 ones may be packed."""

    k: jax.Array  # [batch, kv_heads, head_dim, slots]
    v: jax.Array  # [batch, kv_heads, slots, head_dim]
    positions: jax.Array  # int [batch or 1, slots]
    segments: jax.Array  # int [batch or 1, slots]; 0: nothing there


def reads_in_place(seq: int, k: jax.Array) -> bool:
    """Whether `attention` of ``seq`` tokens reads a cache such as ``k`` where it lies: natively, of one token a row."""
    return seq == 1 and k.dtype == jnp.uint16 and k.shape[-1] > 0 and native.multiplies_few_rows()


def attention(
    q: jax.Array,
    keys: Keys,
    window: jax.Array | int,
    scoring: Scoring,
    *,
    cached: CachedKeys | native.Cached | None = None,
    dropout_rng: jax.Array | None = None,
    kernel: Kernel = PLATFORM,
) -> jax.Array:
    """Softmax attention of every token over the tokens that it sees.

    Args:
      q: ``[batch, seq, heads, head_dim]``; head h reads key head ``h // (heads // kv_heads)``.
      keys: of the same tokens.
      window: scalar; a query at position p sees positions in ``(p - window, p]``.
      scoring: scale, soft cap, dtypes.
      cached: keys of earlier calls, seen under the same rule; where `reads_in_place`, in the stack of all layers.
      dropout_rng: key for ``scoring.dropout``; None for no dropout.
      kernel: which implementation, by default the platform's best; all of them compute the same.

    Returns:
      ``[batch, seq, heads, head_dim]`` in ``scoring.result``.
    """
    return _attention(q, keys, window, scoring, cached, dropout_rng, kernel).astype(scoring.result)


def _attention(
    q: jax.Array,
    keys: Keys,
    window: jax.Array | int,
    scoring: Scoring,
    cached: CachedKeys | native.Cached | None,
    dropout_rng: jax.Array | None,
    kernel: Kernel,
) -> jax.Array:
    chex.assert_rank([q, keys.k, keys.v], 4)
    chex.assert_equal_shape([keys.k, keys.v])
    if cached is not None and cached.positions.shape[1] == 0:  # a cache without slots: there were no earlier calls
        cached = None
    if isinstance(cached, native.Cached):
        assert dropout_rng is None, "text is generated without dropout"
        return native.cached_attention(native.Heads(q, *keys, window), cached, scoring.scale, scoring.softcap)
    plain_only = cached is not None or (dropout_rng is not None and scoring.dropout > 0)
    name = attention_kernels.choose(kernel, q, keys, scoring, plain_only=plain_only)
    if name == "xla" and not plain_only:
        return blockwise_attention(q, keys.k, keys.v, keys.positions, keys.segments, window, scoring)
    if name == "splash":
        q, k, v = (kept(x, scoring.kept) for x in (q, keys.k, keys.v))
        return attention_kernels.splash(q, keys._replace(k=k, v=v), window, scoring, kernel)
    if name == "cudnn":
        visible = visibility(keys.positions, keys.segments, keys.positions, keys.segments, window)
        return attention_kernels.dot_product(q, keys.k, keys.v, visible, scoring, "cudnn")
    return _attend_in_blocks(q, keys, window, scoring, cached, dropout_rng)


def _attend_in_blocks(
    q: jax.Array,
    keys: Keys,
    window: jax.Array | int,
    scoring: Scoring,
    cached: CachedKeys | None,
    dropout_rng: jax.Array | None,
) -> jax.Array:
    """Cached keys and dropout: blocks of queries, each against the cache and the keys up to its own end."""
    attend = _attend if q.shape[1] < _RECOMPUTE_FROM else jax.checkpoint(_attend, static_argnums=(4,))
    outputs = []
    for start, end in blocks(q.shape[1]):
        seen = Keys(*(x[:, :end] for x in keys))
        rng = None if dropout_rng is None else jax.random.fold_in(dropout_rng, start)
        here = (keys.positions[:, start:end], keys.segments[:, start:end])
        outputs.append(attend(q[:, start:end], here, seen, window, scoring, cached, rng))
    return jnp.concatenate(outputs, axis=1) if len(outputs) > 1 else outputs[0]


def _attend(
    q: jax.Array,
    here: tuple[jax.Array, jax.Array],
    keys: Keys,
    window: jax.Array | int,
    scoring: Scoring,
    cached: CachedKeys | None,
    rng: jax.Array | None,
) -> jax.Array:
    """One block of queries against given keys; without a stored score outside it."""
    batch, seq, heads, dim = q.shape
    groups = heads // keys.k.shape[2]
    # [batch, kv_heads, groups * seq, head_dim]: one matrix per key head.
    q = by_key_head(q, keys.k.shape[2]).reshape(batch, -1, groups * seq, dim)
    sources: list[Keys | CachedKeys] = [keys] if cached is None else [cached, keys]
    scores = [_scores(q, here, source, window, scoring, groups) for source in sources]
    # [batch, kv_heads, groups, seq, all keys]
    scored = jnp.concatenate(scores, axis=-1) if len(scores) > 1 else scores[0]
    weights = jnp.exp(scored - jax.lax.stop_gradient(jnp.max(scored, axis=-1, keepdims=True)))
    # The softmax's division comes after the product with the values: a pass over [seq, head_dim], not [seq, keys].
    total = jnp.sum(weights, axis=-1)[..., None]
    if rng is not None and scoring.dropout > 0:
        kept = jax.random.bernoulli(rng, 1.0 - scoring.dropout, weights.shape)
        weights = jnp.where(kept, weights / (1.0 - scoring.dropout), 0.0)
    out, first = jnp.zeros((), jnp.float32), 0
    for source in sources:
        last = first + source.positions.shape[1]
        part = weights[..., first:last].reshape(batch, -1, groups * seq, last - first)
        values = unpack_leaf(source.v) if isinstance(source, CachedKeys) else source.v.transpose(0, 2, 1, 3)
        out = out + product("bkqt,bktd->bkqd", part, values, scoring.operand)
        first = last
    return by_token(out.reshape(batch, -1, groups, seq, dim) / total)


def _scores(
    q: jax.Array,
    here: tuple[jax.Array, jax.Array],
    keys: Keys | CachedKeys,
    window: jax.Array | int,
    scoring: Scoring,
    groups: int,
) -> jax.Array:
    """Masked scores ``[batch, kv_heads, groups, seq, keys]`` in float32."""
    if isinstance(keys, CachedKeys):
        scores = product("bkqd,bkdt->bkqt", q, unpack_leaf(keys.k), scoring.operand)
    else:
        scores = product("bkqd,bktd->bkqt", q, keys.k.transpose(0, 2, 1, 3), scoring.operand)
    scores = capped(scores * scoring.scale, scoring)
    visible = visibility(*here, keys.positions, keys.segments, window)
    scores = scores.reshape(*scores.shape[:2], groups, -1, scores.shape[-1])
    return jnp.where(visible[:, None, None], scores, UNSEEN)
