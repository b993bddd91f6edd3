"""The cache of keys and values that generation reads and extends.

All rows share one write index, so a call appends one slice to the stacked arrays for any row
lengths. Padding on either side fills slots of segment 0, which no query attends to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from nalora_jax.models.config import ModelConfig
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import Kernel, Stored


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of all layers, with the position and segment of every slot."""

    k: Kernel  # [layers, batch, kv_heads, head_dim, slots], in the platform's fastest storage form
    v: Kernel  # [layers, batch, kv_heads, slots, head_dim]
    positions: jax.Array  # int32 [batch, slots]
    segments: jax.Array  # int32 [batch, slots]; 0: an empty or a padding slot
    lengths: jax.Array  # int32 [batch]: real tokens so far, the position of the next one
    index: jax.Array  # int32 []: slots used so far; index of the next write


def init_cache(config: ModelConfig, batch: int, length: int, numerics: Numerics = Numerics()) -> Cache:  # noqa: B008
    """Returns an empty cache of ``numerics.operand`` with ``length`` slots.

    The slots must hold the tokens of all calls, padding included. With ``length`` 0 the first call
    attends to its own tokens only and allocates slots for exactly those; `grow` adds more.

    A compiled program does not detect writes beyond the last slot: they overwrite the last slots.
    The caller must choose ``length`` accordingly.
    """
    lead = (config.n_layers, batch, config.n_kv_heads)
    slots = jnp.zeros((batch, length), jnp.int32)
    return Cache(
        k=numerics.hooks.store(jnp.zeros((*lead, config.head_dim, length), numerics.operand)),
        v=numerics.hooks.store(jnp.zeros((*lead, length, config.head_dim), numerics.operand)),
        positions=slots,
        segments=slots,
        lengths=jnp.zeros((batch,), jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )


def grow(cache: Cache, length: int) -> Cache:
    """Returns the cache with empty slots appended up to ``length``."""

    def pad(x: Any, axis: int) -> Any:
        more = [(0, 0)] * x.ndim
        more[axis] = (0, length - x.shape[axis])
        return jax.tree.map(lambda leaf: jnp.pad(leaf, more), x)

    positions, segments = pad(cache.positions, 1), pad(cache.segments, 1)
    return replace(cache, k=pad(cache.k, 4), v=pad(cache.v, 3), positions=positions, segments=segments)


def repeat(cache: Cache, count: int) -> Cache:
    """Returns the cache with every row repeated ``count`` times."""
    k, v = (jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=1), x) for x in (cache.k, cache.v))
    rows = {name: jnp.repeat(getattr(cache, name), count, axis=0) for name in ("positions", "segments", "lengths")}
    return replace(cache, k=k, v=v, **rows)


def extend(
    cache: Cache, k: jax.Array, v: jax.Array, positions: jax.Array, segments: jax.Array, numerics: Numerics
) -> Cache:
    """Returns the cache extended by new tokens.

    Args:
      cache: updated in place if its buffers are donated.
      k: ``[layers, batch, seq, kv_heads, head_dim]`` of the new tokens.
      v: the same.
      positions: int ``[batch, seq]``.
      segments: int ``[batch, seq]``, 0 for padding.
      numerics: as for `init_cache`.
    """
    if cache.positions.shape[1] == 0:
        cache = grow(cache, positions.shape[1])
    zero = jnp.zeros((), jnp.int32)

    def write(stack: Kernel, new: jax.Array, axis: int) -> Kernel:
        if isinstance(stack, Stored):
            same = numerics.hooks.store(new.astype(numerics.operand))
        else:
            same = new.astype(stack.dtype)
        start = [zero] * stack.ndim
        start[axis] = cache.index
        written: Kernel = jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice(x, y, start), stack, same)
        return written

    return Cache(
        k=write(cache.k, k.transpose(0, 1, 3, 4, 2), 4),
        v=write(cache.v, v.transpose(0, 1, 3, 2, 4), 3),
        positions=jax.lax.dynamic_update_slice(cache.positions, positions, (zero, cache.index)),
        segments=jax.lax.dynamic_update_slice(cache.segments, segments, (zero, cache.index)),
        lengths=cache.lengths + jnp.sum(segments > 0, axis=1, dtype=jnp.int32),
        index=cache.index + positions.shape[1],
    )


def default_positions(segments: jax.Array) -> jax.Array:
    """Returns positions that restart with every run of equal segment ids.

    Example: segments ``[[0, 1, 1, 2, 2, 2]]`` -> ``[[0, 0, 1, 0, 1, 2]]``.
    """
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :], segments.shape)
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
