"""Adapters for unmodified Flax models of other libraries, selected by a keymap and rules.

    Linen   adapt_linen(module, variables, (tokens,), keymap=..., lora=..., activation="silu")
    NNX     adapt_nnx(graph, state, keymap=..., lora=..., activation="silu")

Both return the same interface (`nalora_jax.integrations.model.Foreign`): an adapter tree separate
from the weights, ``apply``, and ``gradients``, which also returns the statistics that both
mechanisms use.
"""

from __future__ import annotations

from nalora_jax.integrations.linen import adapt_linen
from nalora_jax.integrations.nnx import adapt_nnx

__all__ = ["adapt_linen", "adapt_nnx"]
