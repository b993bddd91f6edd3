"""Attention of many tokens over a long cache, one block of cached keys at a time, in plain XLA.

The softmax is summed while blocks are read (arXiv 1805.02867), so that memory does not grow with the
number of cached keys: a prompt can be processed in pieces. Only blocks with keys are read. There is
no gradient.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.ops.blockwise_attention import (
    UNSEEN,
    AttentionConfig,
    blocks,
    by_key_head,
    by_token,
    capped,
    product,
    visibility,
)
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import expand

if TYPE_CHECKING:
    from nalora_jax.ops.attention import CachedKeys, Keys

# Cached keys whose scores are computed together. Shorter caches are read as a whole.
BLOCK = 1024

Sums = tuple[jax.Array, jax.Array, jax.Array]  # largest score, sum of weights, weighted values


def attention_over_cache(
    q: jax.Array,
    keys: Keys,
    cached: CachedKeys,
    window: jax.Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    sinks: jax.Array | None,
    starts: jax.Array | None = None,
) -> jax.Array:
    """Computes `nalora_jax.ops.attention.attention` without dropout, with at least `BLOCK` cached keys."""
    kv_heads = keys.k.shape[2]
    k, v = expand(cached.k), expand(cached.v)
    outputs = []
    for start, end in blocks(q.shape[1]):
        # [batch, kv_heads, groups, block, head_dim]
        queries = by_key_head(q[:, start:end], kv_heads)
        here = keys.positions[:, start:end], keys.segments[:, start:end]
        add: Any = partial(_add, queries, here, window, config, numerics)
        if starts is not None:  # later keys may be visible
            end = q.shape[1]
        new = (x[:, :end].transpose(0, 2, *axes) for x, axes in ((keys.k, (3, 1)), (keys.v, (1, 3))))
        sums = add(_start(queries, sinks), *new, keys.positions[:, :end], keys.segments[:, :end], starts)
        _, total, out = _add_cached(add, sums, k, v, cached.positions, cached.segments)
        # Padding sees no key; its result must be finite, because its values are multiplied by 0 later.
        outputs.append(by_token(out / jnp.where(total > 0, total, 1.0)))
    return jnp.concatenate(outputs, axis=1)


def _start(queries: jax.Array, sinks: jax.Array | None) -> Sums:
    """Returns the sums before any key; a sink is a score without a value."""
    shape = (*queries.shape[:-1], 1)
    out = jnp.zeros(queries.shape, jnp.float32)
    if sinks is None:
        return jnp.full(shape, UNSEEN, jnp.float32), jnp.zeros(shape, jnp.float32), out
    top = jnp.broadcast_to(sinks.reshape(1, shape[1], shape[2], 1, 1), shape)
    return top, jnp.ones(shape, jnp.float32), out


def _add_cached(
    add: Any, sums: Sums, k: jax.Array, v: jax.Array, positions: jax.Array, segments: jax.Array
) -> Sums:
    """Adds the cached keys, ``k [batch, kv_heads, head_dim, slots]``, block by block."""
    slots = positions.shape[1]
    index = jnp.arange(slots)
    used = jnp.max(jnp.where(jnp.any(segments > 0, axis=0), index + 1, 0))

    def step(i: jax.Array, sums: Sums) -> Sums:
        start = jnp.minimum(i * BLOCK, slots - BLOCK)
        block = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=BLOCK)
        again = block(index, axis=0) < i * BLOCK  # the last block overlaps the one before it
        segments_here = jnp.where(again[None], 0, block(segments, axis=1))
        added: Sums = add(sums, block(k, axis=3), block(v, axis=2), block(positions, axis=1), segments_here)
        return added

    summed: Sums = lax.fori_loop(0, (used + BLOCK - 1) // BLOCK, step, sums)
    return summed


def _add(
    queries: jax.Array,
    here: tuple[jax.Array, jax.Array],
    window: jax.Array | int,
    config: AttentionConfig,
    numerics: Numerics,
    sums: Sums,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    starts: jax.Array | None = None,
) -> Sums:
    """Adds keys ``k [batch, kv_heads, head_dim, keys]`` and values ``[batch, kv_heads, keys, head_dim]``."""
    top, total, out = sums
    scores = capped(product("bkgqd,bkdt->bkgqt", queries, k, numerics) * config.scale, config)
    visible = visibility(*here, positions, segments, window, starts) & (segments > 0)[:, None, :]
    scores = jnp.where(visible[:, None, None], scores, UNSEEN)
    higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
    weights, faded = jnp.where(visible[:, None, None], jnp.exp(scores - higher), 0.0), jnp.exp(top - higher)
    values = product("bkgqt,bktd->bkgqd", weights, v, numerics)
    return higher, total * faded + jnp.sum(weights, axis=-1, keepdims=True), out * faded + values
