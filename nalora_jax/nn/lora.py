"""A frozen dense layer that carries a low-rank adapter (see `nalora_jax.ops.adapted_dense`), as a Linen module."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.nn.low_rank import TargetSpec, init_a
from nalora_jax.ops.adapted_dense import Adapted, Adapter, Dense, adapted_dense
from nalora_jax.ops.numerics import Numerics
from nalora_jax.ops.storage import STACKS, Kernel, LayerStack, Stored, expand


class LoRADense(nn.Module):
    """A frozen dense layer with an optional low-rank adapter.

    Attributes:
      features: ``d_out``.
      target: the adapter's spec, or None for a plain frozen layer. Without a ``lora`` collection the layer is the base.
      use_bias: whether the frozen layer adds a bias.
      dora: whether the adapter is weight-decomposed.
      dropout: rate on the adapter's input when not ``deterministic`` (needs the rng ``dropout``).
      numerics: dtypes.
    """

    features: int
    target: TargetSpec | None = None
    use_bias: bool = False
    dora: bool = False
    dropout: float = 0.0
    numerics: Numerics = Numerics()

    def __call__(
        self,
        x: jax.Array,
        scale: jax.Array | float = 1.0,
        mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
        adapter_ids: jax.Array | None = None,
        adapted: bool = True,
    ) -> Adapted:
        """``[..., d_in]`` -> ``[..., d_out]``, and the adapter's part of it; ``adapted=False`` is the frozen layer."""
        dense = self.dense(x.shape[-1], scale, mask, deterministic=deterministic, adapter_ids=adapter_ids)
        made: Adapted = adapted_dense(x, dense if adapted else dense._replace(adapter=None), self.numerics)
        return made

    @nn.compact
    def dense(
        self,
        d_in: int,
        scale: jax.Array | float = 1.0,
        mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
        adapter_ids: jax.Array | None = None,
    ) -> Dense:
        """The layer's arrays, as operations take them.

        Args:
          d_in: width of the input.
          scale: the layer's ``s``.
          mask: ``[d_out]`` for the gated gradient of A (gates only).
          deterministic: no dropout.
          adapter_ids: ``[batch]``, with a stack of adapters in the ``lora`` collection.
        """
        kernel = frozen_kernel(self, (d_in, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else None
        name = self.name or "dense"
        if self.target is None or not (self.is_initializing() or self.has_variable("lora", "a")):
            return Dense(kernel, None, bias, name=name)
        rank = self.target.rank
        a = self.variable("lora", "a", lambda: init_a(self.make_rng("params"), (d_in, rank))).value
        b = self.variable("lora", "b", lambda: jnp.zeros((rank, self.features), jnp.float32)).value
        if self.has_variable("lora", "singular"):  # AdaLoRA, in training
            a = a * self.get_variable("lora", "singular")[None, :]
        stack = a.ndim == 3
        if stack and adapter_ids is None:
            raise ValueError("a stack of adapters needs adapter_ids")
        magnitude = self._magnitude(kernel) if self.dora else None
        start = None
        if self.has_variable("params", "start_a"):
            start = self.get_variable("params", "start_a"), self.get_variable("params", "start_b")
        adapter = Adapter(a, b, scale, mask, magnitude, adapter_ids if stack else None, start)
        dropout = nn.Dropout(self.dropout, deterministic=False) if self.dropout > 0 and not deterministic else None
        return Dense(kernel, adapter, bias, dropout, name)

    def _magnitude(self, kernel: Kernel) -> jax.Array:
        start = lambda: jnp.linalg.norm(expand(kernel).astype(jnp.float32), axis=0)  # noqa: E731
        magnitude: jax.Array = self.variable("lora", "magnitude", start).value
        return magnitude


def frozen_kernel(
    module: nn.Module, shape: tuple[int, ...], init: nn.initializers.Initializer | None = None, name: str = "kernel"
) -> Kernel:
    """The frozen array ``name`` of a module, in whatever form it is stored.

    Args:
      module: within a compact method or ``setup``.
      shape: of the float array.
      init: LeCun-normal by default.
      name: of the parameter.
    """
    if module.has_variable("params", name):
        found: Kernel = module.get_variable("params", name)
        if module.has_variable(STACKS, name):
            stack: LayerStack = module.get_variable(STACKS, name)
            assert isinstance(found, jax.Array)
            return stack.layer(found)
        if isinstance(found, Stored):  # `param` would compare the shapes of what it is stored as
            return found
    kernel: jax.Array = module.param(name, init or nn.initializers.lecun_normal(), shape)
    return kernel
