"""The gated short convolution of LFM2: a causal depthwise convolution between two gates.

``y = W_out (C * conv(B * u))`` with ``[B, C, u] = W_in x``. Taps do not read across segments, so packed
sequences do not mix. In generation the state is the last ``width - 1`` inputs of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.method.low_rank import adapted_dense
from nalora_jax.models.cache import Recurrent
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.parts import LayerInputs, Mixer, PartOptions, Shapes, SharedInputs
from nalora_jax.ops.causal_conv import causal_conv, causal_conv_after
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.split_mixers import split_conv
from nalora_jax.ops.storage import round_and_save


@dataclass(frozen=True)
class ShortConvolution(Mixer):
    """Sizes of a gated short convolution."""

    name: ClassVar[str] = "conv"
    splits_rows: ClassVar[bool] = True
    width: int  # taps of a channel
    bias: bool = False  # of the convolution and both projections

    def param_shapes(self, config: ModelConfig) -> Shapes:
        """Returns the shapes of kernels, biases and the taps, which have torch's layout."""
        d = config.d_model
        shapes: Shapes = {"taps": (d, 1, self.width)}
        shapes |= {f"{name}/kernel": shape for name, shape in self.projections(config).items()}
        if self.bias:
            shapes |= {"taps_bias": (d,), "bcx_proj/bias": (3 * d,), "o_proj/bias": (d,)}
        return shapes

    def projections(self, config: ModelConfig) -> Shapes:
        """Returns the kernels of the projections to B, C and u, and of the output."""
        d = config.d_model
        return {"bcx_proj": (d, 3 * d), "o_proj": (d, d)}

    def flops(self, config: ModelConfig, seq: int) -> float:
        """Returns the flops of the taps and of both gates for one layer and row."""
        return seq * config.d_model * (2.0 * self.width + 1)

    def saved(self, config: ModelConfig) -> float:
        """Returns the values per token of B, C and u."""
        return 3.0 * config.d_model

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """Returns the Linen module."""
        return GatedConvolution(self, config.d_model, options, name=self.name)

    def init_state(self, config: ModelConfig, batch: int, numerics: Numerics) -> Recurrent:
        """Returns zeros: the inputs of the convolution before the first token."""
        shape = (config.n_layers, batch, self.width - 1, config.d_model)
        return Recurrent({"inputs": jnp.zeros(shape, jnp.float32)})


class GatedConvolution(nn.Module):
    """Adapted projections, two gates and the convolution."""

    part: ShortConvolution
    d_model: int
    options: PartOptions

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: LayerInputs, shared: SharedInputs
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """Returns ``[batch, seq, d_model]``, and with a cache the new state."""
        bcx = round_and_save(
            self._project("bcx_proj", x, 3 * self.d_model, layer, shared), self.options.numerics
        )
        before, after, u = jnp.split(bcx.astype(jnp.float32), 3, axis=-1)
        taps = self.param("taps", nn.initializers.lecun_normal(), (self.d_model, 1, self.part.width))
        kernel = taps[:, 0].T.astype(jnp.float32)
        state: dict[str, jax.Array] | None = None
        if self.options.sharding is not None and shared.row is not None:
            mixed = split_conv(before * u, kernel, shared.row, self.options.sharding)
        elif layer.cached is None:
            mixed = causal_conv(before * u, kernel, shared.segments)
        else:
            inputs = layer.cached.arrays["inputs"]
            mixed, inputs = causal_conv_after(before * u, kernel, shared.segments, inputs)
            state = {"inputs": inputs}
        if self.part.bias:
            bias = self.param("taps_bias", nn.initializers.zeros_init(), (self.d_model,))
            mixed = mixed + jnp.broadcast_to(bias.astype(jnp.float32), mixed.shape)
        y = (after * mixed).astype(x.dtype)
        return self._project("o_proj", y, self.d_model, layer, shared), state

    def _project(
        self, name: str, x: jax.Array, d_out: int, layer: LayerInputs, shared: SharedInputs
    ) -> jax.Array:
        dense = self.options.dense(name, x.shape[-1], d_out, layer, shared, bias=self.part.bias)
        return adapted_dense(x, dense, self.options.numerics).y
