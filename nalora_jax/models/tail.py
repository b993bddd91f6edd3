"""The end of a layer: a block gated by per-layer embeddings, and a scale of the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from nalora_jax.method.ffn import AdaptedBlock, Scales
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.layers import RMSNorm
from nalora_jax.models.parts import LayerInputs, PartOptions, Shapes, SharedInputs, Tail
from nalora_jax.ops.storage import round_and_save


@dataclass(frozen=True)
class ScaledTail(Tail):
    """``(x + norm((phi(x W_gate) * embedded) W_down)) * scale``.

    Attributes:
      width: of the layer's embeddings; 0 leaves the block out.
    """

    width: int = 0
    name = "tail"

    def param_shapes(self, config: ModelConfig) -> Shapes:
        """Returns the shapes of one layer's parameters."""
        shapes: Shapes = {"scale": (1,)}
        if self.width:
            shapes["norm/scale"] = (config.d_model,)
        return shapes | {f"{name}/kernel": shape for name, shape in self.projections(config).items()}

    def projections(self, config: ModelConfig) -> Shapes:
        """Returns the kernel shapes of the projections."""
        d, width = config.d_model, self.width
        if not width:
            return {}
        return {"gate_proj": (d, width), "down_proj": (width, d)}

    def gates(self, config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the block's channels and activation, at the part's own path."""
        if not self.width:
            return {}
        return {"": ((self.width,), config.activation)}

    def saved(self, config: ModelConfig) -> float:
        """Returns the saved values: z and its factor."""
        return 2.0 * self.width

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """Returns the module."""
        return _ScaledTail(
            config.d_model,
            self.width,
            config.activation,
            options.adapters,
            numerics=options.numerics,
            stats=options.stats,
            eps=config.norm_eps,
            name=self.name,
        )


class FactoredFFN(AdaptedBlock):
    """``(phi(x W_gate) * factor) W_down`` with adapters on gate_proj and down_proj."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        factor: jax.Array,
        scales: Scales | None = None,
        *,
        token_weights: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Returns ``[batch, seq, d_model]`` for ``factor [batch, seq, d_ff]``; see `GatedFFN`."""
        options: dict[str, Any] = {"deterministic": deterministic}
        gate = self._dense("gate_proj", self.d_model, self.d_ff, scales, mask=self._mask(), **options)
        down = self._dense("down_proj", self.d_ff, self.d_model, scales, **options)
        return self._output(x, gate, None, down, token_weights, factor)


class _ScaledTail(FactoredFFN):
    eps: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInputs, shared: SharedInputs) -> jax.Array:
        if self.d_ff:
            assert layer.embedded is not None
            y = super().__call__(
                round_and_save(x, self.numerics),
                layer.embedded,
                layer.scales.get("tail", {}),
                token_weights=shared.token_weights,
                deterministic=shared.deterministic,
            )
            x = x + RMSNorm(self.eps, dtype=self.numerics.result, name="norm")(y).astype(x.dtype)
        scale = self.param("scale", nn.initializers.ones_init(), (1,))
        return x * jax.lax.stop_gradient(scale).astype(x.dtype)[0]
