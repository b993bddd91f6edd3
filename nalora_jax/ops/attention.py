"""Causal attention with grouped heads, segments, sliding windows, soft caps and caches.

Integers, not a stored mask, decide which keys a query sees: those with its segment, at positions up
to its own and fewer than ``window`` before it. Packing, padding, windows by layer and cached keys
all follow this rule. Tokens of a segment are in order along the sequence, so keys after a query's
block are never read.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from nalora_jax.ops.blockwise_attention import (
    UNSEEN,
    AttentionConfig,
    blocks,
    blockwise_attention,
    by_key_head,
    by_token,
    capped,
    joined,
    product,
    visibility,
)
from nalora_jax.ops.cached_attention import BLOCK, attention_over_cache
from nalora_jax.ops.dispatch import Numerics, operation
from nalora_jax.ops.storage import Kernel, expand

# With dropout: at this length and above, stored probabilities would need more memory than all other
# activations, so they are recomputed.
_RECOMPUTE_FROM = 1024


class Keys(NamedTuple):
    """Keys and values with the integers that decide which queries see them."""

    k: jax.Array  # [batch, keys, kv_heads, head_dim]
    v: jax.Array  # [batch, keys, kv_heads, head_dim]
    positions: jax.Array  # int [batch or 1, keys]
    segments: jax.Array  # int [batch or 1, keys]; 0: empty


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
    cached: CachedKeys | None = None,
    dropout_rng: jax.Array | None = None,
    starts: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Computes softmax attention of every token over the tokens that it sees.

    Args:
      q: ``[batch, seq, heads, head_dim]``; head h reads key head ``h // (heads // kv_heads)``.
      keys: keys of the same tokens.
      window: scalar; a query at position p sees positions in ``(p - window, p]``.
      config: scale, soft cap, dropout.
      numerics: dtypes of operands, of saved arrays and of the result; sums and softmax are float32.
      cached: keys of earlier calls, seen under the same rule.
      dropout_rng: key for ``config.dropout``; None for no dropout.
      starts: int ``[batch or 1, keys]``, the first position that sees a key, if not the key's own:
        tokens of one image that see each other all have the position of the image's first token.
      sinks: float32 ``[heads]``, a score of each head that every query sees and that has no value
        (`nalora_jax.ops.blockwise_attention.with_sinks`); frozen, not scaled, not capped. None: none.

    Returns:
      ``[batch, seq, heads, head_dim]`` in ``numerics.result``.
    """
    chex.assert_rank([q, keys.k, keys.v], 4)
    chex.assert_equal_shape([keys.k, keys.v])
    # A cache without slots: there were no earlier calls.
    if cached is not None and cached.positions.shape[1] == 0:
        cached = None
    if cached is None and starts is None and not drops(config, dropout_rng):
        return blockwise_attention(q, *keys, window, sinks, config, numerics)
    long = cached is not None and q.shape[1] > 1 and cached.positions.shape[1] > BLOCK
    if cached is not None and long and not drops(config, dropout_rng):
        out = attention_over_cache(q, keys, cached, window, config, numerics, sinks, starts)
        return out.astype(numerics.result)
    unsupported = cached, dropout_rng, starts, sinks
    return _attend_in_blocks(q, keys, window, config, numerics, *unsupported).astype(numerics.result)


def drops(config: AttentionConfig, dropout_rng: jax.Array | None) -> bool:
    """Returns True if dropout is applied to the probabilities."""
    return dropout_rng is not None and config.dropout > 0


def _attend_in_blocks(
    q: jax.Array,
    keys: Keys,
    window: jax.Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    cached: CachedKeys | None,
    dropout_rng: jax.Array | None,
    starts: jax.Array | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Computes attention with cached keys or dropout, one block of queries at a time.

    Each block reads the cache and the keys up to its own end; with ``starts`` it reads all keys,
    because later ones may be visible.
    """
    attend = _attend if q.shape[1] < _RECOMPUTE_FROM else jax.checkpoint(_attend, static_argnums=(4, 5))
    outputs = []
    for start, end in blocks(q.shape[1]):
        visible = keys
        if starts is None:
            visible = Keys(*(x[:, :end] for x in keys))
        rng = None if dropout_rng is None else jax.random.fold_in(dropout_rng, start)
        here = (keys.positions[:, start:end], keys.segments[:, start:end])
        outputs.append(
            attend(q[:, start:end], here, visible, window, config, numerics, cached, rng, starts, sinks)
        )
    return joined(outputs, 1)


def _attend(
    q: jax.Array,
    here: tuple[jax.Array, jax.Array],
    keys: Keys,
    window: jax.Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    cached: CachedKeys | None,
    rng: jax.Array | None,
    starts: jax.Array | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Computes one block of queries against given keys; its scores are not stored outside of it."""
    batch, seq, heads, dim = q.shape
    groups = heads // keys.k.shape[2]
    # [batch, kv_heads, groups * seq, head_dim]: one matrix per key head
    q = by_key_head(q, keys.k.shape[2]).reshape(batch, -1, groups * seq, dim)
    sources = [source for source in (cached, keys) if source is not None]
    scores = [_scores(q, here, source, window, config, numerics, groups, starts) for source in sources]
    # [batch, kv_heads, groups, seq, all keys]
    scored = joined(scores, -1)
    top = jax.lax.stop_gradient(jnp.max(scored, axis=-1, keepdims=True))
    if sinks is not None:
        sink = jax.lax.stop_gradient(sinks).reshape(1, -1, groups, 1, 1)
        top = jnp.maximum(top, sink)
    weights = jnp.exp(scored - top)
    # The softmax's division follows the matmul with the values: a pass over [seq, head_dim] instead
    # of [seq, keys].
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
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


def _scores(
    q: jax.Array,
    here: tuple[jax.Array, jax.Array],
    keys: Keys | CachedKeys,
    window: jax.Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    groups: int,
    starts: jax.Array | None,
) -> jax.Array:
    """Returns masked scores ``[batch, kv_heads, groups, seq, keys]`` in float32."""
    if isinstance(keys, CachedKeys):
        scores, starts = product("bkqd,bkdt->bkqt", q, expand(keys.k), numerics), None
    else:
        scores = product("bkqd,bktd->bkqt", q, keys.k.transpose(0, 2, 1, 3), numerics)
    scores = capped(scores * config.scale, config)
    visible = visibility(*here, keys.positions, keys.segments, window, starts)
    scores = scores.reshape(*scores.shape[:2], groups, -1, scores.shape[-1])
    return jnp.where(visible[:, None, None], scores, UNSEEN)
