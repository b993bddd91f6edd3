"""The variables of a frozen dense layer with a low-rank adapter, as a Linen module.

The arithmetic is `nalora_jax.method.low_rank`. Adapters are in the collection ``lora``::

    params: {"gate_proj": {"kernel": [d_in, d_out]}}
    lora:   {"gate_proj": {"a": [d_in, r], "b": [r, d_out]}}           # DoRA adds "magnitude": [d_out]
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.method.low_rank import Adapted, Adapter, Dense, adapted_dense
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import STACKS, Kernel, LayerStack, Stored, expand


class LoRADense(nn.Module):
    """The variables of a frozen dense layer with an optional low-rank adapter."""

    features: int  # d_out
    rank: int = 0  # of the adapter; 0 for a plain frozen layer
    use_bias: bool = False  # True if the frozen layer adds a bias
    dora: bool = False  # True if the adapter is weight-decomposed
    dropout: float = 0.0  # rate on the adapter's input if not deterministic (needs the rng "dropout")
    numerics: Numerics = Numerics()

    def __call__(self, x: jax.Array, scale: jax.Array | float = 1.0, **options: Any) -> Adapted:
        """Returns the layer's output for ``[..., d_in]``; ``options`` are those of `dense`."""
        output: Adapted = adapted_dense(x, self.dense(x.shape[-1], scale, **options), self.numerics)
        return output

    @nn.compact
    def dense(
        self,
        d_in: int,
        scale: jax.Array | float = 1.0,
        mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Dense:
        """Returns the layer's arrays. Without a ``lora`` collection the layer has no adapter.

        Args:
          d_in: width of the input.
          scale: the layer's ``s``.
          mask: ``[d_out]`` for the gated gradient of A (gates only).
          deterministic: True to switch dropout off.
        """
        kernel = frozen_kernel(self, (d_in, self.features))
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        name = self.name or "dense"
        if not self.rank or not (self.is_initializing() or self.has_variable("lora", "a")):
            return Dense(kernel, None, bias, name=name)
        random = lambda: init_a(self.make_rng("params"), (d_in, self.rank))  # noqa: E731
        a = self.variable("lora", "a", random).value
        b = self.variable("lora", "b", jnp.zeros, (self.rank, self.features), jnp.float32).value
        if self.has_variable("lora", "singular"):  # AdaLoRA, in training
            a = a * self.get_variable("lora", "singular")[None, :]
        start = initial_factors(self)
        magnitude = magnitude_of(self, kernel, axis=0) if self.dora else None
        dropout = None
        if self.dropout > 0 and not deterministic:
            dropout = nn.Dropout(self.dropout, deterministic=False)
        return Dense(kernel, Adapter(a, b, scale, mask, magnitude, start), bias, dropout, name)


def initial_factors(module: nn.Module) -> tuple[jax.Array, jax.Array] | None:
    """Returns A and B at the first step, if the parameters of a module contain them."""
    if not module.has_variable("params", "start_a"):
        return None
    return module.get_variable("params", "start_a"), module.get_variable("params", "start_b")


def magnitude_of(module: nn.Module, kernel: Kernel, axis: int) -> jax.Array:
    """Returns DoRA's magnitudes of a module; they start as the norms of the kernel's columns."""
    norms = lambda: jnp.linalg.norm(expand(kernel).astype(jnp.float32), axis=axis)  # noqa: E731
    magnitude: jax.Array = module.variable("lora", "magnitude", norms).value
    return magnitude


def frozen_kernel(
    module: nn.Module,
    shape: tuple[int, ...],
    init: nn.initializers.Initializer | None = None,
    name: str = "kernel",
) -> Kernel:
    """Returns the frozen array ``name`` of a module, in its storage form.

    Args:
      module: a module within a compact method or ``setup``.
      shape: of the float array.
      init: LeCun-normal by default.
      name: of the parameter.
    """
    if module.has_variable("params", name):
        stored: Kernel = module.get_variable("params", name)
        if module.has_variable(STACKS, name):
            stack: LayerStack = module.get_variable(STACKS, name)
            assert isinstance(stored, jax.Array)
            return stack.layer(stored)
        if isinstance(stored, Stored):  # `param` would compare the shapes of its leaves
            return stored
    kernel: jax.Array = module.param(name, init or nn.initializers.lecun_normal(), shape)
    return kernel


def init_a(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns A of a fresh adapter ``[..., d_in, r]``, uniform in +-1/sqrt(d_in).

    PEFT draws from the same distribution (Kaiming-uniform with a = sqrt 5).
    """
    bound = 1.0 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
