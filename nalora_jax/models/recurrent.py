"""Mixers whose state has one size for any number of tokens.

Gated DeltaNet, the linear attention of Qwen3-Next and Qwen3.5 (arXiv 2412.06464)::

    q, k, v = phi(conv(x W_qkv))  g = -exp(a_log) softplus(x W_a + dt_bias)  b = sigmoid(x W_b)
    o = gated_delta_rule(q, k, v, g, b)
    y = (norm(o) * silu(x W_z)) W_out

The gated short convolution of LFM2, a causal depthwise convolution between two gates::

    [B, C, u] = W_in x      y = W_out (C * conv(B * u))

Taps do not read across segments, so packed sequences do not mix. In generation the state includes
the last ``width - 1`` inputs of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.common.devices import TENSOR
from nalora_jax.method import activations
from nalora_jax.models.cache import Recurrent
from nalora_jax.models.config import Mixer, ModelConfig, ParamShapes
from nalora_jax.models.parts import (
    LayerInputs,
    PartOptions,
    RMSNorm,
    SharedInputs,
    constrain,
)
from nalora_jax.ops.causal_conv import causal_conv, causal_conv_after
from nalora_jax.ops.delta_rule import CHUNK_TOKENS, DeltaInputs, gated_delta_rule
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.shardings import RowSharding, mesh_sharding
from nalora_jax.ops.split_mixers import split_conv, split_delta_rule
from nalora_jax.ops.storage import round_and_save


@dataclass(frozen=True)
class GatedDeltaNet(Mixer):
    """Sizes of a Gated DeltaNet."""

    key_heads: int  # of queries and keys
    value_heads: int  # a multiple of key_heads
    key_dim: int  # of a head
    value_dim: int  # of a head
    conv_width: int
    # True if one projection computes q, k, v, z and another one b, a, both ordered by key head
    # (Qwen3-Next); False if z, b and a have projections each (Qwen3.5).
    fused: bool = False

    name: ClassVar[str] = "linear_attn"
    splits_rows: ClassVar[bool] = True

    @property
    def values_per_key(self) -> int:
        """Value heads of each key head."""
        return self.value_heads // self.key_heads

    @property
    def keys(self) -> int:
        """Width of all keys."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Width of all values."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution."""
        return 2 * self.keys + self.values

    def inputs(self) -> dict[str, int]:
        """Returns the widths of the projections of a layer's input."""
        if self.fused:
            return {
                "in_proj_qkvz": self.channels + self.values,
                "in_proj_ba": 2 * self.value_heads,
            }
        heads = self.value_heads
        return {
            "in_proj_qkv": self.channels,
            "in_proj_z": self.values,
            "in_proj_b": heads,
            "in_proj_a": heads,
        }

    def arrays(self, config: ModelConfig) -> ParamShapes:
        """Returns the taps of the convolution, rates of decay by head and the norm's scale."""
        heads = (self.value_heads,)
        # The convolution's weight has torch's shape.
        conv = {"conv/weight": (self.channels, 1, self.conv_width)}
        return conv | {
            "a_log": heads,
            "dt_bias": heads,
            "norm/scale": (self.value_dim,),
        }

    def projections(self, config: ModelConfig) -> ParamShapes:
        """See `Part`."""
        d = config.d_model
        shapes: ParamShapes = {
            name: (d, width) for name, width in self.inputs().items()
        }
        return shapes | {"out_proj": (self.values, d)}

    def flops(self, config: ModelConfig, seq: int) -> float:
        """Returns the forward flops for one row, without projections and triangular inverses."""
        chunk = min(CHUNK_TOKENS, seq)
        of_key_head = 4.0 * chunk * self.key_dim  # scores of queries and of keys
        # The state is read twice and written once; corrections are solved for and summed.
        of_value_head = (
            6.0 * self.key_dim * self.value_dim + 4.0 * chunk * self.value_dim
        )
        of_conv = 2.0 * self.conv_width * self.channels
        of_token = (
            self.key_heads * of_key_head + self.value_heads * of_value_head + of_conv
        )
        return config.n_layers * seq * of_token

    def saved(self, config: ModelConfig) -> float:
        """Returns the outputs of the input's projections, and one float32 state per chunk."""
        # A float32 counts as two values of the projections' dtype.
        states = self.value_heads * self.key_dim * self.value_dim / CHUNK_TOKENS
        return sum(self.inputs().values()) + 2 * states

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """See `Part`."""
        return GatedDeltaNetLayer(self, config, options, name=self.name)

    def init_state(
        self, config: ModelConfig, batch: int, length: int, numerics: Numerics
    ) -> Recurrent:
        """Returns zeros: the convolution's last inputs, and a matrix ``[key_dim, value_dim]`` of
        each value head."""
        lead = (config.n_layers, batch)
        heads = (self.key_heads, self.values_per_key)
        state = (*lead, *heads, self.key_dim, self.value_dim)
        conv = (*lead, self.conv_width - 1, self.channels)
        return Recurrent(
            {
                "conv": jnp.zeros(conv, numerics.result),
                "state": jnp.zeros(state, jnp.float32),
            }
        )


class GatedDeltaNetLayer(nn.Module):
    """Adapted projections, convolution, delta rule and gated norm."""

    sizes: GatedDeltaNet
    config: ModelConfig
    options: PartOptions

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: LayerInputs, shared: SharedInputs
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """Returns ``[batch, seq, d_model]``, and the new convolution inputs and state if there is a
        cache."""
        sizes = self.sizes
        numerics = self.options.numerics
        sharding = self.options.shardings.rows
        # The projections of x: qkv [batch, seq, channels], z [batch, seq, values], and b and a
        # [batch, seq, value heads].
        outputs = self.options.projected(x, sizes.inputs(), layer, shared)
        projected = [round_and_save(y, numerics) for y in outputs]
        if sizes.fused:
            qkv, z, b, a = _by_key_head(projected, sizes)
        else:
            qkv, z, b, a = projected
        before = {}  # the state after earlier calls, in generation
        if isinstance(layer.cached, Recurrent):
            before = layer.cached.arrays
        # q, k, v = phi(conv(qkv))
        convolution = Convolution(
            sizes.channels, sizes.conv_width, sharding, name="conv"
        )
        out, convolved = convolution(qkv, shared, before.get("conv"))
        qkv = (
            activations.get_activation(self.config.activation)
            .phi(out)
            .astype(qkv.dtype)
        )
        q, k, v = jnp.split(qkv, (sizes.keys, 2 * sizes.keys), axis=-1)
        # q, k: [batch, seq, key heads, key_dim]; v: [batch, seq, key heads, values per key,
        # value_dim].
        q, k = (self._heads(y, sizes.key_dim) for y in (q, k))
        v = self._heads(v, sizes.values_per_key, sizes.value_dim)
        # Log decays g and betas b, float32 [batch, seq, value heads].
        a_log = self._per_head("a_log", nn.initializers.zeros_init())
        bias = self._per_head("dt_bias", nn.initializers.ones_init())
        decay = -jnp.exp(a_log) * jax.nn.softplus(a.astype(jnp.float32) + bias)
        beta = jax.nn.sigmoid(b.astype(jnp.float32))
        # [batch, seq, key heads, values per key]
        decay, beta = (self._heads(y, sizes.values_per_key) for y in (decay, beta))
        inputs = DeltaInputs(q, k, v, decay, beta)
        state = None
        if sharding is None or shared.row is None:
            out, state = gated_delta_rule(
                inputs, shared.segments, before.get("state"), numerics=numerics
            )
        else:
            out = split_delta_rule(inputs, shared.row, sharding)
        # The gated norm, [batch, seq, value heads, value_dim], then joined to [batch, seq, values].
        normed = RMSNorm(self.config.norm_eps, name="norm")(
            out.reshape(*x.shape[:-1], -1, sizes.value_dim)
        )
        gate = jax.nn.silu(z.astype(jnp.float32)).reshape(normed.shape)
        y = (normed * gate).reshape(*x.shape[:-1], sizes.values).astype(numerics.result)
        (y,) = self.options.projected(y, {"out_proj": x.shape[-1]}, layer, shared)
        if convolved is None or state is None:
            return y, None
        return y, {"conv": convolved, "state": state}

    def _per_head(self, name: str, init: Callable[..., jax.Array]) -> jax.Array:
        """Returns frozen values of the value heads, float32 ``[1, 1, value heads]``."""
        values: jax.Array = self.param(name, init, (self.sizes.value_heads,))
        return jax.lax.stop_gradient(values).astype(jnp.float32)[None, None]

    def _heads(self, x: jax.Array, *shape: int) -> jax.Array:
        """Returns ``[batch, seq, key heads, *shape]``, its heads split over the mesh axis
        "tensor"."""
        heads = self.sizes.key_heads
        sharding = self.options.shardings.rows
        if sharding is not None:
            if heads % sharding.mesh.shape.get(TENSOR, 1) == 0:
                axis = TENSOR
            else:
                axis = None
            sharding = mesh_sharding(sharding, sharding.spec[0], None, axis)
        return constrain(x.reshape(*x.shape[:2], heads, *shape), sharding)


class Convolution(nn.Module):
    """A frozen causal convolution of every channel."""

    channels: int
    width: int
    sharding: RowSharding  # of ``[batch, seq, d_model]`` on a mesh

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: SharedInputs, before: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the causal convolution along the sequence, float32 ``[batch, seq, channels]``.

        With ``before``, the inputs before ``x`` (``[batch, width - 1, channels]``, in generation),
        it also returns the last inputs in the same form; otherwise None. The weight is frozen.
        """
        weight = self.param(
            "weight", nn.initializers.lecun_normal(), (self.channels, 1, self.width)
        )
        return _convolved(
            x, jax.lax.stop_gradient(weight), shared, before, self.sharding
        )


def _convolved(
    x: jax.Array,
    weight: jax.Array,
    shared: SharedInputs,
    before: jax.Array | None,
    sharding: RowSharding,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the causal convolution of ``x [batch, seq, channels]``, and the inputs to remember.

    Args:
      x: the inputs.
      weight: ``[channels, 1, width]``, as in files.
      shared: segments of the rows.
      before: the last ``width - 1`` inputs before ``x`` in generation; None in training, which
        remembers none.
      sharding: of rows that a mesh splits among devices, which happens in training alone.
    """
    # [channels, 1, width] -> [width, channels]
    kernel = weight[:, 0].T.astype(jnp.float32)
    if sharding is not None and shared.row is not None:
        return split_conv(x, kernel, shared.row, sharding), None
    if before is None:
        return causal_conv(x, kernel, shared.segments), None
    return causal_conv_after(x, kernel, shared.segments, before)


def _by_key_head(
    projected: Sequence[jax.Array], sizes: GatedDeltaNet
) -> tuple[jax.Array, ...]:
    """Returns qkv, z, b and a of the fused projections, whose outputs are ordered by key head.

    Both projections have ``[batch, seq, width]``: ``q k v z`` of the first key head, then of the
    second, and so on; and ``b a`` in the same order.
    """
    qkvz, ba = (_split_heads(y, sizes.key_heads) for y in projected)
    # Where v and z start within a key head; k starts at `key_dim`.
    of_v = 2 * sizes.key_dim
    of_z = of_v + sizes.values_per_key * sizes.value_dim
    parts = jnp.split(qkvz, (sizes.key_dim, of_v, of_z), axis=-1)
    q, k, v, z = map(_join_heads, parts)
    b, a = map(_join_heads, jnp.split(ba, 2, axis=-1))
    return jnp.concatenate([q, k, v], axis=-1), z, b, a


def _split_heads(y: jax.Array, heads: int) -> jax.Array:
    """Returns ``[batch, seq, heads, width of a head]`` of ``[batch, seq, width]``."""
    return y.reshape(*y.shape[:-1], heads, -1)


def _join_heads(y: jax.Array) -> jax.Array:
    """Returns ``[batch, seq, width]`` of ``[batch, seq, heads, width of a head]``."""
    return y.reshape(*y.shape[:-2], -1)


@dataclass(frozen=True)
class ShortConvolution(Mixer):
    """Sizes of a gated short convolution."""

    name: ClassVar[str] = "conv"
    splits_rows: ClassVar[bool] = True
    width: int  # taps of a channel
    bias: bool = False  # of the convolution and both projections

    def arrays(self, config: ModelConfig) -> ParamShapes:
        """Returns the taps, which have torch's layout, and their bias."""
        shapes: ParamShapes = {"taps": (config.d_model, 1, self.width)}
        if self.bias:
            shapes["taps_bias"] = (config.d_model,)
        return shapes

    def has_bias(self, config: ModelConfig, name: str) -> bool:
        """See `Part`."""
        return self.bias

    def projections(self, config: ModelConfig) -> ParamShapes:
        """Returns the kernels of the projections to B, C and u, and of the output."""
        d = config.d_model
        return {"bcx_proj": (d, 3 * d), "o_proj": (d, d)}

    def flops(self, config: ModelConfig, seq: int) -> float:
        """Returns the flops of the taps and of both gates for one row."""
        return config.n_layers * seq * config.d_model * (2.0 * self.width + 1)

    def saved(self, config: ModelConfig) -> float:
        """Returns the values per token of B, C and u."""
        return 3.0 * config.d_model

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """Returns the Linen module."""
        return GatedConvolution(self, config.d_model, options, name=self.name)

    def init_state(
        self, config: ModelConfig, batch: int, length: int, numerics: Numerics
    ) -> Recurrent:
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
        bias = self.part.bias
        (bcx,) = self.options.projected(
            x, {"bcx_proj": 3 * self.d_model}, layer, shared, bias=bias
        )
        bcx = round_and_save(bcx, self.options.numerics)
        # B, C and u, each [batch, seq, d_model].
        before, after, u = jnp.split(bcx.astype(jnp.float32), 3, axis=-1)
        taps = self.param(
            "taps", nn.initializers.lecun_normal(), (self.d_model, 1, self.part.width)
        )
        earlier = None  # the convolution's last inputs of earlier calls, in generation
        if layer.cached is not None:
            earlier = layer.cached.arrays["inputs"]
        mixed, inputs = _convolved(
            before * u, taps, shared, earlier, self.options.shardings.rows
        )
        if bias:
            of_taps = self.param(
                "taps_bias", nn.initializers.zeros_init(), (self.d_model,)
            )
            mixed = mixed + jnp.broadcast_to(of_taps.astype(jnp.float32), mixed.shape)
        y = (after * mixed).astype(x.dtype)
        (y,) = self.options.projected(
            y, {"o_proj": self.d_model}, layer, shared, bias=bias
        )
        if inputs is None:
            return y, None
        return y, {"inputs": inputs}
