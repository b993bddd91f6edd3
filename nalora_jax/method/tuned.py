"""Weights of the base that are trained themselves, in full or partial tuning.

The trained leaves have a tree of their own beside the adapters, ``lora["tuned"]``, with the paths
that they have in ``params``. So optimizer, checkpoints, shardings and resumption treat them as they
treat adapters. Within a step they take their place in ``params``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from nalora_jax.common import trees
from nalora_jax.ops.shardings import RowSharding, mesh_sharding
from nalora_jax.ops.storage import Stored, Trained

TUNED = "tuned"
# Selected layers of a stacked leaf, bool [layers], by path; leaves that are trained whole are not
# listed.
LayerMasks = Mapping[str, np.ndarray]

# Leaves of these names are read by matmuls and lookups, which take `Trained`.
_KERNELS = ("kernel", "embedding")


def has_tuned(lora: Any) -> bool:
    """Returns True if weights of the base are among the trained leaves."""
    return isinstance(lora, Mapping) and TUNED in lora


def join_tuned(params: Any, lora: Any, shardings: Any = None) -> tuple[Any, Any]:
    """Returns the collections of a model: weights with the trained ones among them, and adapters.

    Args:
      params: the frozen weights, without the trained ones or with their first values.
      lora: the trained leaves of a run, adapters and `TUNED`.
      shardings: of ``lora``, on a mesh.
    """
    if not has_tuned(lora):
        return params, lora
    adapters = {name: tree for name, tree in lora.items() if name != TUNED}
    places = {}
    if shardings is not None:
        places = trees.flatten(shardings[TUNED])
    leaves = trees.flatten(params, _is_stored)
    for path, leaf in trees.flatten(lora[TUNED]).items():
        if path.rpartition("/")[2] in _KERNELS:
            leaf = Trained(leaf, _of_one_layer(places.get(path), path))
        leaves[path] = leaf
    return trees.unflatten(leaves), adapters


def _of_one_layer(sharding: RowSharding, path: str) -> RowSharding:
    """Returns the sharding of one layer of a stacked leaf ``[layers, ...]``."""
    if sharding is None or not path.startswith("layers/"):
        return sharding
    return mesh_sharding(sharding, *sharding.spec[1:])


def remove_tuned(params: Any, lora: Any) -> Any:
    """Returns the frozen weights without those that a run trains, so that they take no memory."""
    if not has_tuned(lora):
        return params
    trained = trees.flatten(lora[TUNED])
    leaves = trees.flatten(params, _is_stored)
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trained}
    return trees.unflatten(frozen)


def cast_tuned(params: Any, lora: Any, dtype: Any) -> tuple[Any, Any]:
    """Returns `join_tuned` with plain arrays of ``dtype`` in place of the trained leaves."""
    if not has_tuned(lora):
        return params, lora
    adapters = {name: tree for name, tree in lora.items() if name != TUNED}
    leaves = trees.flatten(params, _is_stored)
    for path, leaf in trees.flatten(lora[TUNED]).items():
        leaves[path] = leaf.astype(dtype)
    return trees.unflatten(leaves), adapters


def select_layers(lora: Any, masks: LayerMasks) -> Any:
    """Returns the trained leaves with gradients for the selected layers only."""
    if not masks:
        return lora
    tuned = trees.flatten(lora[TUNED])
    for path, mask in masks.items():
        selected = _beside(mask, tuned[path])
        tuned[path] = jnp.where(selected, tuned[path], lax.stop_gradient(tuned[path]))
    return {**lora, TUNED: trees.unflatten(tuned)}


def keep_other_layers(masks: LayerMasks) -> optax.GradientTransformation:
    """Returns a transform that removes the updates, such as weight decay, of layers that are not
    selected."""

    def update(updates: Any, params: Any = None) -> Any:
        tuned = trees.flatten(updates[TUNED])
        for path, mask in masks.items():
            tuned[path] = jnp.where(_beside(mask, tuned[path]), tuned[path], 0.0)
        return {**updates, TUNED: trees.unflatten(tuned)}

    return optax.stateless(update)


def _beside(mask: np.ndarray, leaf: jax.Array) -> jax.Array:
    """Returns a mask ``[layers]`` in the shape of a leaf ``[layers, ...]``."""
    wide = mask.reshape(-1, *[1] * (leaf.ndim - 1))
    return jnp.broadcast_to(wide, leaf.shape)


def _is_stored(leaf: Any) -> bool:
    """Returns True for an array in a form that is no float array."""
    return isinstance(leaf, Stored)
