"""Attention with norms of queries, keys and values.

Values may be the unnormalized keys, and keys and values may come from an earlier layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.models.attention import Attention, Heads, cached_keys
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.layers import apply_rope
from nalora_jax.models.parts import AttentionMixer, LayerInputs, PartOptions, Shapes, SharedInputs
from nalora_jax.ops.attention import CachedKeys
from nalora_jax.ops.residual_norm import rms_norm
from nalora_jax.ops.storage import round_and_save


@dataclass(frozen=True)
class NormedAttention(AttentionMixer):
    """Attention with RMS norms per head.

    The norms of queries and keys have a scale, the norm of values has none. Norms precede RoPE.

    Attributes:
      keys_as_values: there is no ``v_proj``; values are the norm of k_proj's output.
      hands: see `Mixer.hands`.
      reads: see `Mixer.reads`; there is no ``k_proj`` and no ``v_proj``.
    """

    keys_as_values: bool = False
    hands: str = ""
    reads: str = ""

    def param_shapes(self, config: ModelConfig) -> Shapes:
        """Returns the shapes of one layer's parameters."""
        shapes: Shapes = {}
        for name, (d_in, d_out) in self.projections(config).items():
            shapes[f"{name}/kernel"] = (d_in, d_out)
            if config.has_bias(name):
                shapes[f"{name}/bias"] = (d_out,)
        normed = ["q_norm"]
        if not self.reads:
            normed.append("k_norm")
        return shapes | {f"{name}/scale": (config.head_dim,) for name in normed}

    def projections(self, config: ModelConfig) -> Shapes:
        """Returns the kernel shapes of the projections."""
        d, q = config.d_model, config.n_heads * config.head_dim
        heads: Shapes = {name: (d, n * config.head_dim) for name, n in self.heads(config).items()}
        return heads | {"o_proj": (q, d)}

    def heads(self, config: ModelConfig) -> dict[str, int]:
        """Returns the number of heads of every projection of the input."""
        heads = {"q_proj": config.n_heads}
        if not self.reads:
            heads |= {"k_proj": config.n_kv_heads}
        if not self.reads and not self.keys_as_values:
            heads |= {"v_proj": config.n_kv_heads}
        return heads

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """Returns the module."""
        module = _ReadingHeads if self.reads else _NormedHeads
        return module(config, options, self, name=self.name)


class _NormedHeads(Attention):
    part: NormedAttention

    def _heads(self, x: jax.Array, layer: LayerInputs, shared: SharedInputs) -> Heads:
        c, numerics = self.config, self.options.numerics
        projected = self._projected(x, self.part.heads(c), layer, shared)
        # [batch, seq, heads, head_dim]
        split = [round_and_save(y, numerics).reshape(*y.shape[:-1], -1, c.head_dim) for y in projected]
        values = rms_norm(split[-1], jnp.ones((c.head_dim,), jnp.float32), c.norm_eps)
        q, k = self._norm("q_norm")(split[0]), self._norm("k_norm")(split[1])
        table = self._rope_table(layer, shared)
        return apply_rope(q, table), apply_rope(k, table), values, None

    def _recomputed(self) -> str:
        return "qkv"


class _ReadingHeads(Attention):
    part: NormedAttention

    def _heads(self, x: jax.Array, layer: LayerInputs, shared: SharedInputs) -> Heads:
        c = self.config
        (q,) = self._projected(x, self.part.heads(c), layer, shared)
        q = round_and_save(q, self.options.numerics).reshape(*q.shape[:-1], -1, c.head_dim)
        keys = shared.handed[self.part.reads]
        return apply_rope(self._norm("q_norm")(q), self._rope_table(layer, shared)), keys.k, keys.v, None

    def _recomputed(self) -> str:
        return "qkv"  # keys and values are inputs of the layer

    def _cached_keys(self, layer: LayerInputs, shared: SharedInputs) -> CachedKeys | None:
        keys = shared.handed[self.part.reads]
        if keys.cached is None:
            return None
        return cached_keys(keys.cached, keys.prefix, shared)
