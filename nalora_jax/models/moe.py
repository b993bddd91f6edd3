"""A mixture of gated experts: router, top-k, and the gated FFN of each chosen expert, with adapters and statistics.

Rows of tokens are sorted by expert, so that every projection is one grouped product (`lax.ragged_dot`) over exactly the
tokens that reached each expert; nothing is dropped and no capacity is assumed. The mechanisms work per expert channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax import activations, selection, statistics
from nalora_jax.errors import NaloraError
from nalora_jax.nn.ffn import Adapters
from nalora_jax.nn.lora import frozen_kernel
from nalora_jax.nn.low_rank import TargetSpec, init_a
from nalora_jax.ops.adapted_dense import Adapter, Factors, Products, column_norm, combine, gated, moved_from
from nalora_jax.ops.checks import Live, gate_checks
from nalora_jax.ops.gated_mlp import GateStatsConfig, gated_product
from nalora_jax.ops.numerics import Numerics
from nalora_jax.ops.storage import Kernel, expand


class Routing(NamedTuple):
    """Which rows go where: row i of the sorted rows is token ``token[i]`` in expert ``expert[i]``."""

    token: jax.Array  # int [tokens * top_k]
    expert: jax.Array  # int [tokens * top_k], ascending
    sizes: jax.Array  # int [experts], rows of each
    weight: jax.Array  # float32 [tokens * top_k]
    back: jax.Array  # int [tokens * top_k], inverse of the sorting: rows of token 0, of token 1, ...


def route(logits: jax.Array, top_k: int, *, normalize: bool) -> Routing:
    """The ``top_k`` experts of every token and their weights.

    Args:
      logits: float32 ``[tokens, experts]``.
      top_k: experts per token.
      normalize: scale the chosen experts' probabilities to sum to 1.
    """
    n_experts = logits.shape[-1]
    weights, chosen = lax.top_k(jax.nn.softmax(logits, axis=-1), top_k)
    if normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    return Routing(
        token=order // top_k,
        expert=flat[order],
        sizes=jnp.bincount(flat, length=n_experts).astype(jnp.int32),
        weight=weights.reshape(-1)[order],
        back=jnp.argsort(order),
    )


def grouped_matmul(x: jax.Array, kernels: Kernel, sizes: jax.Array, numerics: Numerics) -> jax.Array:
    """Every row through its expert's frozen kernel: no gradient for the kernels.

    Args:
      x: ``[rows, d_in]`` sorted by expert.
      kernels: ``[experts, d_in, d_out]``, as they are stored.
      sizes: int ``[experts]``.
      numerics: dtypes of operands and result.

    Returns:
      ``[rows, d_out]`` in ``numerics.result``.
    """
    chex.assert_rank([x, sizes], [2, 1])
    assert kernels.ndim == 3
    return _frozen(x, kernels, sizes, numerics.operand).astype(numerics.result)


def _ragged(x: jax.Array, kernels: jax.Array, sizes: jax.Array, operand: str) -> jax.Array:
    return lax.ragged_dot(x.astype(operand), kernels.astype(operand), sizes, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _frozen(x: jax.Array, kernels: Any, sizes: jax.Array, operand: str) -> jax.Array:
    return _ragged(x, expand(kernels), sizes, operand)


def _frozen_fwd(x: jax.Array, kernels: Any, sizes: jax.Array, operand: str) -> tuple[jax.Array, Any]:
    return _frozen(x, kernels, sizes, operand), (kernels, sizes, jnp.zeros((0,), x.dtype))


def _frozen_bwd(operand: str, residuals: Any, g: jax.Array) -> tuple[jax.Array, None, None]:
    kernels, sizes, like_x = residuals
    dx = _ragged(g, expand(kernels).swapaxes(1, 2), sizes, operand).astype(like_x.dtype)
    return dx, None, None


_frozen.defvjp(_frozen_fwd, _frozen_bwd)


def grouped_residual(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array | float,
    sizes: jax.Array,
    mask: jax.Array | None = None,
    *,
    operand: str = "float32",
) -> jax.Array:
    """`nalora_jax.ops.adapted_dense.residual` per expert: ``s (x A_e) B_e``, gated gradient included.

    Args:
      x: ``[rows, d_in]`` sorted by expert.
      a: ``[experts, d_in, r]`` float32.
      b: ``[experts, r, d_out]`` float32.
      scale: scalar.
      sizes: int ``[experts]``.
      mask: ``[experts, d_out]`` or None.
      operand: dtype of the operands.

    Returns:
      ``[rows, d_out]`` float32.
    """
    chex.assert_rank([x, a, b], [2, 3, 3])
    (y,), _ = gated(GroupedProducts(sizes, operand), x, (Factors.of(Adapter(a, b, scale, mask)),))
    out: jax.Array = y
    return out


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupedProducts(Products):
    """Every row's products are those of its expert's adapter; the factors have a leading axis ``[experts]``."""

    sizes: jax.Array  # int [experts], rows of each
    operand: str = field(metadata={"static": True})

    def _dot(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return _ragged(x, y, self.sizes, self.operand)

    def _per_expert(self, x: jax.Array, g: jax.Array, like: jax.Array) -> jax.Array:
        """``x_e^T g_e`` of every expert's rows: the transpose of the grouped product in its kernels."""
        made: jax.Array = jax.linear_transpose(partial(self._dot, x), like)(g)[0]
        return made

    def forward(self, x: jax.Array, layers: Sequence[Factors]) -> tuple[list[jax.Array], list[jax.Array]]:
        """See `Products`."""
        (layer,) = layers
        hidden = layer.scale * self._dot(x, layer.a)
        return [self._dot(hidden, layer.b)], [hidden]

    def narrow(
        self, gs: Sequence[jax.Array], layers: Sequence[Factors], wides: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], None]:
        """See `Products`."""
        (g,), (wide,) = gs, wides
        return [self._dot(g, wide.swapaxes(1, 2))], None

    def gradients(
        self,
        x: jax.Array,
        gs: Sequence[jax.Array],
        layers: Sequence[Factors],
        hidden: Sequence[Any],
        exact: Sequence[Any],
        shaping: Sequence[Any],
        beside: Any,
    ) -> tuple[jax.Array, list[Any], list[Any]]:
        """See `Products`."""
        (layer,), (g,) = layers, gs
        dx = self._dot(exact[0], layer.a.swapaxes(1, 2)).astype(x.dtype)
        return dx, [self._per_expert(x, shaping[0], layer.a)], [self._per_expert(hidden[0], g, layer.b)]


def expert_statistics(
    base: jax.Array,
    delta: jax.Array | None,
    z: jax.Array,
    weights: jax.Array,
    activation: activations.Activation,
    config: GateStatsConfig,
) -> dict[str, jax.Array]:
    """`nalora_jax.ops.gated_mlp.gate_statistics` of every expert, over the tokens that reached it.

    Args:
      base: ``[rows, d_ff]`` frozen pre-activations of rows sorted by expert.
      delta: ``[rows, d_ff]`` residual, or None.
      z: ``[rows, d_ff]`` full pre-activations.
      weights: ``[experts, rows]``: the row's token weight in its own expert, 0 in the others.
      activation: the gate's.
      config: strides and tolerance; a stride takes one in n sorted rows.

    Returns:
      The same names with a leading ``[experts]`` axis.
    """
    partition = activations.partition(activation.name, config.tolerance)
    dz = jnp.zeros_like(base) if delta is None else delta
    weights = lax.stop_gradient(weights)

    def one(gate: jax.Array, probe: jax.Array) -> dict[str, jax.Array]:
        stats = statistics.channel_statistics(taken[0], gate, activation, partition, config.extra)
        return stats | statistics.probe_statistics(moved[0], moved[1], probe, activation, config.extra)

    taken = [_taken(x, weights, config.stride) for x in (z, weights.T)]
    moved = [_taken(x, weights, config.probe_stride) for x in (base, dz, weights.T)]
    return jax.vmap(one)(taken[-1].T, moved[-1].T)


def _taken(x: jax.Array, weights: jax.Array, stride: int) -> jax.Array:
    """One in ``stride`` of the sorted rows ``[rows, n]``, real ones where there are any: singly, for small experts."""
    return selection.sampled(x, jnp.sum(weights, axis=0), stride, run=1)


def expert_cotangent_statistics(
    delta: jax.Array, weights: jax.Array, names: Iterable[str], *, stride: int
) -> dict[str, jax.Array]:
    """`gated_mlp.cotangent_statistics` by expert: ``weights [experts, rows]``, results ``[experts, ...]``."""
    own, delta = _taken(weights.T, weights, stride).T, _taken(delta, weights, stride)
    return jax.vmap(lambda one: statistics.cotangent_statistics(delta, one, names))(own)


class ExpertDense(nn.Module):
    """The frozen kernels of one projection of all experts, with optional adapters: `LoRADense` over grouped rows."""

    n_experts: int
    features: int
    target: TargetSpec | None = None
    dora: bool = False
    dropout: float = 0.0
    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        routing: Routing,
        scale: jax.Array | float = 1.0,
        mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array | None]:
        """``[rows, d_in]`` sorted by expert -> ``(base, residual)``, each ``[rows, features]``."""
        shape = (self.n_experts, x.shape[-1], self.features)
        kernel = frozen_kernel(self, shape, nn.initializers.lecun_normal(batch_axis=(0,)))
        base = grouped_matmul(x, kernel, routing.sizes, self.numerics)
        if self.target is None or not (self.is_initializing() or self.has_variable("lora", "a")):
            return base, None
        rank = self.target.rank
        a = self.variable("lora", "a", lambda: init_a(self.make_rng("params"), (*shape[:2], rank))).value
        b = self.variable("lora", "b", lambda: jnp.zeros((self.n_experts, rank, self.features), jnp.float32)).value
        if a.ndim != 3:
            raise NaloraError("adapters", expected="one adapter on expert projections", found="a stack of adapters")
        inner = nn.Dropout(self.dropout, deterministic=deterministic)(x) if self.dropout > 0 else x
        delta = grouped_residual(inner, a, b, scale, routing.sizes, mask, operand=self.numerics.adapter)
        if self.dora:
            frozen = lax.stop_gradient(expand(kernel)).astype(jnp.float32)
            start = lambda: jnp.linalg.norm(frozen, axis=1)  # noqa: E731
            magnitude = self.variable("lora", "magnitude", start).value
            norm = jax.vmap(column_norm, in_axes=(0, 0, 0, None))(frozen, a, b, scale)
            ratio = (magnitude / lax.stop_gradient(norm))[routing.expert]
            ratio = jnp.where(jnp.asarray(scale) == 0, 1.0, ratio)  # rank 0: the magnitude neither acts nor trains
            delta = (ratio - 1.0) * base.astype(jnp.float32) + ratio * delta
        return base, delta.astype(base.dtype)

    def moved(
        self, x: jax.Array, routing: Routing, scale: jax.Array | float, delta: jax.Array | None
    ) -> jax.Array | None:
        """How far the residual ``delta`` of the call has moved from where its adapter started (`LoRADense.probe`)."""
        if delta is None or not self.has_variable("params", "start_a"):
            return delta
        a, b = self.get_variable("params", "start_a"), self.get_variable("params", "start_b")
        start = grouped_residual(x, a, b, scale, routing.sizes, operand=self.numerics.adapter)
        return lax.stop_gradient(moved_from(delta, start.astype(delta.dtype)))


class MoEFFN(nn.Module):
    """A top-k mixture of gated FFNs; the call is `GatedFFN`'s."""

    d_model: int
    d_ff: int
    n_experts: int
    top_k: int
    norm_topk: bool = True
    activation: str = "silu"
    adapters: Adapters = Adapters()
    use_bias: bool = False
    numerics: Numerics = Numerics()
    stats: GateStatsConfig = GateStatsConfig()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scales: Mapping[str, jax.Array | float] | None = None,
        *,
        token_weights: jax.Array | None = None,
        deterministic: bool = True,
        adapter_ids: jax.Array | None = None,
    ) -> jax.Array:
        """``[batch, seq, d_model]`` -> the same; ``adapter_ids`` has no meaning here."""
        del adapter_ids
        scales = scales or {}
        flat = x.reshape(-1, self.d_model)
        routing = route(Router(self.n_experts, name="router")(flat), self.top_k, normalize=self.norm_topk)
        rows = jnp.take(flat, routing.token, axis=0)
        options = {"deterministic": deterministic}
        mask = self.get_variable("gate_mask", "mask") if self.has_variable("gate_mask", "mask") else None
        gate = self._experts("gate_proj", self.d_ff)
        base, delta = gate(rows, routing, scales.get("gate_proj", 1.0), mask, **options)
        z = self._tapped(combine(base, delta), routing, token_weights)
        u = combine(*self._experts("up_proj", self.d_ff)(rows, routing, scales.get("up_proj", 1.0), **options))
        hidden, _ = gated_product(z, u, activations.get(self.activation), self.numerics)
        moved = gate.moved(rows, routing, scales.get("gate_proj", 1.0), delta)
        self._observe(z, moved, Live(z, base, delta, u, hidden), routing, token_weights)
        down = self._experts("down_proj", self.d_model)
        y = combine(*down(hidden, routing, scales.get("down_proj", 1.0), **options))
        y = y * routing.weight[:, None].astype(y.dtype)
        # [tokens, top_k, d_model] in the tokens' own order
        return jnp.sum(y[routing.back].reshape(-1, self.top_k, self.d_model), axis=1).reshape(x.shape)

    def _experts(self, name: str, features: int) -> ExpertDense:
        return ExpertDense(
            self.n_experts,
            features,
            self.adapters.get(name),
            dora=self.adapters.dora,
            dropout=self.adapters.dropout,
            numerics=self.numerics,
            name=name,
        )

    def _weights(self, routing: Routing, token_weights: jax.Array | None) -> jax.Array:
        """``[experts, rows]``: the row's token weight in its own expert, 0 in the others."""
        count = routing.token.shape[0]
        rows = jnp.ones(count) if token_weights is None else jnp.take(token_weights.reshape(-1), routing.token)
        own = routing.expert[None, :] == jnp.arange(self.n_experts)[:, None]
        return jnp.where(own, rows.astype(jnp.float32)[None, :], 0.0)

    def _tapped(self, z: jax.Array, routing: Routing, token_weights: jax.Array | None) -> jax.Array:
        """``z``, its cotangent measured where the collection ``gate_taps`` asks for it."""
        if self.is_initializing() or "gate_taps" not in self.variables:
            return z
        sinks = {name: self.get_variable("gate_taps", name) for name in self.variables["gate_taps"]}
        measure = partial(expert_cotangent_statistics, stride=self.stats.stride)
        return statistics.tap(z, sinks, self._weights(routing, token_weights), measure)

    def _observe(
        self, z: jax.Array, moved: jax.Array | None, live: Live, routing: Routing, token_weights: jax.Array | None
    ) -> None:
        if self.is_initializing() or not self.is_mutable_collection("gate_stats"):
            return
        activation = activations.get(self.activation)
        weights = self._weights(routing, token_weights)
        base = live.base if moved is live.dz or moved is None else z - moved
        written = expert_statistics(base, moved, z, weights, activation, self.stats)
        if self.stats.check:
            written |= gate_checks(live, activation, self.stats.check, self.numerics.residual)
        for name, value in written.items():
            self.sow("gate_stats", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


class Router(nn.Module):
    """Expert logits, in float32 whatever the model's dtype: a rounding error here would pick another expert."""

    n_experts: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[tokens, d_model]`` -> float32 ``[tokens, experts]``."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.n_experts))
        frozen = lax.stop_gradient(kernel).astype(jnp.float32)
        return lax.dot_general(x.astype(jnp.float32), frozen, (((1,), (0,)), ((), ())))
