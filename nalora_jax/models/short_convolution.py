"""The gated short convolution of LFM2: a causal depthwise convolution between two gates.

``y = W_out (C * conv(B * u))`` with ``[B, C, u] = W_in x``. A tap reads tokens of its own segment only,
so packed sequences do not mix. In generation the state is the last ``width - 1`` inputs of the
convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.dense import LoRADense
from nalora_jax.models.cache import Recurrent
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.parts import LayerInputs, Mixer, PartOptions, Shapes, SharedInputs
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import round_and_save


@dataclass(frozen=True)
class ShortConvolution(Mixer):
    """Sizes of a gated short convolution."""

    name: ClassVar[str] = "conv"
    width: int  # taps of a channel
    bias: bool = False  # of the convolution and both projections

    def param_shapes(self, config: ModelConfig) -> Shapes:
        """Returns the taps ``[d_model, 1, width]``, in the layout of torch, and the biases."""
        d = config.d_model
        biases: Shapes = {"taps_bias": (d,), "bcx_proj/bias": (3 * d,), "o_proj/bias": (d,)}
        return {"taps": (d, 1, self.width)} | (biases if self.bias else {})

    def projections(self, config: ModelConfig) -> Shapes:
        """Returns the kernels of the projections to B, C and u, and of the output."""
        d = config.d_model
        return {"bcx_proj": (d, 3 * d), "o_proj": (d, d)}

    def flops(self, config: ModelConfig, seq: int) -> float:
        """Returns the flops of the taps and of both gates for one layer and row."""
        return 2.0 * seq * config.d_model * (self.width + 1)

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
        bcx = round_and_save(self._project("bcx_proj", x, 3 * self.d_model, layer, shared), self.options.numerics)
        before, after, u = jnp.split(bcx.astype(jnp.float32), 3, axis=-1)
        taps = self.param("taps", nn.initializers.lecun_normal(), (self.d_model, 1, self.part.width))
        taps = taps[:, 0].astype(jnp.float32)
        gated = before * u
        state: dict[str, jax.Array] | None = None
        if layer.cached is None:
            mixed = convolve(gated, taps, shared.segments)
        else:
            segments = jnp.broadcast_to(shared.segments, x.shape[:2])
            mixed, inputs = continued(gated, taps, segments, layer.cached.arrays["inputs"])
            state = {"inputs": inputs}
        if self.part.bias:
            bias = self.param("taps_bias", nn.initializers.zeros_init(), (self.d_model,))
            mixed = mixed + jnp.broadcast_to(bias.astype(jnp.float32), mixed.shape)
        y = (after * mixed).astype(x.dtype)
        return self._project("o_proj", y, self.d_model, layer, shared), state

    def _project(self, name: str, x: jax.Array, d_out: int, layer: LayerInputs, shared: SharedInputs) -> jax.Array:
        adapters, numerics = self.options.adapters, self.options.numerics
        scale = layer.scales.get(self.part.name, {}).get(name, 1.0)
        dense = LoRADense(
            d_out, adapters.rank(name), self.part.bias, adapters.dora, adapters.dropout, numerics, name=name
        )
        options: dict[str, Any] = {"deterministic": shared.deterministic, "adapter_ids": shared.adapter_ids}
        return dense(x, scale, **options).y


def convolve(x: jax.Array, taps: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns the causal convolution within segments.

    Args:
      x: float32 ``[batch, seq, d]``.
      taps: float32 ``[d, width]``; the last tap reads the token itself.
      segments: int ``[batch or 1, seq]``; 0 for padding.

    Returns:
      ``[batch, seq, d]``.
    """
    width, seq = taps.shape[1], x.shape[1]
    total = jnp.zeros_like(x)
    for lag in range(min(width, seq)):
        back = ((0, 0), (lag, 0))
        same = segments == jnp.pad(segments[:, : seq - lag], back)
        earlier = jnp.pad(x[:, : seq - lag], (*back, (0, 0)))
        total += taps[None, None, :, width - 1 - lag] * jnp.where(same[..., None], earlier, 0.0)
    return total


def continued(x: jax.Array, taps: jax.Array, segments: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the convolution of one segment that continues earlier calls, and the new state.

    Args:
      x: float32 ``[batch, seq, d]``.
      taps: as for `convolve`.
      segments: int ``[batch, seq]``: a row has one run of tokens of segment 1, and padding before or
        after it.
      state: float32 ``[batch, width - 1, d]``, the last inputs of earlier calls.
    """
    width, seq = taps.shape[1], x.shape[1]
    real = segments > 0
    first = jnp.argmax(real, axis=1)
    extended = jnp.pad(jnp.where(real[..., None], x, 0.0), ((0, 0), (width - 1, 0), (0, 0)))
    # The state takes the places before the first token, of padding or of the added zeros.
    extended = jax.vmap(lambda row, last, start: jax.lax.dynamic_update_slice(row, last, (start, 0)))(
        extended, state, first
    )
    total = sum(taps[None, None, :, tap] * extended[:, tap : tap + seq] for tap in range(width))
    end = first + jnp.sum(real, axis=1)
    return total, jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, width - 1))(extended, end)
