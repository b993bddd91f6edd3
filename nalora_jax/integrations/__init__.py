"""Models of other people's, adapted as they are: by a keymap for their names, and rules.

    Linen   adapted = adapt_linen(module, variables, (tokens,), keymap=..., lora=..., activation="silu")
    NNX     adapted = adapt_nnx(graph, state, keymap=..., lora=..., activation="silu")

Both give the same handle (`nalora_jax.integrations.model.Foreign`): an adapter tree apart from the weights, ``apply``
and ``gradients``, which also returns the statistics that both mechanisms are made of.
"""

from __future__ import annotations

from nalora_jax.integrations.linen import adapt_linen
from nalora_jax.integrations.nnx import adapt_nnx

__all__ = ["adapt_linen", "adapt_nnx"]
