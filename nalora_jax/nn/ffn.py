"""Self-gated feed-forward blocks with nonlinearity-aware low-rank parameters.

    gated       z = x W_gate,  u = x W_up,  y = (phi(z) * u) W_down        (SwiGLU, GeGLU, ...)
    self-gated  z = x W_in,                 y = phi(z) W_out               (MLPs of CLIP, ViT, BERT)

An adapter on the gate moves the selection weight rho(z), not only the feature. The block therefore reads a channel
mask (collection ``gate_mask``, optional, training only), which shapes the gradient of the gate's A, and writes the
channel statistics that the next step's mask and step scale are made of (collection ``gate_stats``, output only).
Neither touches the forward value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax import activations, selection, statistics
from nalora_jax.cpu import native
from nalora_jax.nn.checks import Live, gate_checks
from nalora_jax.nn.gated_down import Gating, gated_down
from nalora_jax.nn.lora import Call, Hidden, LoRADense, Probe, side_by_side
from nalora_jax.nn.low_rank import TargetSpec
from nalora_jax.nn.matmul import KEPT_WIDE, Numerics, is_native, restored, rounded, stored


@dataclass(frozen=True)
class GateStatsConfig:
    """What a block measures when ``gate_stats`` is mutable."""

    stride: int = 1  # statistics on one in n positions of a row (`nalora_jax.selection.sampled`)
    probe_stride: int = 8  # misalignment on one in n positions
    tolerance: float = 0.05  # |h - 1| at which the linear region starts
    check: float = 0.0  # tolerance of the checks on the live tensors (`nalora_jax.nn.checks`); 0 makes none
    extra: tuple[str, ...] = ()  # statistics of the forward pass beyond the standard ones (`nalora_jax.statistics`)


@dataclass(frozen=True)
class Adapters:
    """The adapters of one block, by projection name, and their common options."""

    targets: tuple[tuple[str, TargetSpec], ...] = ()
    dora: bool = False
    dropout: float = 0.0

    def get(self, name: str) -> TargetSpec | None:
        """The spec of projection ``name``, or None."""
        return dict(self.targets).get(name)


def gated_product(
    z: jax.Array,
    u: jax.Array | None,
    activation: activations.Activation,
    kept: str = "float32",
    result: str = "float32",
) -> tuple[jax.Array, jax.Array]:
    """``(a * u, a)`` with ``a = phi(z)``, of z and u rounded to ``kept``: all that the backward pass keeps.

    Computed in ``result``, which ``a`` has too; ``a * u`` is of z's dtype.

    Autodiff would keep the sigmoid and phi(z) as well. ``a`` has no gradient of its own, and unused it costs nothing.
    Without u that is 1.
    """
    if u is not None:
        chex.assert_equal_shape([z, u])
    logistic = _logistic(z, activation) if u is not None and kept == "bfloat16" else None
    return _gated_product(z, u, activation, kept, result, logistic)


def _logistic(z: jax.Array, activation: activations.Activation) -> native.Logistic | None:
    """The gate as `nalora_jax.cpu.native` takes it, where that can: in bf16, of a logistic function."""
    if activation.logistic is None or z.dtype != jnp.bfloat16 or not native.available():
        return None
    return native.Logistic(*activation.logistic)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _gated_product(
    z: jax.Array,
    u: jax.Array | None,
    activation: activations.Activation,
    kept: str,
    result: str,
    logistic: native.Logistic | None,
) -> Any:
    return _gated_product_fwd(z, u, activation, kept, result, logistic)[0]


def _gated_product_fwd(
    z: jax.Array,
    u: jax.Array | None,
    activation: activations.Activation,
    kept: str,
    result: str,
    logistic: native.Logistic | None,
) -> Any:
    # The value is made of what is kept, so that a rematerialised layer makes it again without the products.
    held = stored(z, kept, KEPT_WIDE), None if u is None else stored(u, kept, KEPT_WIDE)
    like_z = jnp.zeros((0,), z.dtype)
    a = activation.phi(restored(held[0], result))
    if logistic is not None and held[1] is not None:
        return (native.gate(held[0], held[1], logistic), a), (*held, like_z)
    return (rounded(a if held[1] is None else a * restored(held[1], result), z.dtype), a), (*held, like_z)


def _gated_product_bwd(
    activation: activations.Activation,
    kept: str,
    result: str,
    logistic: native.Logistic | None,
    residuals: Any,
    g: Any,
) -> Any:
    z, u, like_z = residuals
    if logistic is not None:
        return native.gate_gradient(z, u, g[0], logistic)[:2]
    z, g = restored(z, result), g[0].astype(result)
    rho, drho = activation.gate(z)  # one exponential for both
    slope = rho + z * drho
    if u is None:
        return rounded(g * slope, like_z.dtype), None
    return rounded(g * restored(u, result) * slope, like_z.dtype), rounded(g * (z * rho), like_z.dtype)


_gated_product.defvjp(_gated_product_fwd, _gated_product_bwd)


def gate_statistics(
    z: jax.Array, probe: Probe, weights: jax.Array, activation: activations.Activation, config: GateStatsConfig
) -> dict[str, jax.Array]:
    """Sums over real tokens that the mechanisms and the metrics are made of; constants of the backward pass.

    Args:
      z: ``[batch, seq, d_ff]``, what the block feeds to phi.
      probe: its frozen part and the adapter's residual on one in ``config.probe_stride`` positions.
      weights: ``[batch, seq]``, which tokens are real.
      activation: the gate's.
      config: strides and tolerance.

    Returns:
      ``tokens []``, ``slope [d_ff]``, ``occupancy [4, d_ff]``, ``probe_tokens []``, ``feature``, ``selection`` and
      ``linear`` ``[d_ff]``, all float32 (see `nalora_jax.selection`).
    """
    chex.assert_shape(weights, z.shape[:-1])
    z, probe, weights = lax.stop_gradient((z, probe, weights.astype(jnp.float32)))
    partition = activations.partition(activation.name, config.tolerance)
    # A kernel makes the standard statistics; where others are asked for, all are made by the plain path.
    if not config.extra and (logistic := _logistic(z, activation)) is not None:
        return _statistics_natively(z, probe, weights, logistic, partition, config)
    taken, probed = (
        selection.sampled(weights[..., None], weights, stride)[..., 0]
        for stride in (config.stride, config.probe_stride)
    )
    z = selection.sampled(z, weights, config.stride)
    stats = statistics.channel_statistics(z, taken, activation, partition, config.extra)
    return stats | statistics.probe_statistics(probe.base, probe.delta, probed, activation, config.extra)


def _statistics_natively(
    z: jax.Array,
    probe: Probe,
    weights: jax.Array,
    logistic: native.Logistic,
    partition: activations.Partition,
    config: GateStatsConfig,
) -> dict[str, jax.Array]:
    """`gate_statistics` in one pass over the tokens that it takes, wherever they lie."""
    rows = jnp.arange(weights.size // weights.shape[-1], dtype=jnp.int32).reshape(*weights.shape[:-1], 1)

    def taken(stride: int) -> tuple[jax.Array, jax.Array]:
        positions, counted = selection.sampled_positions(weights, stride)
        return (rows * weights.shape[-1] + positions).reshape(-1), counted.reshape(-1)

    (places, counted), (probed, probe_counted) = taken(config.stride), taken(config.probe_stride)
    delta = probe.factors or probe.delta.astype(jnp.float32).reshape(-1, z.shape[-1])
    sampled = native.Sampled(z.reshape(-1, z.shape[-1]), places, counted, probed, delta, probe_counted)
    sums = native.gate_statistics(sampled, logistic, (partition.z0, partition.z1))
    return _named(sums, sampled.weights, sampled.probe_weights)


def cotangent_statistics(
    delta: jax.Array, weights: jax.Array, names: Iterable[str], *, stride: int
) -> dict[str, jax.Array]:
    """Statistics of z's cotangent ``[batch, seq, d_ff]`` on the positions that `gate_statistics` takes."""
    return statistics.cotangent_statistics(selection.sampled(delta, weights, stride), _taken(weights, stride), names)


def _taken(weights: jax.Array, stride: int) -> jax.Array:
    """The weights of the positions that `nalora_jax.selection.sampled` takes."""
    return selection.sampled(weights[..., None], weights, stride)[..., 0]


def _named(sums: jax.Array, weights: jax.Array, probe_weights: jax.Array) -> dict[str, jax.Array]:
    """What `gate_statistics` returns, of the sums that native kernels make, and of the weights that they used."""
    slope, *below, feature, moved, linear = sums
    tokens = jnp.sum(weights)
    return {
        "tokens": tokens,
        "slope": slope,
        "occupancy": selection.occupancy_of(below, tokens),
        "probe_tokens": jnp.sum(probe_weights),
        "feature": feature,
        "selection": moved,
        "linear": linear,
    }


class _Block(nn.Module):
    """What both kinds of block share: dense layers with adapters, the mask, the statistics."""

    d_model: int
    d_ff: int
    activation: str = "silu"
    adapters: Adapters = Adapters()
    use_bias: bool = False
    numerics: Numerics = Numerics()
    stats: GateStatsConfig = GateStatsConfig()

    def _dense(self, name: str, features: int, numerics: Numerics | None = None) -> LoRADense:
        return LoRADense(
            features,
            self.adapters.get(name),
            use_bias=self.use_bias,
            dora=self.adapters.dora,
            dropout=self.adapters.dropout,
            numerics=self.numerics if numerics is None else numerics,
            name=name,
        )

    def _mask(self) -> jax.Array | None:
        return self.get_variable("gate_mask", "mask") if self.has_variable("gate_mask", "mask") else None

    def _write(self, name: str, value: jax.Array) -> None:
        self.sow("gate_stats", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)

    def _tapped(self, z: jax.Array, weights: jax.Array | None) -> jax.Array:
        """``z``, its cotangent measured where the collection ``gate_taps`` asks for it."""
        if self.is_initializing() or "gate_taps" not in self.variables:
            return z
        sinks = {name: self.get_variable("gate_taps", name) for name in self.variables["gate_taps"]}
        weights = jnp.ones(z.shape[:-1]) if weights is None else weights.astype(jnp.float32)
        return statistics.tap(z, sinks, weights, partial(cotangent_statistics, stride=self.stats.stride))

    def _observes(self) -> bool:
        return not self.is_initializing() and self.is_mutable_collection("gate_stats")

    def _observe(
        self,
        gate: LoRADense,
        x: jax.Array,
        z: jax.Array,
        delta: jax.Array | Hidden | None,
        scale: jax.Array | float,
        weights: jax.Array | None,
    ) -> None:
        """Writes the statistics; free when ``gate_stats`` is not mutable."""
        if not self._observes():
            return
        activation = activations.get(self.activation)
        if weights is None:
            weights = jnp.ones(z.shape[:-1], bool)
        wide = z.astype(self.numerics.result)
        probe = gate.probe(x, wide, delta, weights, self.stats.probe_stride, scale)
        for name, value in gate_statistics(z, probe, weights, activation, self.stats).items():
            self._write(name, value)

    def _check(
        self,
        gate: LoRADense,
        x: jax.Array,
        live: tuple[jax.Array, jax.Array | None, jax.Array],
        delta: jax.Array | Hidden | None,
        scale: jax.Array | float,
    ) -> None:
        """Writes the checks of ``(z, u, product)``, where asked."""
        if not (self._observes() and self.stats.check):
            return
        z, u, product = live
        # Both parts made apart from z, which may be one product: a wrong product must not hide in a difference.
        base, _ = gate(x, adapted=False)
        everywhere = jnp.ones(z.shape[:-1], bool)
        dz = gate.probe(x, z.astype(self.numerics.result), delta, everywhere, 1, scale, from_start=False).delta
        found = Live(z, base, dz, u, product)
        checks = gate_checks(found, activations.get(self.activation), self.stats.check, self.numerics.kept)
        for name, value in checks.items():
            self._write(name, value)


class GatedFFN(_Block):
    """``(phi(x W_gate) * x W_up) W_down`` with adapters on any of gate_proj, up_proj, down_proj."""

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
        """``[batch, seq, d_model]`` -> ``[batch, seq, d_model]``.

        Args:
          x: input.
          scales: the adapters' ``s`` by projection name; 1 where absent.
          token_weights: ``[batch, seq]``, which tokens the statistics count.
          deterministic: no adapter dropout.
          adapter_ids: ``[batch]``, see `LoRADense`.
        """
        scales = scales or {}
        within = self.numerics.within()
        gate, scale = self._dense("gate_proj", self.d_ff, within), scales.get("gate_proj", 1.0)
        up = Call(self._dense("up_proj", self.d_ff, within), scales.get("up_proj", 1.0))
        (z, delta), (u, _) = side_by_side(
            x, [Call(gate, scale, self._mask()), up], deterministic=deterministic, adapter_ids=adapter_ids
        )
        z = self._tapped(z, token_weights)
        down = Call(self._dense("down_proj", self.d_model), scales.get("down_proj", 1.0))
        at_once = self._at_once(Call(gate, scale), z, u, delta, down, token_weights, deterministic=deterministic)
        if at_once is not None:
            y, product = at_once
            self._check(gate, x, (z, u, product), delta, scale)
            return y
        activation = activations.get(self.activation)
        hidden, _ = gated_product(z, u, activation, self.numerics.kept, self.numerics.result)
        self._observe(gate, x, z, delta, scale, token_weights)
        self._check(gate, x, (z, u, hidden), delta, scale)
        return down.layer(hidden, down.scale, deterministic=deterministic, adapter_ids=adapter_ids)[0]

    def _at_once(
        self,
        gate: Call,
        z: jax.Array,
        u: jax.Array,
        delta: jax.Array | Hidden | None,
        down: Call,
        token_weights: jax.Array | None,
        *,
        deterministic: bool,
    ) -> tuple[jax.Array, jax.Array] | None:
        """What follows z and u in one, statistics included (`nalora_jax.nn.gated_down`), and the product of both.

        None where native kernels lack the dtype, the activation or a statistic, or an adapter is more than two factors.
        """
        numerics, activation = self.numerics, activations.get(self.activation)
        logistic = _logistic(z, activation)
        plain = numerics.fused and numerics.kept == "bfloat16" and not self.stats.extra
        plain = plain and not gate.layer.starts_elsewhere()
        if logistic is None or not plain or not is_native(math.prod(z.shape[:-1]), numerics.operand):
            return None
        gated, projection = (call.layer.projection(call.scale, deterministic=deterministic) for call in (gate, down))
        if gated is None or projection is None or isinstance(delta, Hidden) != (gated.adapter is not None):
            return None
        measured = None
        if self._observes():
            weights = jnp.ones(z.shape[:-1]) if token_weights is None else token_weights
            if isinstance(delta, Hidden) and gated.adapter is not None:
                hidden, b = delta.value.reshape(-1, delta.value.shape[-1]), gated.adapter.b
            else:
                hidden, b = jnp.zeros((weights.size, 0)), jnp.zeros((0, z.shape[-1]))
            measured = native.Measured(
                selection.sampled_weights(weights, self.stats.stride).reshape(-1),
                selection.sampled_weights(weights, self.stats.probe_stride).reshape(-1),
                hidden,
                b,
            )
        partition = activations.partition(activation.name, self.stats.tolerance)
        gating = Gating(logistic, (partition.z0, partition.z1))
        y, sums, product = gated_down(z, u, projection, gating, measured, numerics)
        if measured is not None and sums is not None:
            for name, value in _named(sums, measured.weights, measured.probe_weights).items():
                self._write(name, value)
        return down.layer.with_bias(y), product


class SelfGatedFFN(_Block):
    """``phi(x W_in) W_out`` with adapters on any of in_proj, out_proj; in_proj is the gate."""

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
        """``[batch, seq, d_model]`` -> ``[batch, seq, d_model]``; arguments as in `GatedFFN`."""
        scales = scales or {}
        options = {"deterministic": deterministic, "adapter_ids": adapter_ids}
        gate, scale = self._dense("in_proj", self.d_ff, self.numerics.within()), scales.get("in_proj", 1.0)
        z, delta = gate(x, scale, self._mask(), **options)
        z = self._tapped(z, token_weights)
        activation = activations.get(self.activation)
        hidden, _ = gated_product(z, None, activation, self.numerics.kept, self.numerics.result)
        self._observe(gate, x, z, delta, scale, token_weights)
        self._check(gate, x, (z, None, hidden), delta, scale)
        return self._dense("out_proj", self.d_model)(hidden, scales.get("out_proj", 1.0), **options)[0]
