"""Attention with norms of queries, keys and values, whose values may be the unnormalized keys."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.models.attention import Attention
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.layers import apply_rope
from nalora_jax.models.parts import AttentionMixer, LayerInputs, PartOptions, Shapes, SharedInputs
from nalora_jax.ops.residual_norm import rms_norm
from nalora_jax.ops.storage import round_and_save


@dataclass(frozen=True)
class NormedAttention(AttentionMixer):
    """Attention with RMS norms per head.

    The norms of queries and keys have a scale, the norm of values has none. Norms precede RoPE.

    Attributes:
      keys_as_values: there is no ``v_proj``; values are the norm of k_proj's output.
    """

    keys_as_values: bool = False

    def param_shapes(self, config: ModelConfig) -> Shapes:
        """Returns the shapes of one layer's parameters."""
        shapes: Shapes = {}
        for name, (d_in, d_out) in self.projections(config).items():
            shapes[f"{name}/kernel"] = (d_in, d_out)
            if config.o_bias if name == "o_proj" else config.qkv_bias:
                shapes[f"{name}/bias"] = (d_out,)
        return shapes | {f"{name}/scale": (config.head_dim,) for name in ("q_norm", "k_norm")}

    def projections(self, config: ModelConfig) -> Shapes:
        """Returns the kernel shapes of the projections."""
        d, q = config.d_model, config.n_heads * config.head_dim
        heads = {name: (d, n * config.head_dim) for name, n in self.heads(config).items()}
        return heads | {"o_proj": (q, d)}

    def heads(self, config: ModelConfig) -> dict[str, int]:
        """Returns the number of heads of every projection of the input."""
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}
        return heads if self.keys_as_values else heads | {"v_proj": config.n_kv_heads}

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """Returns the module."""
        return _NormedHeads(config, options, self, name=self.name)


class _NormedHeads(Attention):
    part: NormedAttention

    def _heads(self, x: jax.Array, layer: LayerInputs, shared: SharedInputs) -> tuple[jax.Array, ...]:
        c = self.config
        projected = self._projected(x, self.part.heads(c), layer, shared)
        # [batch, seq, heads, head_dim]
        saved = [round_and_save(y, self.options.numerics) for y in projected]
        q, k, *v = (y.reshape(*y.shape[:-1], -1, c.head_dim) for y in saved)
        values = rms_norm(v[0] if v else k, jnp.ones((c.head_dim,), jnp.float32), c.norm_eps)
        table = self._rope_table(layer, shared)
        return apply_rope(self._norm("q_norm")(q), table), apply_rope(self._norm("k_norm")(k), table), values
