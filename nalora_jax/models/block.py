"""One decoder layer: attention and FFN with their norms, shared by all families."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from nalora_jax.dense import LoRADense
from nalora_jax.measurement import GateStatsConfig
from nalora_jax.method.ffn import Adapters, GatedFFN, SelfGatedFFN
from nalora_jax.method.low_rank import Dense, adapted_dense, parallel_dense
from nalora_jax.models.config import GLOBAL_WINDOW, ModelConfig
from nalora_jax.models.layers import ResidualNorm, RMSNorm, apply_rope, query_scales
from nalora_jax.models.moe import MoEFFN
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.ops.attention import CachedKeys, Keys, attention
from nalora_jax.ops.blockwise_attention import AttentionConfig
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import LAYER_INPUT, Kernel, LayerStack, round_and_save


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInputs:
    """Inputs that differ by layer; every leaf is stacked over layers and scanned."""

    window: jax.Array | None  # int []; None if every layer attends globally
    rope: jax.Array | None  # int [], index into the rotary tables; None if there is only one
    scales: dict[str, dict[str, jax.Array]]  # adapters' scales by block ("attn", "ffn") and projection
    # The layer's cached keys and values; or the layer's index if it reads them in place from
    # `SharedInputs.cache`.
    cached: tuple[Kernel, Kernel] | jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedInputs:
    """Inputs that are the same for all layers."""

    tables: jax.Array  # float32 [tables, 2, batch, seq, dim / 2]
    positions: jax.Array  # int [batch or 1, seq]
    segments: jax.Array  # int [batch or 1, seq]
    token_weights: jax.Array | None  # [batch, seq], for statistics
    adapter_ids: jax.Array | None  # int [batch]
    cached_positions: jax.Array | None  # int [batch, slots]
    cached_segments: jax.Array | None  # int [batch, slots]
    cache: tuple[LayerStack, LayerStack] | None = None  # all layers' cached keys and values
    # int [batch or 1, seq], position from which a token is seen, if not its own
    starts: jax.Array | None = None
    deterministic: bool = field(default=True, metadata={"static": True})


NewKeys = tuple[jax.Array, jax.Array]


def block_adapters(spec: AdapterSpec, block: str) -> Adapters:
    """Returns the adapters of one block ("attn" or "ffn") by projection name."""
    prefix = f"layers/{block}/"
    ranks = ((path.removeprefix(prefix), t.rank) for path, t in spec.targets if path.startswith(prefix))
    return Adapters(tuple(ranks), dora=spec.dora, dropout=spec.dropout)


def constrain(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Returns ``x`` with its sharding pinned.

    Without the constraint the compiler may shard activations like the weights instead of by batch.
    """
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


class Attention(nn.Module):
    """Adapted projections, query and key norms, RoPE and softmax attention."""

    config: ModelConfig
    adapters: Adapters = Adapters()
    numerics: Numerics = Numerics()
    activation_sharding: NamedSharding | None = None

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInputs, shared: SharedInputs) -> tuple[jax.Array, NewKeys]:
        """Returns ``[batch, seq, d_model]``, and this call's keys and values."""
        c = self.config
        widths = {"q_proj": c.n_heads, "k_proj": c.n_kv_heads, "v_proj": c.n_kv_heads}
        layers = [
            self._dense(name, c.d_model, heads * c.head_dim, c.qkv_bias, layer, shared)
            for name, heads in widths.items()
        ]
        q, k, v = (made.y for made in parallel_dense(x, layers, self.numerics))
        if c.qk_norm:
            q, k = round_and_save(q, self.numerics), round_and_save(k, self.numerics)
        if c.qk_norm == "projection":
            q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
        # [batch, seq, heads, head_dim]
        q, k, v = (y.reshape(*y.shape[:-1], -1, c.head_dim) for y in (q, k, v))
        if c.qk_norm == "head":
            q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
        table = shared.tables[0 if layer.rope is None else layer.rope]
        q, k = apply_rope(q, table), apply_rope(k, table)
        if c.query_growth:
            q = q * query_scales(shared.positions, c.query_growth, c.growth_length)[..., None, None]
        out = self._attend(q, k, v, layer, shared).reshape(*x.shape[:-1], -1)
        o_proj = self._dense("o_proj", c.n_heads * c.head_dim, c.d_model, c.o_bias, layer, shared)
        return adapted_dense(out, o_proj, self.numerics).y, (k, v)

    def _dense(self, name: str, d_in: int, d_out: int, bias: bool, layer: LayerInputs, shared: SharedInputs) -> Dense:
        adapters, scale = self.adapters, layer.scales.get("attn", {}).get(name, 1.0)
        module = LoRADense(d_out, adapters.rank(name), bias, adapters.dora, adapters.dropout, self.numerics, name=name)
        dense: Dense = module.dense(d_in, scale, deterministic=shared.deterministic, adapter_ids=shared.adapter_ids)
        return dense

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.norm_eps, self.config.norm_offset, name=name)

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, layer: LayerInputs, shared: SharedInputs) -> jax.Array:
        c = self.config
        keys = Keys(k, v, shared.positions, shared.segments)
        cached: CachedKeys | None = None
        if layer.cached is not None:
            assert shared.cached_positions is not None
            assert shared.cached_segments is not None
            integers = shared.cached_positions, shared.cached_segments
            if isinstance(layer.cached, tuple):
                k_then, v_then = layer.cached
            else:
                assert shared.cache is not None
                k_then, v_then = (stack.layer(layer.cached) for stack in shared.cache)
            cached = CachedKeys(k_then, v_then, *integers)
        rng = None if shared.deterministic or not c.attn_dropout else self.make_rng("dropout")
        windows = tuple(sorted(set(c.layer_windows)))
        config = AttentionConfig(c.score_scale, c.attn_softcap, c.attn_dropout, windows, self.activation_sharding)
        window = GLOBAL_WINDOW if layer.window is None else layer.window
        rest: dict[str, Any] = {"cached": cached, "dropout_rng": rng, "starts": shared.starts}
        out: jax.Array = attention(q, keys, window, config, self.numerics.within(), **rest)
        return out


class Block(nn.Module):
    """A layer ``x + post(attention(pre(x)))``, followed by the same with the FFN.

    The family's config decides which of the norms exist.
    """

    config: ModelConfig
    adapters: AdapterSpec = AdapterSpec()
    numerics: Numerics = Numerics()
    stats: GateStatsConfig = GateStatsConfig()
    activation_sharding: NamedSharding | None = None
    # For tokens routed to experts; default: as between layers.
    routing_sharding: NamedSharding | None = None

    @nn.compact
    def __call__(self, x: jax.Array, layer: LayerInputs, shared: SharedInputs) -> tuple[jax.Array, NewKeys | None]:
        """Returns ``[batch, seq, d_model]``, and the new keys and values if there is a cache."""
        c = self.config
        x = checkpoint_name(x, LAYER_INPUT)
        adapters = block_adapters(self.adapters, "attn")
        attn = Attention(c, adapters, self.numerics, self.activation_sharding, name="attn")
        x, normed = self._added("attn_norm", x, None)
        y, keys = attn(normed, layer, shared)
        if c.post_norm:
            y = self._norm("attn_post_norm", round_and_save(y, self.numerics))
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
        """Returns ``x + y`` and the input of the next part.

        The input is the norm of the sum, if the family has a norm there.
        """
        c = self.config
        if y is not None and not (c.pre_norm and c.residual_scale == 1.0):
            x, y = self._add(x, y), None
        if c.pre_norm:
            return ResidualNorm(c.norm_eps, c.norm_offset, self.numerics, name=name)(x, y)
        return x, round_and_save(x, self.numerics)

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        scale = self.config.residual_scale
        return x + (y if scale == 1.0 else y * jnp.asarray(scale, y.dtype)).astype(x.dtype)

    def _ffn(self) -> Any:
        c = self.config
        kind = MoEFFN if c.n_experts else GatedFFN if c.gated else SelfGatedFFN
        extra = {
            "n_experts": c.n_experts,
            "top_k": c.experts_per_token,
            "norm_topk": c.norm_topk,
            "sharding": self.routing_sharding or self.activation_sharding,
        }
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
