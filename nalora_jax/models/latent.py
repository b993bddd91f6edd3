"""Multi-head latent attention of DeepSeek-V2 and its relatives (arXiv 2405.04434).

Keys and values of all heads follow from one latent vector of each token, and all heads share one
rotated key::

    c, k_rope = split(x W_kv_a)      c = norm(c)    k_rope = rope(k_rope)
    k_nope, v = split(c W_kv_b)      of each head
    q_nope, q_rope = split(norm(x W_q_a) W_q_b)     or split(x W_q)
    score = q_nope . k_nope + rope(q_rope) . k_rope

Generation stores c and k_rope only. Two products give the same attention over stored tokens:

- expanded: every stored latent is multiplied by W_kv_b;
- absorbed: with the halves W_uk and W_uv of W_kv_b of each head, ``q_nope . (c W_uk) = (q_nope
  W_uk^T) . c`` and ``sum_t w_t (c_t W_uv) = (sum_t w_t c_t) W_uv``. The latents are then keys and
  values of one head that all query heads read.

The one with fewer flops is compiled (`LatentAttention.absorbs`): absorbed for few queries, such as
the single token of a decoding step. An adapter of W_kv_b is absorbed as its two factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax.method.low_rank import Dense, adapted_dense, dora_ratio
from nalora_jax.models.attention_layer import attend, cached_keys
from nalora_jax.models.cache import grown, write_slice
from nalora_jax.models.config import Mixer, ModelConfig, ParamShapes
from nalora_jax.models.parts import LayerInputs, PartOptions, RMSNorm, SharedInputs
from nalora_jax.models.ropes import apply_rope, halves_from_adjacent, query_scales
from nalora_jax.ops.attention import product
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.reductions import append_zeros
from nalora_jax.ops.storage import Kernel, expand, round_and_save, store

# transformers' norms of latents have this constant, whatever config.json states for the others.
_NORM_EPS = 1e-6


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Latents:
    """Cached latents and rotated keys of a stack of layers of latent attention."""

    latents: Kernel  # [layers, batch, slots, kv_rank + rope_dim]

    def grow(self, length: int) -> Latents:
        """Returns the state with empty slots appended up to ``length``."""
        return Latents(grown(self.latents, 2, length))

    def extended(
        self, update: jax.Array, index: jax.Array, numerics: Numerics
    ) -> Latents:
        """Returns the state with new latents, ``[layers, batch, seq, kv_rank + rope_dim]``, written
        to the slots after ``index``."""
        return Latents(write_slice(self.latents, update, 2, index, numerics))


@dataclass(frozen=True)
class LatentAttention(Mixer):
    """Sizes of latent attention; the config's ``head_dim`` is ``nope_dim + rope_dim``."""

    q_rank: int  # of the queries' latent; 0: queries are projected from the input
    kv_rank: int  # of the latent of keys and values
    nope_dim: int  # dimensions of a head's query and key that are not rotated
    rope_dim: int  # rotated dimensions
    value_dim: int  # of a head's value, at most ``nope_dim + rope_dim``

    name: ClassVar[str] = "attn"
    attends: ClassVar[bool] = True
    splits_rows: ClassVar[bool] = True
    has_slots: ClassVar[bool] = True

    @property
    def state_dim(self) -> int:
        """Numbers that generation stores of a token and layer: the latent and the rotated key.

        Example: DeepSeek-V3 stores 512 + 64 in each of 61 layers, in bf16 70,272 bytes a token;
        keys and values of its 128 heads would take 128 * (192 + 128) numbers, 5.0 MB.
        """
        return self.kv_rank + self.rope_dim

    def arrays(self, config: ModelConfig) -> ParamShapes:
        """Returns the norms of the latents."""
        shapes: ParamShapes = {"kv_a_norm/scale": (self.kv_rank,)}
        if self.q_rank:
            shapes["q_a_norm/scale"] = (self.q_rank,)
        return shapes

    def projections(self, config: ModelConfig) -> ParamShapes:
        """Returns the kernel shapes of the projections."""
        d = config.d_model
        heads = config.n_heads
        queries = heads * config.head_dim
        shapes: ParamShapes = {"q_proj": (d, queries)}
        if self.q_rank:
            shapes = {
                "q_a_proj": (d, self.q_rank),
                "q_b_proj": (self.q_rank, queries),
            }
        return shapes | {
            "kv_a_proj": (d, self.state_dim),
            "kv_b_proj": (self.kv_rank, heads * (self.nope_dim + self.value_dim)),
            "o_proj": (heads * self.value_dim, d),
        }

    def has_bias(self, config: ModelConfig, name: str) -> bool:
        """See `Part`."""
        if name == "o_proj":
            return config.o_bias
        return config.qkv_bias and name in ("q_a_proj", "kv_a_proj")

    def flops(self, config: ModelConfig, seq: int) -> float:
        """Returns the flops of scores and weighted sums; only pairs within causality count."""
        pairs = config.n_layers * seq * (seq + 1) / 2
        return 2.0 * pairs * config.n_heads * (config.head_dim + self.value_dim)

    def saved(self, config: ModelConfig) -> float:
        """Returns the inputs of the latents' norms, and their results, which adapters of ``q_b``
        and ``kv_b`` save. Saved heads depend on the kernel (`nalora_jax.planner.estimates`)."""
        return 2.0 * (self.q_rank + self.kv_rank) + self.rope_dim

    def state_values(self, config: ModelConfig, tensor: int) -> float:
        """See `Mixer`; every device of ``tensor`` has the latents of all heads."""
        return float(self.state_dim)

    def absorbs(self, config: ModelConfig, queries: int, keys: int) -> bool:
        """Returns True if absorbed products of ``queries`` tokens that attend to ``keys`` tokens
        take fewer flops than expanded ones."""
        # Of one head: W_kv_b of each token, and both products of each pair.
        each = self.kv_rank * (self.nope_dim + self.value_dim)
        absorbed = queries * each + queries * keys * 2 * self.state_dim
        expanded = keys * each + queries * keys * 2 * config.head_dim
        return absorbed < expanded

    def init_state(
        self, config: ModelConfig, batch: int, length: int, numerics: Numerics
    ) -> Latents:
        """Returns empty slots for latents and rotated keys."""
        shape = (config.n_layers, batch, length, self.state_dim)
        return Latents(store(jnp.zeros(shape, numerics.operand), numerics))

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """Returns the module."""
        return LatentAttentionLayer(config, options, self, name=self.name)


class LatentAttentionLayer(nn.Module):
    """Adapted projections, norms of latents, RoPE and softmax attention."""

    config: ModelConfig
    options: PartOptions
    part: LatentAttention

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: LayerInputs, shared: SharedInputs
    ) -> tuple[jax.Array, jax.Array]:
        """Returns ``[batch, seq, d_model]``, and this call's latents and rotated keys, ``[batch,
        seq, state_dim]``."""
        c = self.config
        part = self.part
        table = shared.tables[self.options.prefix][0]
        q, latents = self._projected(x, layer, shared)
        # [batch, seq, heads, head_dim]
        q = q.reshape(*x.shape[:-1], c.n_heads, c.head_dim)
        rotated = self._rotated(q[..., part.nope_dim :], table)
        q = jnp.concatenate([q[..., : part.nope_dim], rotated], axis=-1)
        if c.query_growth:
            growth = query_scales(shared.positions, c.query_growth, c.growth_length)
            q = q * growth[..., None, None]
        # [batch, seq, 1, rope_dim]
        k_rope = self._rotated(latents[..., None, part.kv_rank :], table)
        normed = self._norm("kv_a_norm", latents[..., : part.kv_rank])
        state = jnp.concatenate([normed, k_rope[..., 0, :]], axis=-1)
        up = self.options.adapters.dense(
            "kv_b_proj",
            part.kv_rank,
            c.n_heads * (part.nope_dim + part.value_dim),
            layer.scales.get(part.name),
            deterministic=shared.deterministic,
        )
        before = None
        # A cache without slots is of a first call.
        if isinstance(layer.cached, Latents) and layer.cached.latents.shape[1]:
            before = expand(layer.cached.latents)
        if before is not None and part.absorbs(c, q.shape[1], before.shape[1]):
            out = self._absorbed(q, state, before, up, layer, shared)
        else:
            out = self._expanded(q, state, before, up, layer, shared)
        (y,) = self.options.projected(
            out.reshape(*x.shape[:-1], -1),
            {"o_proj": c.d_model},
            layer,
            shared,
            bias=c.o_bias,
        )
        return y, state

    def _projected(
        self, x: jax.Array, layer: LayerInputs, shared: SharedInputs
    ) -> tuple[jax.Array, jax.Array]:
        """Returns queries ``[batch, seq, heads * head_dim]``, and latents with keys that are to be
        rotated, ``[batch, seq, state_dim]``."""
        c = self.config
        part = self.part
        widths = {"kv_a_proj": part.state_dim}
        if part.q_rank:
            widths = {"q_a_proj": part.q_rank} | widths
        outputs = self.options.projected(x, widths, layer, shared, bias=c.qkv_bias)
        *of_queries, latents = (
            round_and_save(y, self.options.numerics) for y in outputs
        )
        name = "q_proj"
        if of_queries:
            name = "q_b_proj"
            x = self._norm("q_a_norm", of_queries[0])
        (q,) = self.options.projected(x, {name: c.n_heads * c.head_dim}, layer, shared)
        return q, latents

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return RMSNorm(_NORM_EPS, dtype=self.options.numerics.result, name=name)(x)

    def _rotated(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """Returns ``[batch, seq, heads, rope_dim]`` rotated, in float32."""
        if self.config.rope_adjacent:
            x = halves_from_adjacent(x, table)
        return apply_rope(x, table)

    def _expanded(
        self,
        q: jax.Array,
        state: jax.Array,
        before: jax.Array | None,
        up: Dense,
        layer: LayerInputs,
        shared: SharedInputs,
    ) -> jax.Array:
        """Returns ``[batch, seq, heads, value_dim]`` from keys and values of every head.

        Args:
          q: ``[batch, seq, heads, head_dim]``, rotated.
          state: ``[batch, seq, state_dim]`` of the same tokens.
          before: ``[batch, slots, state_dim]`` of earlier calls.
          up: the projection of latents to keys and values.
          layer, shared: inputs of the layer.
        """
        cached = None
        if before is not None:
            k, v = self._keys_and_values(before, up)
            k = k.transpose(0, 2, 3, 1)
            cached = cached_keys(k, v.transpose(0, 2, 1, 3), shared)
        heads = (q, *self._keys_and_values(state, up))
        out = attend(self, heads, cached, layer, shared)
        return out[..., : self.part.value_dim]

    def _keys_and_values(
        self, state: jax.Array, up: Dense
    ) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values of all heads, ``[batch, tokens, heads, head_dim]`` of ``[batch,
        tokens, state_dim]``.

        Values are padded with zeros: kernels of attention take keys and values of one width.
        """
        part = self.part
        heads = self.config.n_heads
        latents = state[..., : part.kv_rank].astype(self.options.numerics.result)
        kv = adapted_dense(latents, up, self.options.numerics).y
        kv = kv.reshape(*kv.shape[:-1], heads, -1)
        shape = (*kv.shape[:-1], part.rope_dim)
        k_rope = jnp.broadcast_to(state[..., None, part.kv_rank :], shape)
        k = jnp.concatenate([kv[..., : part.nope_dim], k_rope], axis=-1)
        v = kv[..., part.nope_dim :]
        return k, append_zeros(v, k.shape[-1] - part.value_dim, axis=-1)

    def _absorbed(
        self,
        q: jax.Array,
        state: jax.Array,
        before: jax.Array,
        up: Dense,
        layer: LayerInputs,
        shared: SharedInputs,
    ) -> jax.Array:
        """Returns `_expanded` without keys and values of heads; it is not differentiated."""
        part = self.part
        nope = part.nope_dim
        times_up = partial(
            _times_up, up=up, heads=self.config.n_heads, numerics=self.options.numerics
        )
        # [batch, seq, heads, state_dim]
        queries = times_up(q[..., :nope], columns=slice(nope), transposed=True)
        queries = jnp.concatenate([queries, q[..., nope:]], axis=-1)
        # The latents are keys and values of one head: [batch, 1, state_dim, slots] and [batch, 1,
        # slots, state_dim].
        by_slot = before[:, None]
        cached = cached_keys(by_slot.swapaxes(2, 3), by_slot, shared)
        one = state[:, :, None]
        out = attend(self, (queries, one, one), cached, layer, shared)
        return times_up(out[..., : part.kv_rank], columns=slice(nope, None))


def _times_up(
    x: jax.Array,
    up: Dense,
    heads: int,
    numerics: Numerics,
    columns: slice,
    *,
    transposed: bool = False,
) -> jax.Array:
    """Returns x times some columns of each head of an adapted kernel ``[kv_rank, heads * width]``.

    Args:
      x: ``[batch, seq, heads, kv_rank]``; if transposed ``[batch, seq, heads, columns]``.
      up: the kernel and its adapter, which are multiplied one after the other.
      heads: number of heads.
      numerics: dtypes.
      columns: of each head.
      transposed: multiply by the transpose.

    Returns:
      float32 ``[batch, seq, heads, columns]``; if transposed ``[batch, seq, heads, kv_rank]``.
    """

    def by_head(array: jax.Array) -> jax.Array:
        """Returns ``[..., heads, columns]`` of ``[..., heads * width]``."""
        return array.reshape(*array.shape[:-1], heads, -1)[..., columns]

    kernel = by_head(expand(up.kernel, numerics.operand))
    adapter = up.adapter
    if adapter is None:
        if transposed:
            return product("bshd,chd->bshc", x, kernel, numerics)
        return product("bshc,chd->bshd", x, kernel, numerics)
    ratio = None
    if adapter.magnitude is not None:
        ratio = by_head(dora_ratio(up.kernel, adapter))[None, None]
    narrow = replace(numerics, operand=numerics.adapter)
    b = by_head(adapter.b)
    if transposed:
        if ratio is not None:
            x = x * ratio
        y = product("bshd,chd->bshc", x, kernel, numerics)
        hidden = product("bshd,rhd->bshr", x, b, narrow)
        return y + adapter.scale * product("bshr,cr->bshc", hidden, adapter.a, narrow)
    y = product("bshc,chd->bshd", x, kernel, numerics)
    hidden = product("bshc,cr->bshr", x, adapter.a, narrow)
    y = y + adapter.scale * product("bshr,rhd->bshd", hidden, b, narrow)
    if ratio is None:
        return y
    return y * ratio
