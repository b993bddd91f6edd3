"""Causal self-attention of a decoder layer, shared by all families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.models.cache import KeyValues
from nalora_jax.models.config import GLOBAL_WINDOW, Mixer, ModelConfig, ParamShapes
from nalora_jax.models.parts import LayerInputs, PartOptions, RMSNorm, SharedInputs
from nalora_jax.models.ropes import apply_rope, halves_from_adjacent, query_scales
from nalora_jax.ops.attention import (
    QKV,
    AttentionConfig,
    CachedKeys,
    Keys,
    attention,
)
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.residual_norm import rms_norm
from nalora_jax.ops.split_attention import split_attention
from nalora_jax.ops.split_rows import shards_of
from nalora_jax.ops.storage import Kernel, round_and_save, store

NewKeys = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class SoftmaxAttention(Mixer):
    """Attention with the config's heads, windows and norms."""

    name: ClassVar[str] = "attn"
    attends: ClassVar[bool] = True
    splits_rows: ClassVar[bool] = True
    values_normed: ClassVar[bool] = False  # True: RMS norms of values, without a scale
    keys_as_values: ClassVar[bool] = (
        False  # True: there is no v_proj, values are k_proj's output
    )

    def heads(self, config: ModelConfig) -> dict[str, int]:
        """Returns the number of heads of every projection of the input; a query's gate counts as a
        head."""
        heads = {"q_proj": (1 + config.attn_gate) * config.n_heads}
        if not self.reads:
            heads["k_proj"] = config.n_kv_heads
            if not self.keys_as_values:
                heads["v_proj"] = config.n_kv_heads
        return heads

    def arrays(self, config: ModelConfig) -> ParamShapes:
        """Returns the norms of queries and keys, and the sinks."""
        heads = {"q": config.n_heads, "k": config.n_kv_heads}
        if config.qk_norm != "projection":
            heads = dict.fromkeys(heads, 1)
        if self.reads:
            heads.pop("k")
        shapes: ParamShapes = {}
        if config.qk_norm:
            shapes = {
                f"{name}_norm/scale": (n * config.head_dim,)
                for name, n in heads.items()
            }
        if config.attn_sinks:
            shapes["sinks"] = (config.n_heads,)
        return shapes

    def projections(self, config: ModelConfig) -> ParamShapes:
        """Returns the kernel shapes of the projections."""
        d = config.d_model
        width = config.head_dim
        shapes: ParamShapes = {
            name: (d, n * width) for name, n in self.heads(config).items()
        }
        return shapes | {"o_proj": (config.n_heads * width, d)}

    def has_bias(self, config: ModelConfig, name: str) -> bool:
        """See `Part`."""
        if name == "o_proj":
            return config.o_bias
        return config.qkv_bias

    def flops(self, config: ModelConfig, seq: int) -> float:
        """Returns the flops of scores and weighted sums; only pairs within causality and windows
        count."""
        spans = [min(window, seq) for window in config.layer_windows]
        pairs = sum(seq * span - span * (span - 1) / 2 for span in spans)
        return 4.0 * pairs * config.n_heads * config.head_dim

    def saved(self, config: ModelConfig) -> float:
        """Returns 0: saved heads depend on the kernel (`nalora_jax.planner.estimates`)."""
        return 0.0

    def init_state(
        self, config: ModelConfig, batch: int, length: int, numerics: Numerics
    ) -> KeyValues:
        """Returns zeros for the keys and values of ``length`` tokens.

        The axes are those of `KeyValues`: attention reads keys by dimension and values by slot.
        """
        lead = (config.n_layers, batch, config.n_kv_heads)
        k = jnp.zeros((*lead, config.head_dim, length), numerics.operand)
        v = jnp.zeros((*lead, length, config.head_dim), numerics.operand)
        return KeyValues(store(k, numerics), store(v, numerics))

    def state_values(self, config: ModelConfig, tensor: int) -> float:
        """See `Mixer`; devices split the heads."""
        return 2.0 * config.n_kv_heads * config.head_dim / tensor

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """Returns the module."""
        return Attention(config, options, self, name=self.name)


@dataclass(frozen=True)
class NormedAttention(SoftmaxAttention):
    """Attention of Gemma 4: values are normed, too.

    Attributes:
      keys_as_values: values are the norm of k_proj's output.
      hands: see `Mixer.hands`.
      reads: see `Mixer.reads`; there is no ``k_proj`` and no ``v_proj``.
    """

    values_normed: ClassVar[bool] = True
    keys_as_values: bool = False  # type: ignore[misc]  # of each layer
    hands: str = ""
    reads: str = ""


class Attention(nn.Module):
    """Adapted projections, norms, RoPE and softmax attention."""

    config: ModelConfig
    options: PartOptions
    part: SoftmaxAttention

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: LayerInputs, shared: SharedInputs
    ) -> tuple[jax.Array, NewKeys]:
        """Returns ``[batch, seq, d_model]``, and this call's keys and values."""
        c = self.config
        numerics = self.options.numerics
        widths = {name: n * c.head_dim for name, n in self.part.heads(c).items()}
        q, *kv = self.options.projected(x, widths, layer, shared, bias=c.qkv_bias)
        gate = None
        # [batch, seq, heads * 2 * head_dim], every head's query followed by its gate, -> two
        # [batch, seq, heads * head_dim]
        if c.attn_gate:
            by_head = q.reshape(*x.shape[:-1], c.n_heads, -1)
            q_by_head, gate_by_head = jnp.split(by_head, 2, axis=-1)
            q = q_by_head.reshape(*x.shape[:-1], -1)
            gate = gate_by_head.reshape(*x.shape[:-1], -1)
        if c.qk_norm:
            q = round_and_save(q, numerics)
            # Only inputs of a norm are saved: the keys and, with normed values, the values.
            last = len(kv) if self.part.values_normed else 1
            kv = [
                round_and_save(y, numerics) if i < last else y for i, y in enumerate(kv)
            ]
        if c.qk_norm == "projection":
            q = self._norm("q_norm")(q)
            kv[0] = self._norm("k_norm")(kv[0])
        # [batch, seq, heads * head_dim] -> [batch, seq, heads, head_dim]
        q, *kv = (y.reshape(*y.shape[:-1], -1, c.head_dim) for y in (q, *kv))
        rope = 0 if layer.rope is None else layer.rope
        table = shared.tables[self.options.prefix][rope]
        if self.part.reads:
            k = shared.handed[self.part.reads].k
            v = shared.handed[self.part.reads].v
        else:
            k = self._rotated("k_norm", kv[0], table)
            v = kv[-1]
            if self.part.values_normed:
                v = rms_norm(v, jnp.ones((c.head_dim,), jnp.float32), c.norm_eps)
        q = self._rotated("q_norm", q, table)
        if c.query_growth:
            growth = query_scales(shared.positions, c.query_growth, c.growth_length)
            q = q * growth[..., None, None]
        out = self._attend(q, k, v, layer, shared).reshape(*x.shape[:-1], -1)
        if gate is not None:
            out = out * jax.nn.sigmoid(round_and_save(gate, numerics)).astype(out.dtype)
        (y,) = self.options.projected(
            out, {"o_proj": c.d_model}, layer, shared, bias=c.o_bias
        )
        return y, (k, v)

    def _rotated(self, name: str, y: jax.Array, table: jax.Array) -> jax.Array:
        """Returns rotated queries or keys ``[batch, seq, heads, head_dim]``, with their norm
        ``name`` per head."""
        c = self.config
        if c.qk_norm == "head":
            y = self._norm(name)(y)
        if c.rope_adjacent:  # scores do not depend on the order of dimensions
            y = halves_from_adjacent(y, table)
        y = apply_rope(y, table)
        if c.qk_norm != "rotated":
            return y
        return self._norm(name)(y)

    def _norm(self, name: str) -> RMSNorm:
        """Returns the norm ``name`` over the last axis."""
        return RMSNorm(self.config.norm_eps, self.config.norm_offset, name=name)

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer: LayerInputs,
        shared: SharedInputs,
    ) -> jax.Array:
        """Returns attention ``[batch, seq, heads, head_dim]`` over this call's keys and any cached
        ones; q and k are rotated."""
        c = self.config
        # Heads that follow from saved arrays, or are inputs of the layer.
        if self.part.values_normed:
            recomputed = "qkv"
        elif c.qk_norm:
            recomputed = "qk"
        else:
            recomputed = ""
        sinks = None
        if c.attn_sinks:
            sinks = self.param(
                "sinks", nn.initializers.zeros_init(), (c.n_heads,)
            ).astype(jnp.float32)
        # Some layers of Gemma 4 have no keys and read those of an earlier layer.
        if self.part.reads:
            before = shared.handed[self.part.reads].cached
        else:
            before = layer.cached
        cached = None
        if before is not None:
            cached = cached_keys(before.k, before.v, shared)
        return attend(
            self,
            (q, k, v),
            cached,
            layer,
            shared,
            recomputed=recomputed,
            sinks=sinks,
        )


def cached_keys(k: Kernel, v: Kernel, shared: SharedInputs) -> CachedKeys:
    """Returns the keys and values of earlier calls with the integers that all layers share."""
    assert shared.cached_positions is not None
    assert shared.cached_segments is not None
    return CachedKeys(k, v, shared.cached_positions, shared.cached_segments)


def attend(
    module: Any,
    heads: QKV,
    cached: CachedKeys | None,
    layer: LayerInputs,
    shared: SharedInputs,
    *,
    recomputed: str = "",
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Returns attention ``[batch, seq, heads, head_dim]`` over this call's keys and any cached
    ones.

    Args:
      module: the layer's module, with the attributes ``config`` and ``options``; it draws dropout.
      heads: rotated queries and keys, and values.
      cached: keys of earlier calls.
      layer, shared: inputs of the layer.
      recomputed: see `AttentionConfig`.
      sinks: see `Keys`.
    """
    c: ModelConfig = module.config
    sharding = module.options.shardings.rows
    numerics = module.options.numerics.within()
    config = AttentionConfig(
        c.query_scale or c.head_dim**-0.5,
        c.attn_softcap,
        c.attn_dropout,
        tuple(sorted(set(c.layer_windows))),
        sharding,
        recomputed=recomputed,
    )
    window = GLOBAL_WINDOW if layer.window is None else layer.window
    if shards_of(sharding) > 1:
        assert shared.row is not None
        return split_attention(heads, shared.row, window, config, numerics, sinks)
    q, k, v = heads
    keys = Keys(k, v, shared.positions, shared.segments, shared.starts, sinks, cached)
    rng = None
    if c.attn_dropout and not shared.deterministic:
        rng = module.make_rng("dropout")
    return attention(q, keys, window, config, numerics, dropout_rng=rng)
