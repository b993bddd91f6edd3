"""The end of a layer that scales the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax

from nalora_jax.models.config import ModelConfig
from nalora_jax.models.parts import LayerInputs, PartOptions, Shapes, SharedInputs, Tail


@dataclass(frozen=True)
class ScaledTail(Tail):
    """Multiplies the residual stream by a stored number."""

    name = "tail"

    def param_shapes(self, config: ModelConfig) -> Shapes:
        """Returns the shapes of one layer's parameters."""
        return {"layer_scalar": (1,)}

    def projections(self, config: ModelConfig) -> Shapes:
        """Returns the kernel shapes of the projections."""
        return {}

    def gates(self, config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns no gated block."""
        return {}

    def flops(self, config: ModelConfig, seq: int) -> float:
        """Returns 0: no matmul."""
        return 0.0

    def saved(self, config: ModelConfig) -> float:
        """Returns 0: the product's gradient needs the scalar only."""
        return 0.0

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """Returns the module."""
        return _ScaledTail(name=self.name)


class _ScaledTail(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInputs, shared: SharedInputs) -> jax.Array:
        scalar = self.param("layer_scalar", nn.initializers.ones_init(), (1,))
        return x * jax.lax.stop_gradient(scalar).astype(x.dtype)[0]
