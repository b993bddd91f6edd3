"""Places of images in rows of tokens: their features, and tokens that see each other."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from nalora_jax.models.config import ModelConfig
from nalora_jax.models.parts import SharedInputs
from nalora_jax.ops.split_rows import padded, repeated, split


def with_images(
    x: jax.Array,
    shared: SharedInputs,
    features: jax.Array,
    tokens: jax.Array,
    config: ModelConfig,
    sharding: NamedSharding | None,
) -> tuple[jax.Array, SharedInputs]:
    """Returns ``x`` with the images' features, and the inputs of layers in which their tokens see each other.

    Features and tokens are of whole rows, x may have their parts.
    """
    sight = config.sight
    assert sight is not None
    places = tokens == sight.image_token
    x = _with_features(x, features, places, sharding)
    if sight.mutual:
        shared = _with_starts(shared, places, sharding)
    return x, shared


def _with_features(
    x: jax.Array, features: jax.Array, places: jax.Array, sharding: NamedSharding | None
) -> jax.Array:
    """Returns ``x [batch, seq, d]`` with each row's features at its ``places``, in order.

    Features and places are of whole rows, x may have their parts.
    """
    index = split(jnp.maximum(jnp.cumsum(places, axis=1) - 1, 0), sharding)
    features, places = repeated(features, sharding), split(places, sharding)
    # A row with more places than features gets NaN there, so that the error is visible.
    rows = jnp.take_along_axis(features.astype(x.dtype), index[..., None], axis=1, mode="fill")
    return jnp.where(places[..., None], rows, x)


def _with_starts(shared: SharedInputs, places: jax.Array, sharding: NamedSharding | None) -> SharedInputs:
    """Returns the inputs of layers in which runs of ``places`` in whole rows see each other."""
    row = shared.row
    if row is None:
        return replace(shared, starts=run_starts(places, shared.positions, shared.segments))
    starts = run_starts(padded(places, sharding), row.positions, row.segments)
    return replace(shared, row=row._replace(starts=starts))


def run_starts(places: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns the position of the first token of each run of ``places``: int ``[batch, seq]``.

    A token outside of ``places`` keeps its own position.

    Example: places ``[[0, 1, 1, 1, 0]]``, positions ``[[0, 1, 2, 3, 4]]`` -> ``[[0, 1, 1, 1, 4]]``.
    """
    positions, segments = (jnp.broadcast_to(x, places.shape) for x in (positions, segments))
    index = jnp.broadcast_to(jnp.arange(places.shape[1])[None], places.shape)
    goes_on = places[:, 1:] & places[:, :-1] & (segments[:, 1:] == segments[:, :-1])
    first = jnp.concatenate([jnp.ones_like(places[:, :1]), ~goes_on], axis=1)
    return positions - (index - lax.cummax(jnp.where(first, index, 0), axis=1))
