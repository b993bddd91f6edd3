"""One decoder layer: mixer and feed-forward block with their norms, shared by all families."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.parts import (
    LayerInputs,
    Part,
    PartOptions,
    ResidualNorm,
    RMSNorm,
    SharedInputs,
    constrain,
    part_adapters,
)
from nalora_jax.models.stacks import parts
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import LAYER_INPUT, round_and_save


class Block(nn.Module):
    """A layer ``x + post(attention(pre(x)))``, followed by the same with the FFN.

    The family's config decides which of the norms exist.
    """

    config: ModelConfig  # uniform, of the layer's stack
    adapters: AdapterSpec = AdapterSpec()
    numerics: Numerics = Numerics()
    stats: GateStatsConfig = GateStatsConfig()
    activation_sharding: NamedSharding | None = None
    # For tokens routed to experts; default: as between layers.
    routing_sharding: NamedSharding | None = None
    experts: str = "auto"  # see `nalora_jax.config.ComputeConfig`
    prefix: str = "layers"  # of the stack

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInputs, shared: SharedInputs) -> tuple[jax.Array, Any]:
        """Returns ``[batch, seq, d_model]``, and the update of the mixer's state if there is a cache."""
        c = self.config
        x = checkpoint_name(x, LAYER_INPUT)
        x, normed = self._added("attn_norm", x, None)
        mixer, feed_forward = parts(c)
        y, update = self._module(mixer)(normed, layer, shared)
        y = self._dropped(y, shared)
        if c.post_norm:
            y = self._norm("attn_post_norm", round_and_save(y, self.numerics))
        x, normed = self._added("ffn_norm", x, y)
        stream = {"stream": x} if feed_forward.reads_stream else {}
        y = self._module(feed_forward)(
            normed,
            layer.scales.get(feed_forward.name, {}),
            token_weights=shared.token_weights,
            deterministic=shared.deterministic,
            **stream,
        )
        y = self._dropped(y, shared)
        if c.post_norm:
            y = self._norm("ffn_post_norm", round_and_save(y, self.numerics))
        x = self._add(x, y)
        if c.tail is not None:
            x = self._module(c.tail)(x, layer, shared)
        if layer.cached is None and not c.hands:
            update = None
        return constrain(x, self.activation_sharding), update

    def _dropped(self, y: jax.Array, shared: SharedInputs) -> jax.Array:
        """Returns a part's output with the family's dropout."""
        if not self.config.residual_dropout or shared.deterministic:
            return y
        dropped: jax.Array = nn.Dropout(self.config.residual_dropout, deterministic=False)(y)
        return dropped

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return RMSNorm(self.config.norm_eps, self.config.norm_offset, self.numerics.result, name=name)(x)

    def _added(self, name: str, x: jax.Array, y: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Returns ``x + y`` and the input of the next part.

        The input is the norm of the sum, if the family has a norm there.
        """
        c = self.config
        recomputed = c.post_norm  # from the layer's input and the results that norms after parts read
        if y is not None and not (c.pre_norm and c.residual_scale == 1.0):
            x, y = self._add(x, y), None
        if c.pre_norm:
            norm = ResidualNorm(c.norm_eps, c.norm_offset, self.numerics, recomputed, name=name)
            return norm(x, y)
        if recomputed:
            return x, x
        return x, round_and_save(x, self.numerics)

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        scale = self.config.residual_scale
        if scale != 1.0:
            y = y * jnp.asarray(scale, y.dtype)
        return x + y.astype(x.dtype)

    def _module(self, part: Part) -> Any:
        adapters = part_adapters(self.adapters, f"{self.prefix}/{part.name}")
        routing = self.routing_sharding or self.activation_sharding
        shardings = self.activation_sharding, routing
        options = PartOptions(
            self.prefix, part.name, adapters, self.numerics, self.stats, *shardings, self.experts
        )
        return part.module(self.config, options)
