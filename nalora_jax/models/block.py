"""One decoder layer: attention and FFN with their norms, the same module for every family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from nalora_jax.models.config import GLOBAL_WINDOW, ModelConfig
from nalora_jax.models.moe import MoEFFN
from nalora_jax.nn.attention import CachedKeys, Keys, Scoring, attention
from nalora_jax.nn.attention_kernels import Kernel
from nalora_jax.nn.ffn import Adapters, GatedFFN, GateStatsConfig, SelfGatedFFN
from nalora_jax.nn.layers import RMSNorm, apply_rope
from nalora_jax.nn.lora import LoRADense
from nalora_jax.nn.low_rank import AdapterSpec
from nalora_jax.nn.matmul import Numerics, kept


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInputs:
    """What differs by layer; every leaf is stacked over layers and scanned."""

    window: jax.Array | None  # int []; None where all layers see everything
    rope: jax.Array | None  # int [], index into the rotary tables; None where there is one
    scales: dict[str, dict[str, jax.Array]]  # adapters' scales by block ("attn", "ffn") and projection
    cached: tuple[jax.Array, jax.Array] | None  # this layer's cached keys and values


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedInputs:
    """What all layers read."""

    tables: jax.Array  # float32 [tables, 2, batch, seq, dim / 2]
    positions: jax.Array  # int [batch or 1, seq]
    segments: jax.Array  # int [batch or 1, seq]
    token_weights: jax.Array | None  # [batch, seq], for statistics
    adapter_ids: jax.Array | None  # int [batch]
    cached_positions: jax.Array | None  # int [batch, slots]
    cached_segments: jax.Array | None  # int [batch, slots]
    deterministic: bool = field(default=True, metadata={"static": True})


NewKeys = tuple[jax.Array, jax.Array]


def block_adapters(spec: AdapterSpec, block: str) -> Adapters:
    """The adapters of one block ("attn" or "ffn") by projection name."""
    prefix = f"layers/{block}/"
    targets = tuple((path.removeprefix(prefix), t) for path, t in spec.targets if path.startswith(prefix))
    return Adapters(targets, dora=spec.dora, dropout=spec.dropout)


def constrain(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """``x`` with its layout pinned: without it the compiler may spread activations like the weights, not the batch."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


class Attention(nn.Module):
    """Projections with adapters, norms of queries and keys, rotation, attention."""

    config: ModelConfig
    adapters: Adapters = Adapters()
    numerics: Numerics = Numerics()
    kernel: Kernel = Kernel()

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInputs, shared: SharedInputs) -> tuple[jax.Array, NewKeys]:
        """``[batch, seq, d_model]`` -> the same, and this call's keys and values."""
        c = self.config
        q = self._project(x, "q_proj", c.n_heads * c.head_dim, c.qkv_bias, layer, shared)
        k = self._project(x, "k_proj", c.n_kv_heads * c.head_dim, c.qkv_bias, layer, shared)
        v = self._project(x, "v_proj", c.n_kv_heads * c.head_dim, c.qkv_bias, layer, shared)
        if c.qk_norm:
            q, k = kept(q, self.numerics.kept), kept(k, self.numerics.kept)
        if c.qk_norm == "projection":
            q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
        # [batch, seq, heads, head_dim]
        q, k, v = (y.reshape(*y.shape[:-1], -1, c.head_dim) for y in (q, k, v))
        if c.qk_norm == "head":
            q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
        table = shared.tables[0 if layer.rope is None else layer.rope]
        q, k = apply_rope(q, table), apply_rope(k, table)
        out = self._attend(q, k, v, layer, shared)
        out = self._project(out.reshape(*x.shape[:-1], -1), "o_proj", c.d_model, c.o_bias, layer, shared)
        return out, (k, v)

    def _project(
        self, x: jax.Array, name: str, features: int, bias: bool, layer: LayerInputs, shared: SharedInputs
    ) -> jax.Array:
        dense = LoRADense(
            features,
            self.adapters.get(name),
            use_bias=bias,
            dora=self.adapters.dora,
            dropout=self.adapters.dropout,
            numerics=self.numerics,
            name=name,
        )
        scale = layer.scales.get("attn", {}).get(name, 1.0)
        return dense(x, scale, deterministic=shared.deterministic, adapter_ids=shared.adapter_ids)[0]

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.norm_eps, self.config.norm_offset, name=name)

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, layer: LayerInputs, shared: SharedInputs) -> jax.Array:
        c = self.config
        keys, cached = Keys(k, v, shared.positions, shared.segments), None
        if layer.cached is not None:
            assert shared.cached_positions is not None
            assert shared.cached_segments is not None
            cached = CachedKeys(*layer.cached, shared.cached_positions, shared.cached_segments)
        rng = None if shared.deterministic or not c.attn_dropout else self.make_rng("dropout")
        n = self.numerics
        scoring = Scoring(c.score_scale, c.attn_softcap, n.operand, n.kept, c.attn_dropout, n.within().result)
        window = GLOBAL_WINDOW if layer.window is None else layer.window
        return attention(q, keys, window, scoring, cached=cached, dropout_rng=rng, kernel=self.kernel)


class Block(nn.Module):
    """``x + post(attention(pre(x)))``, then the same with the FFN; which norms exist is the family's choice."""

    config: ModelConfig
    adapters: AdapterSpec = AdapterSpec()
    numerics: Numerics = Numerics()
    stats: GateStatsConfig = GateStatsConfig()
    activation_sharding: NamedSharding | None = None
    attention_kernel: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInputs, shared: SharedInputs) -> tuple[jax.Array, NewKeys | None]:
        """``[batch, seq, d_model]`` -> the same, and the new keys and values where there is a cache."""
        c = self.config
        kernel = Kernel(self.attention_kernel, tuple(sorted(set(c.layer_windows))), self.activation_sharding)
        attn = Attention(c, block_adapters(self.adapters, "attn"), self.numerics, kernel, name="attn")
        # What a norm reads is kept for its backward pass; the sum that goes from layer to layer is not rounded.
        y, keys = attn(self._norm("attn_norm", kept(x, self.numerics.kept), c.pre_norm), layer, shared)
        if c.post_norm:
            y = kept(y, self.numerics.kept)
        x = self._add(x, self._norm("attn_post_norm", y, c.post_norm))
        y = self._ffn()(
            self._norm("ffn_norm", kept(x, self.numerics.kept), c.pre_norm),
            layer.scales.get("ffn", {}),
            token_weights=shared.token_weights,
            deterministic=shared.deterministic,
            adapter_ids=shared.adapter_ids,
        )
        x = self._add(x, self._norm("ffn_post_norm", y, c.post_norm))
        return constrain(x, self.activation_sharding), None if layer.cached is None else keys

    def _norm(self, name: str, x: jax.Array, present: bool) -> jax.Array:
        if not present:
            return x
        return RMSNorm(self.config.norm_eps, self.config.norm_offset, self.numerics.result, name=name)(x)

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        scale = self.config.residual_scale
        return x + (y if scale == 1.0 else y * jnp.asarray(scale, y.dtype)).astype(x.dtype)

    def _ffn(self) -> Any:
        c = self.config
        kind = MoEFFN if c.n_experts else GatedFFN if c.gated else SelfGatedFFN
        extra = {"n_experts": c.n_experts, "top_k": c.experts_per_token, "norm_topk": c.norm_topk}
        return kind(
            d_model=c.d_model,
            d_ff=c.d_ff,
            activation=c.activation,
            adapters=block_adapters(self.adapters, "ffn"),
            use_bias=c.ffn_bias,
            numerics=self.numerics,
            stats=self.stats,
            name="ffn",
            **(extra if c.n_experts else {}),
        )
