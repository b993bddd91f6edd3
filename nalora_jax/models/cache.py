"""The cache of keys and values that generation reads and extends.

All rows share one write index, so that a call adds one slice to the stacked arrays, whatever the rows' lengths: padding
of either side leaves slots of segment 0, which nothing sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from nalora_jax.models.config import ModelConfig
from nalora_jax.nn.matmul import pack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of all layers, and who may see each slot."""

    k: jax.Array  # [layers, batch, kv_heads, head_dim, slots]
    v: jax.Array  # [layers, batch, kv_heads, slots, head_dim]
    positions: jax.Array  # int32 [batch, slots]
    segments: jax.Array  # int32 [batch, slots]; 0: an empty or a padding slot
    lengths: jax.Array  # int32 [batch]: real tokens so far, the position of the next one
    index: jax.Array  # int32 []: slots used, the next one to write


def init_cache(config: ModelConfig, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache with ``length`` slots: room for all tokens of all calls, padding included.

    With ``length`` 0 the first call finds nothing to attend to but its own tokens, and makes room for just those;
    `grow` makes more.

    Writing beyond the last slot is not detected inside a compiled program (it would overwrite the last slots): callers
    give ``length`` accordingly.
    """
    lead = (config.n_layers, batch, config.n_kv_heads)
    slots = jnp.zeros((batch, length), jnp.int32)
    return Cache(
        k=pack(jnp.zeros((*lead, config.head_dim, length), dtype)),
        v=pack(jnp.zeros((*lead, length, config.head_dim), dtype)),
        positions=slots,
        segments=slots,
        lengths=jnp.zeros((batch,), jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )


def grow(cache: Cache, length: int) -> Cache:
    """The cache with empty slots added up to ``length``."""

    def pad(x: jax.Array, axis: int) -> jax.Array:
        more = [(0, 0)] * x.ndim
        more[axis] = (0, length - x.shape[axis])
        return jnp.pad(x, more)

    positions, segments = pad(cache.positions, 1), pad(cache.segments, 1)
    return replace(cache, k=pad(cache.k, 4), v=pad(cache.v, 3), positions=positions, segments=segments)


def extend(cache: Cache, k: jax.Array, v: jax.Array, positions: jax.Array, segments: jax.Array) -> Cache:
    """The cache with new tokens in it.

    Args:
      cache: it is updated in place where its buffers are donated.
      k: ``[layers, batch, seq, kv_heads, head_dim]`` of the new tokens.
      v: the same.
      positions: int ``[batch, seq]``.
      segments: int ``[batch, seq]``, 0 for padding.
    """
    if cache.positions.shape[1] == 0:
        cache = grow(cache, positions.shape[1])
    zero = jnp.zeros((), jnp.int32)
    columns, rows = _stored(k.transpose(0, 1, 3, 4, 2), cache.k), _stored(v.transpose(0, 1, 3, 2, 4), cache.v)
    return Cache(
        k=jax.lax.dynamic_update_slice(cache.k, columns, (zero, zero, zero, zero, cache.index)),
        v=jax.lax.dynamic_update_slice(cache.v, rows, (zero, zero, zero, cache.index, zero)),
        positions=jax.lax.dynamic_update_slice(cache.positions, positions, (zero, cache.index)),
        segments=jax.lax.dynamic_update_slice(cache.segments, segments, (zero, cache.index)),
        lengths=cache.lengths + jnp.sum(segments > 0, axis=1, dtype=jnp.int32),
        index=cache.index + positions.shape[1],
    )


def _stored(x: jax.Array, like: jax.Array) -> jax.Array:
    """``x`` in the cache's dtype; bf16 on CPU as integers, see `nalora_jax.nn.matmul.pack`."""
    return pack(x.astype(jnp.bfloat16)) if like.dtype == jnp.uint16 else x.astype(like.dtype)


def default_positions(segments: jax.Array) -> jax.Array:
    """Positions that restart with every run of equal segment ids.

    Example: segments ``[[0, 1, 1, 2, 2, 2]]`` -> ``[[0, 0, 1, 0, 1, 2]]``.
    """
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :], segments.shape)
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
