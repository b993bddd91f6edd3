"""Routing replay: the experts that a program chose are recorded, and another program takes them.

Two programs of one model round differently, and where two experts have almost equal scores the
rounding chooses another expert, which changes the output by far more than rounding (arXiv
2510.11370). A training program that takes the generator's experts differs from it by rounding only.
The weights of the experts are still those of the training program's router.

Layers without experts have no place in the arrays. Their dtype is `ROUTING_DTYPE`, -1 for tokens
whose experts the router chooses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.common.trees import flatten
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import Stack, stacks

# The collection of the experts of every token, which a caller may ask for (``mutable``).
ROUTING = "routing"
ROUTING_DTYPE = "int16"


def routing_shape(config: ModelConfig) -> tuple[int, int]:
    """Returns the number of layers with experts, and the experts of a token; (0, 0) without."""
    mixtures = _mixtures(config)
    if not mixtures:
        return 0, 0
    layers = sum(len(stack.layers) for stack in mixtures)
    return layers, mixtures[0].config.experts_per_token


def _mixtures(config: ModelConfig) -> list[Stack]:
    """Returns the stacks of layers with experts."""
    return [stack for stack in stacks(config) if stack.config.n_experts]


def recorded_routing(config: ModelConfig, recorded: Mapping[str, Any]) -> jax.Array:
    """Returns the experts of every token, `ROUTING_DTYPE` ``[batch, seq, mixtures, top_k]``, the
    layers in order.

    Args:
      config: of the decoder.
      recorded: its collection `ROUTING`, with arrays ``[layers of a stack, batch, seq, top_k]``.
    """
    arrays = flatten(recorded)
    numbers: list[int] = []
    parts = []
    for stack in _mixtures(config):
        (path,) = (name for name in arrays if name.startswith(f"{stack.prefix}/"))
        numbers += stack.layers
        parts.append(arrays[path])
    in_order = jnp.concatenate(parts)[np.argsort(numbers)]
    # [mixtures, batch, seq, top_k] -> [batch, seq, mixtures, top_k]
    return jnp.moveaxis(in_order, 0, 2).astype(ROUTING_DTYPE)


def routing_by_stack(config: ModelConfig, replayed: jax.Array) -> dict[str, jax.Array]:
    """Returns the experts of the layers of each stack, ``[layers of the stack, batch, seq,
    top_k]``.

    ``replayed`` is ``[batch, seq, mixtures, top_k]``, see `recorded_routing`.
    """
    mixtures = _mixtures(config)
    numbers = sorted(number for stack in mixtures for number in stack.layers)
    by_layer = jnp.moveaxis(replayed, 2, 0)
    return {
        stack.prefix: by_layer[np.searchsorted(numbers, stack.layers)]
        for stack in mixtures
    }
