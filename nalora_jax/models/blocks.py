"""Gated blocks: the feed-forward block that a config describes, and the block at a layer's end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax

from nalora_jax.method.ffn import AdaptedBlock, GatedFFN, SelfGatedFFN
from nalora_jax.models.config import FeedForward, Gates, ModelConfig, ParamShapes, Part
from nalora_jax.models.parts import LayerInputs, PartOptions, RMSNorm, SharedInputs
from nalora_jax.ops.storage import round_and_save


@dataclass(frozen=True)
class GatedBlock(FeedForward):
    """The block that the config describes: ``(phi(x W_gate) * x W_up) W_down``, or ``phi(x W_in)
    W_out``."""

    name: ClassVar[str] = "ffn"

    def projections(self, config: ModelConfig) -> ParamShapes:
        """See `Part`."""
        d = config.d_model
        f = config.d_ff
        if config.gated:
            return {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
        return {"in_proj": (d, f), "out_proj": (f, d)}

    def saved(self, config: ModelConfig) -> float:
        """See `Part`."""
        return (1.0 + config.gated) * config.d_ff

    def gates(self, config: ModelConfig) -> Gates:
        """See `Part`."""
        return {"": ((config.d_ff,), config.activation)}

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """See `Part`."""
        block: Any = GatedFFN if config.gated else SelfGatedFFN
        return block(
            config.d_model,
            config.d_ff,
            config.activation,
            **options.of_block(config.ffn_bias),
        )


@dataclass(frozen=True)
class ScaledTail(Part):
    """The end of a layer, on the residual stream: ``(x + norm((phi(x W_gate) * embedded) W_down)) *
    scale``.

    Attributes:
      width: of the layer's embeddings; 0 leaves the block out.
    """

    width: int = 0
    name = "tail"

    def arrays(self, config: ModelConfig) -> ParamShapes:
        """Returns the scale, and that of the norm."""
        shapes: ParamShapes = {"scale": (1,)}
        if self.width:
            shapes["norm/scale"] = (config.d_model,)
        return shapes

    def projections(self, config: ModelConfig) -> ParamShapes:
        """Returns the kernel shapes of the projections."""
        d = config.d_model
        width = self.width
        if not width:
            return {}
        return {"gate_proj": (d, width), "down_proj": (width, d)}

    def gates(self, config: ModelConfig) -> Gates:
        """Returns the block's channels and activation, at the part's own path."""
        if not self.width:
            return {}
        return {"": ((self.width,), config.activation)}

    def saved(self, config: ModelConfig) -> float:
        """Returns the saved values: z and its factor."""
        return 2.0 * self.width

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """Returns the module: ``(x, LayerInputs, SharedInputs) -> x``."""
        sizes = config.d_model, self.width, config.activation
        return _ScaledTail(*sizes, **options.of_block(bias=False), eps=config.norm_eps)


class _ScaledTail(AdaptedBlock):
    """The module of `ScaledTail`; ``eps`` is the norm's."""

    eps: float = 0.0

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: LayerInputs, shared: SharedInputs
    ) -> jax.Array:
        """Returns ``[batch, seq, d_model]`` as ``x``."""
        if self.d_ff:
            y = super().__call__(
                round_and_save(x, self.numerics),
                layer.scales.get("tail"),
                token_weights=shared.token_weights,
                deterministic=shared.deterministic,
                up=layer.embedded,
            )
            x = x + RMSNorm(self.eps, dtype=self.numerics.result, name="norm")(
                y
            ).astype(x.dtype)
        scale = self.param("scale", nn.initializers.ones_init(), (1,))
        return x * jax.lax.stop_gradient(scale).astype(x.dtype)[0]
