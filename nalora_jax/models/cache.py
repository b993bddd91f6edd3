"""The cache of layers' states that generation reads and extends.

Attention layers cache keys and values, or the latents that these follow from; other mixers have a
state of constant size. All rows share one write index, so a call appends one slice to the stacked
arrays for any row lengths. Padding on either side fills slots of segment 0, which no query attends
to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import Kernel, Stored, store


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValues:
    """Cached keys and values of a stack of attention layers."""

    k: Kernel  # [layers, batch, kv_heads, head_dim, slots], in the platform's fastest storage form
    v: Kernel  # [layers, batch, kv_heads, slots, head_dim]

    def grow(self, length: int) -> KeyValues:
        """Returns the state with empty slots appended up to ``length``."""
        return KeyValues(grown(self.k, 4, length), grown(self.v, 3, length))

    def extended(
        self, update: tuple[jax.Array, jax.Array], index: jax.Array, numerics: Numerics
    ) -> KeyValues:
        """Returns the state with new keys and values written to the slots after ``index``.

        ``update`` has ``[layers, batch, seq, kv_heads, head_dim]`` of both.
        """
        k, v = update
        # k: [layers, batch, kv_heads, head_dim, seq]; v: [layers, batch, kv_heads, seq, head_dim]
        return KeyValues(
            write_slice(self.k, k.transpose(0, 1, 3, 4, 2), 4, index, numerics),
            write_slice(self.v, v.transpose(0, 1, 3, 2, 4), 3, index, numerics),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recurrent:
    """Arrays ``[layers, batch, ...]`` of a stack whose state has one size for any number of tokens.

    A mixer's update is its new arrays. Padding must leave them unchanged.
    """

    arrays: dict[str, jax.Array]

    def grow(self, length: int) -> Recurrent:
        """Returns the state itself."""
        return self

    def extended(
        self, update: dict[str, jax.Array], index: jax.Array, numerics: Numerics
    ) -> Recurrent:
        """Returns the new state."""
        return Recurrent(
            {name: new.astype(self.arrays[name].dtype) for name, new in update.items()}
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The states of all layers, with the position and segment of every slot of cached keys."""

    # By stack: `KeyValues`, `Latents`, `Recurrent`, or another class with their methods. Layers
    # that read other layers' keys have none.
    states: dict[str, Any]
    positions: jax.Array  # int32 [batch, slots]
    segments: jax.Array  # int32 [batch, slots]; 0: an empty or a padding slot
    # int32 [batch]: real tokens so far, the position of the next one
    lengths: jax.Array
    index: jax.Array  # int32 []: slots used so far; index of the next write
    # int32 [batch]: coordinates of the next token, if images made them differ from `lengths`; of
    # models with `RopeSpec.axes` only
    coordinates: jax.Array | None = None


def grow(cache: Cache, length: int) -> Cache:
    """Returns the cache with empty slots appended up to ``length``."""
    return replace(
        cache,
        states={name: state.grow(length) for name, state in cache.states.items()},
        positions=grown(cache.positions, 1, length),
        segments=grown(cache.segments, 1, length),
    )


def repeat(cache: Cache, count: int) -> Cache:
    """Returns the cache with every row repeated ``count`` times."""
    names = ("positions", "segments", "lengths")
    rows = {name: jnp.repeat(getattr(cache, name), count, axis=0) for name in names}
    # Arrays of states have leading axes [layers, batch].
    states = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=1), cache.states)
    if cache.coordinates is not None:
        rows["coordinates"] = jnp.repeat(cache.coordinates, count, axis=0)
    return replace(cache, states=states, **rows)


def extend(
    cache: Cache,
    updates: Mapping[str, Any],
    positions: jax.Array,
    segments: jax.Array,
    numerics: Numerics,
    coordinates: jax.Array | None = None,
) -> Cache:
    """Returns the cache extended by new tokens.

    Args:
      cache: updated in place if its buffers are donated.
      updates: by stack, the updates of its layers' states, with a leading axis ``[layers]``.
      positions: int ``[batch, seq]``.
      segments: int ``[batch, seq]``, 0 for padding.
      numerics: as for `init_cache`.
      coordinates: int ``[3, batch, seq]`` of the tokens, if the cache has coordinates.
    """
    following = cache.coordinates
    if following is not None:
        assert coordinates is not None
        real = jnp.where(segments > 0, jnp.max(coordinates, axis=0) + 1, 0)
        following = jnp.maximum(following, jnp.max(real, axis=1))
    if cache.positions.shape[1] == 0:
        cache = grow(cache, positions.shape[1])
    zero = jnp.zeros((), jnp.int32)
    return Cache(
        states={
            name: state.extended(updates[name], cache.index, numerics)
            for name, state in cache.states.items()
        },
        positions=jax.lax.dynamic_update_slice(
            cache.positions, positions, (zero, cache.index)
        ),
        segments=jax.lax.dynamic_update_slice(
            cache.segments, segments, (zero, cache.index)
        ),
        lengths=cache.lengths + jnp.sum(segments > 0, axis=1, dtype=jnp.int32),
        index=cache.index + positions.shape[1],
        coordinates=following,
    )


def grown(x: Any, axis: int, length: int) -> Any:
    """Returns ``x`` with zeros appended along ``axis`` up to ``length``."""
    more = [(0, 0)] * x.ndim
    more[axis] = (0, length - x.shape[axis])
    return jax.tree.map(lambda leaf: jnp.pad(leaf, more), x)


def write_slice(
    stack: Kernel, new: jax.Array, axis: int, index: jax.Array, numerics: Numerics
) -> Kernel:
    """Returns ``stack`` with ``new`` at ``index`` along ``axis``."""
    if isinstance(stack, Stored):
        same = store(new.astype(numerics.operand), numerics)
    else:
        same = new.astype(stack.dtype)
    start = [jnp.zeros((), jnp.int32)] * stack.ndim
    start[axis] = index
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice(x, y, start), stack, same
    )


def default_positions(segments: jax.Array) -> jax.Array:
    """Returns positions that restart with every run of equal segment ids.

    Example: segments ``[[0, 1, 1, 2, 2, 2]]`` -> ``[[0, 0, 1, 0, 1, 2]]``.
    """
    first = jnp.ones_like(segments[:, :1], bool)
    differs = segments[:, 1:] != segments[:, :-1]
    return since_last(jnp.concatenate([first, differs], axis=1))


def since_last(starts: jax.Array) -> jax.Array:
    """Returns the tokens since the last of ``starts`` (bool ``[batch, seq]``), itself included: int
    of its shape."""
    index = jnp.broadcast_to(
        jnp.arange(starts.shape[1], dtype=jnp.int32)[None, :], starts.shape
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
