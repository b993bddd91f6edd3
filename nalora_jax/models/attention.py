"""Causal self-attention of a decoder layer, shared by all families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.models.cache import KeyValues
from nalora_jax.models.config import GLOBAL_WINDOW, ModelConfig
from nalora_jax.models.parts import AttentionMixer, LayerInputs, PartOptions, RMSNorm, Shapes, SharedInputs
from nalora_jax.models.ropes import apply_rope, halves_from_adjacent, query_scales
from nalora_jax.ops.attention import AttentionConfig, CachedKeys, Keys, attention
from nalora_jax.ops.residual_norm import rms_norm
from nalora_jax.ops.split_attention import split_attention
from nalora_jax.ops.split_rows import shards_of
from nalora_jax.ops.storage import round_and_save

NewKeys = tuple[jax.Array, jax.Array]
Heads = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]


@dataclass(frozen=True)
class SoftmaxAttention(AttentionMixer):
    """Attention as the fields of the config describe it."""

    def arrays(self, config: ModelConfig) -> Shapes:
        """Returns the norms of queries and keys, and the sinks."""
        shapes: Shapes = {}
        if config.qk_norm:
            heads = {"q": 1, "k": 1}
            if config.qk_norm == "projection":
                heads = {"q": config.n_heads, "k": config.n_kv_heads}
            shapes = {f"{name}_norm/scale": (n * config.head_dim,) for name, n in heads.items()}
        if config.attn_sinks:
            shapes["sinks"] = (config.n_heads,)
        return shapes

    def projections(self, config: ModelConfig) -> Shapes:
        """Returns the kernel shapes of the projections."""
        d, q, kv = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        return {
            "q_proj": (d, (1 + config.attn_gate) * q),
            "k_proj": (d, kv),
            "v_proj": (d, kv),
            "o_proj": (q, d),
        }

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """Returns the module."""
        return Attention(config, options, name=self.name)


class Attention(nn.Module):
    """Adapted projections, query and key norms, RoPE and softmax attention."""

    config: ModelConfig
    options: PartOptions
    # Heads that follow from saved arrays without a matmul (`AttentionConfig.recomputed`); "": by the config.
    recomputed: ClassVar[str] = ""

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInputs, shared: SharedInputs) -> tuple[jax.Array, NewKeys]:
        """Returns ``[batch, seq, d_model]``, and this call's keys and values."""
        c = self.config
        q, k, v, gate = self._heads(x, layer, shared)
        out = self._attend(q, k, v, layer, shared).reshape(*x.shape[:-1], -1)
        if gate is not None:
            out = out * jax.nn.sigmoid(round_and_save(gate, self.options.numerics)).astype(out.dtype)
        (y,) = self.options.projected(out, {"o_proj": c.d_model}, layer, shared, bias=c.o_bias)
        return y, (k, v)

    def _heads(self, x: jax.Array, layer: LayerInputs, shared: SharedInputs) -> Heads:
        """Returns rotated queries and keys, and values: ``[batch, seq, heads, head_dim]``; and the gate's input."""
        c = self.config
        heads = {"q_proj": c.n_heads * (1 + c.attn_gate), "k_proj": c.n_kv_heads, "v_proj": c.n_kv_heads}
        q, k, v = self._projected(x, heads, layer, shared)
        gate = None
        if c.attn_gate:  # every head has its query, then its gate
            q, gate = (
                y.reshape(*x.shape[:-1], -1)
                for y in jnp.split(q.reshape(*x.shape[:-1], c.n_heads, -1), 2, -1)
            )
        if c.qk_norm:
            q, k = round_and_save(q, self.options.numerics), round_and_save(k, self.options.numerics)
        if c.qk_norm == "projection":
            q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
        # [batch, seq, heads, head_dim]
        q, k, v = (y.reshape(*y.shape[:-1], -1, c.head_dim) for y in (q, k, v))
        if c.qk_norm == "head":
            q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
        table = self._rope_table(layer, shared)
        if c.rope_adjacent:  # scores do not depend on the order of dimensions
            q, k = halves_from_adjacent(q, table), halves_from_adjacent(k, table)
        q, k = apply_rope(q, table), apply_rope(k, table)
        if c.qk_norm == "rotated":
            q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
        if c.query_growth:
            q = q * query_scales(shared.positions, c.query_growth, c.growth_length)[..., None, None]
        return q, k, v, gate

    def _projected(
        self, x: jax.Array, heads: Mapping[str, int], layer: LayerInputs, shared: SharedInputs
    ) -> list[jax.Array]:
        """Returns ``[batch, seq, heads * head_dim]`` of projections, for heads by name."""
        c = self.config
        widths = {name: heads * c.head_dim for name, heads in heads.items()}
        return self.options.projected(x, widths, layer, shared, bias=c.qkv_bias)

    def _rope_table(self, layer: LayerInputs, shared: SharedInputs) -> jax.Array:
        return shared.tables[self.options.prefix][0 if layer.rope is None else layer.rope]

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.norm_eps, self.config.norm_offset, name=name)

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, layer: LayerInputs, shared: SharedInputs
    ) -> jax.Array:
        c = self.config
        windows = tuple(sorted(set(c.layer_windows)))
        config = AttentionConfig(
            c.query_scale or c.head_dim**-0.5,
            c.attn_softcap,
            c.attn_dropout,
            windows,
            self.options.sharding,
            recomputed=self.recomputed or ("qk" if c.qk_norm else ""),
        )
        window = GLOBAL_WINDOW if layer.window is None else layer.window
        sinks, numerics = None, self.options.numerics.within()
        if c.attn_sinks:
            sinks = self.param("sinks", nn.initializers.zeros_init(), (c.n_heads,)).astype(jnp.float32)
        if shards_of(self.options.sharding) > 1:
            assert shared.row is not None
            return split_attention((q, k, v), shared.row, window, config, numerics, sinks)
        cached = self._cached_keys(layer, shared)
        keys = Keys(k, v, shared.positions, shared.segments, shared.starts, sinks, cached)
        rng = self.make_rng("dropout") if c.attn_dropout and not shared.deterministic else None
        return attention(q, keys, window, config, numerics, dropout_rng=rng)

    def _cached_keys(self, layer: LayerInputs, shared: SharedInputs) -> CachedKeys | None:
        if layer.cached is None:
            return None
        return cached_keys(layer.cached, shared)


def cached_keys(cached: KeyValues, shared: SharedInputs) -> CachedKeys:
    """Returns keys and values of earlier calls with their integers."""
    assert shared.cached_positions is not None
    assert shared.cached_segments is not None
    return CachedKeys(cached.k, cached.v, shared.cached_positions, shared.cached_segments)


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

    def arrays(self, config: ModelConfig) -> Shapes:
        """Returns the scales of norms."""
        normed = ("q_norm",) if self.reads else ("q_norm", "k_norm")
        return {f"{name}/scale": (config.head_dim,) for name in normed}

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
    recomputed: ClassVar[str] = "qkv"

    def _heads(self, x: jax.Array, layer: LayerInputs, shared: SharedInputs) -> Heads:
        c, numerics = self.config, self.options.numerics
        projected = self._projected(x, self.part.heads(c), layer, shared)
        # [batch, seq, heads, head_dim]
        split = [round_and_save(y, numerics).reshape(*y.shape[:-1], -1, c.head_dim) for y in projected]
        values = rms_norm(split[-1], jnp.ones((c.head_dim,), jnp.float32), c.norm_eps)
        q, k = self._norm("q_norm")(split[0]), self._norm("k_norm")(split[1])
        table = self._rope_table(layer, shared)
        return apply_rope(q, table), apply_rope(k, table), values, None


class _ReadingHeads(Attention):
    part: NormedAttention
    recomputed: ClassVar[str] = "qkv"  # keys and values are inputs of the layer

    def _heads(self, x: jax.Array, layer: LayerInputs, shared: SharedInputs) -> Heads:
        c = self.config
        (q,) = self._projected(x, self.part.heads(c), layer, shared)
        q = round_and_save(q, self.options.numerics).reshape(*q.shape[:-1], -1, c.head_dim)
        keys = shared.handed[self.part.reads]
        return apply_rope(self._norm("q_norm")(q), self._rope_table(layer, shared)), keys.k, keys.v, None

    def _cached_keys(self, layer: LayerInputs, shared: SharedInputs) -> CachedKeys | None:
        keys = shared.handed[self.part.reads]
        if keys.cached is None:
            return None
        return cached_keys(keys.cached, shared)
