"""One decoder layer: attention and FFN with their norms, the same module for every family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from nalora_jax.cpu import native
from nalora_jax.models.config import GLOBAL_WINDOW, ModelConfig
from nalora_jax.models.moe import MoEFFN
from nalora_jax.nn.attention import CachedKeys, Keys, Scoring, attention
from nalora_jax.nn.attention_kernels import Kernel
from nalora_jax.nn.ffn import Adapters, GatedFFN, GateStatsConfig, SelfGatedFFN
from nalora_jax.nn.layers import ResidualNorm, RMSNorm, apply_rope
from nalora_jax.nn.lora import Call, LoRADense, side_by_side
from nalora_jax.nn.low_rank import AdapterSpec
from nalora_jax.nn.matmul import Numerics, kept


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInputs:
    """What differs by layer; every leaf is stacked over layers and scanned."""

    window: jax.Array | None  # int []; None where all layers see everything
    rope: jax.Array | None  # int [], index into the rotary tables; None where there is one
    scales: dict[str, dict[str, jax.Array]]  # adapters' scales by block ("attn", "ffn") and projection
    # This layer's cached keys and values, or its number where it reads them in `SharedInputs.cache`.
    cached: tuple[jax.Array, jax.Array] | jax.Array | None


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
    cache: tuple[jax.Array, jax.Array] | None = None  # all layers' cached keys and values
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
        q, k, v = self._project(
            x,
            {
                "q_proj": self._dense("q_proj", c.n_heads * c.head_dim, c.qkv_bias),
                "k_proj": self._dense("k_proj", c.n_kv_heads * c.head_dim, c.qkv_bias),
                "v_proj": self._dense("v_proj", c.n_kv_heads * c.head_dim, c.qkv_bias),
            },
            layer,
            shared,
        )
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
        out = out.reshape(*x.shape[:-1], -1)
        (out,) = self._project(out, {"o_proj": self._dense("o_proj", c.d_model, c.o_bias)}, layer, shared)
        return out, (k, v)

    def _dense(self, name: str, features: int, bias: bool) -> LoRADense:
        return LoRADense(
            features,
            self.adapters.get(name),
            use_bias=bias,
            dora=self.adapters.dora,
            dropout=self.adapters.dropout,
            numerics=self.numerics,
            name=name,
        )

    def _project(
        self, x: jax.Array, layers: Mapping[str, LoRADense], layer: LayerInputs, shared: SharedInputs
    ) -> list[jax.Array]:
        scales = layer.scales.get("attn", {})
        calls = [Call(dense, scales.get(name, 1.0)) for name, dense in layers.items()]
        results = side_by_side(x, calls, deterministic=shared.deterministic, adapter_ids=shared.adapter_ids)
        return [y for y, _ in results]

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.norm_eps, self.config.norm_offset, name=name)

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, layer: LayerInputs, shared: SharedInputs) -> jax.Array:
        c = self.config
        keys = Keys(k, v, shared.positions, shared.segments)
        cached: CachedKeys | native.Cached | None = None
        if layer.cached is not None:
            assert shared.cached_positions is not None
            assert shared.cached_segments is not None
            integers = shared.cached_positions, shared.cached_segments
            if isinstance(layer.cached, tuple):
                cached = CachedKeys(*layer.cached, *integers)
            else:
                assert shared.cache is not None
                of_k, of_v = (native.Slice(stack, layer.cached) for stack in shared.cache)
                cached = native.Cached(of_k, of_v, *integers)
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
        x, normed = self._added("attn_norm", x, None)
        y, keys = attn(normed, layer, shared)
        if c.post_norm:
            y = self._norm("attn_post_norm", kept(y, self.numerics.kept))
        x, normed = self._added("ffn_norm", x, y)
        y = self._ffn()(
            normed,
            layer.scales.get("ffn", {}),
            token_weights=shared.token_weights,
            deterministic=shared.deterministic,
            adapter_ids=shared.adapter_ids,
        )
        if c.post_norm:
            y = self._norm("ffn_post_norm", y)
        x = self._add(x, y)
        return constrain(x, self.activation_sharding), None if layer.cached is None else keys

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return RMSNorm(self.config.norm_eps, self.config.norm_offset, self.numerics.result, name=name)(x)

    def _added(self, name: str, x: jax.Array, y: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """``x + y``, and what the next part reads of it: its norm, if this family has one there."""
        c = self.config
        if y is not None and not (c.pre_norm and c.residual_scale == 1.0):
            x, y = self._add(x, y), None
        if c.pre_norm:
            return ResidualNorm(c.norm_eps, c.norm_offset, self.numerics, name=name)(x, y)
        return x, kept(x, self.numerics.kept)

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
