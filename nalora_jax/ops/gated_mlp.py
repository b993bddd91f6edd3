"""A self-gated feed-forward block with adapters, and the statistics of its gate, as one operation.

    gated       z = x W_gate,  u = x W_up,  y = (phi(z) * u) W_down        (SwiGLU, GeGLU, ...)
    self-gated  z = x W_in,                 y = phi(z) W_out               (MLPs of CLIP, ViT, BERT)

Every product may carry an adapter (`nalora_jax.ops.adapted_dense`). The adapter of the first one moves the selection
weight rho(z), not only the feature; the statistics measure that, and never touch the value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from nalora_jax import activations, selection, statistics
from nalora_jax.activations import Activation
from nalora_jax.ops.adapted_dense import Dense, LowRankHidden, adapted_dense, moved_from, parallel_dense
from nalora_jax.ops.checks import Live, gate_checks
from nalora_jax.ops.matmul import dot
from nalora_jax.ops.numerics import Numerics
from nalora_jax.ops.registry import operation
from nalora_jax.ops.rounding import SAVED_WIDE, read_residual, rounded, save_residual
from nalora_jax.ops.shards import by_shard, count


@dataclass(frozen=True)
class GateStatsConfig:
    """What a block measures when it is asked for statistics."""

    stride: int = 1  # statistics on one in n positions of a row (`nalora_jax.selection.sampled`)
    probe_stride: int = 8  # misalignment on one in n positions
    positions: int = 0  # that statistics take of a row at most: strides grow with longer ones; 0: no bound
    tolerance: float = 0.05  # |h - 1| at which the linear region starts
    check: float = 0.0  # tolerance of the checks on the live arrays (`nalora_jax.ops.checks`); 0 makes none
    extra: tuple[str, ...] = ()  # statistics of the forward pass beyond the standard ones (`nalora_jax.statistics`)
    # Of [batch, seq, d_model]. If it splits the rows, every shard sums its own: arrays have a leading axis [shards].
    sharding: NamedSharding | None = None

    def of_rows(self, length: int) -> GateStatsConfig:
        """The same for rows of ``length`` positions, by strides alone.

        Sums over thousands of rows are no better for taking thousands of positions of each: what they cost grows with
        the row, what they are worth with the batch.
        """
        if not self.positions:
            return self
        grown = max(1, -(-length // (self.stride * self.positions)))
        return replace(self, stride=grown * self.stride, probe_stride=grown * self.probe_stride, positions=0)


class Measurement(NamedTuple):
    """A wish for statistics."""

    weights: jax.Array  # [batch, seq], which tokens they count
    config: GateStatsConfig
    sinks: Mapping[str, jax.Array] | None = None  # zeros whose gradients are statistics of z's cotangent


class Probe(NamedTuple):
    """The two parts of a gate's pre-activations on one in n positions; constants of the backward pass."""

    base: jax.Array  # [batch, seq / n, d_ff], the frozen layer
    delta: jax.Array  # the same shape, the adapter's part
    # What it is the product of, where it is that of two factors: float32 [tokens, r] and [r, d_ff].
    factors: tuple[jax.Array, jax.Array] | None = None


@operation
def gated_mlp(
    x: jax.Array,
    gate: Dense,
    up: Dense | None,
    down: Dense,
    activation: Activation,
    numerics: Numerics,
    measurement: Measurement | None = None,
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    """``(phi(x W_gate) * x W_up) W_down``, or without ``up`` ``phi(x W_gate) W_down``.

    Args:
      x: ``[batch, seq, d_model]``.
      gate: ``d_model -> d_ff``; the mask of its adapter shapes the gradient of its A.
      up: ``d_model -> d_ff``, or None.
      down: ``d_ff -> d_model``.
      activation: phi.
      numerics: dtypes.
      measurement: which statistics to take, or None for none.

    Returns:
      ``[batch, seq, d_model]`` in ``numerics.result``, and the statistics (`gate_statistics`, by shard where the
      measurement's config has a sharding), or None.
    """
    if up is None:
        z, delta = adapted_dense(x, gate, numerics.within())
        u = None
    else:
        (z, delta), (u, _) = parallel_dense(x, [gate, up], numerics.within())
    z = tapped(z, measurement)
    h, _ = gated_product(z, u, activation, numerics)
    measured = None
    if measurement is not None:
        measured = _statistics(x, gate, z, delta, activation, numerics, measurement)
        if measurement.config.check:
            measured |= block_checks(x, gate, (z, u, h), delta, activation, numerics, measurement.config)
    return adapted_dense(h, down, numerics).y, measured


def _statistics(
    x: jax.Array,
    gate: Dense,
    z: jax.Array,
    delta: jax.Array | LowRankHidden | None,
    activation: Activation,
    numerics: Numerics,
    measurement: Measurement,
) -> dict[str, jax.Array]:
    with jax.named_scope("statistics"):
        weights, config, _ = measurement
        moved = _movement(x, gate, delta, weights, config.probe_stride, numerics)
        probe = take_probe(z.astype(numerics.result), delta, weights, config.probe_stride, numerics, moved)
        if count(config.sharding) > 1:
            probe = probe._replace(factors=None)  # of all tokens
        sums = partial(gate_statistics, activation=activation, config=config, numerics=numerics)
        measured: dict[str, jax.Array] = by_shard(sums, config.sharding, z, probe, weights)
        return measured


def block_checks(
    x: jax.Array,
    gate: Dense,
    live: tuple[jax.Array, jax.Array | None, jax.Array],
    delta: jax.Array | LowRankHidden | None,
    activation: Activation,
    numerics: Numerics,
    config: GateStatsConfig,
) -> dict[str, jax.Array]:
    """`nalora_jax.ops.checks.gate_checks` of ``(z, u, phi(z) u)`` as a block computed them from x."""
    z, u, product = live
    # Both parts are computed apart from z, which may be one product: a fault of that must not cancel out.
    base = adapted_dense(x, gate._replace(adapter=None), numerics.within()).y
    dz = take_probe(z.astype(numerics.result), delta, jnp.ones(z.shape[:-1], bool), 1, numerics).delta
    checks = partial(gate_checks, activation=activation, tolerance=config.check, residual=numerics.residual)
    found: dict[str, jax.Array] = by_shard(checks, config.sharding, Live(z, base, dz, u, product))
    return found


# ---------------------------------------------------------------- phi(z) u


@operation
def gated_product(
    z: jax.Array, u: jax.Array | None, activation: Activation, numerics: Numerics
) -> tuple[jax.Array, jax.Array]:
    """``(a * u, a)`` with ``a = phi(z)``; without u it is 1.

    z and u are rounded to ``numerics.residual``, and nothing else is saved for the backward pass: autodiff would save
    the sigmoid and phi(z) as well.

    Args:
      z: ``[..., d_ff]``.
      u: the same, or None.
      activation: phi.
      numerics: what is computed is of ``numerics.result``.

    Returns:
      ``a * u`` in z's dtype, and ``a`` in ``numerics.result``, which has no gradient and unused costs nothing.
    """
    if u is not None:
        chex.assert_equal_shape([z, u])
    return _gated_product(z, u, activation, numerics)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gated_product(z: jax.Array, u: jax.Array | None, activation: Activation, numerics: Numerics) -> Any:
    return _gated_product_fwd(z, u, activation, numerics)[0]


def _gated_product_fwd(z: jax.Array, u: jax.Array | None, activation: Activation, numerics: Numerics) -> Any:
    save = partial(save_residual, dtype=numerics.residual, numerics=numerics, name=SAVED_WIDE)
    saved = save(z), None if u is None else save(u)
    # Of what is saved, so that a rematerialised layer computes the value again without the matrix products.
    a = activation.phi(read_residual(saved[0], numerics.result))
    product = a if saved[1] is None else a * read_residual(saved[1], numerics.result)
    return (rounded(product, z.dtype, numerics), a), (*saved, jnp.zeros((0,), z.dtype))


def _gated_product_bwd(activation: Activation, numerics: Numerics, residuals: Any, cotangents: Any) -> Any:
    z, u, like_z = residuals
    z, g = read_residual(z, numerics.result), cotangents[0].astype(numerics.result)
    rho, drho = activation.gate(z)  # one exponential for both
    slope = rho + z * drho  # phi'(z)
    if u is None:
        return rounded(g * slope, like_z.dtype, numerics), None
    dz, du = g * read_residual(u, numerics.result) * slope, g * (z * rho)
    return rounded(dz, like_z.dtype, numerics), rounded(du, like_z.dtype, numerics)


_gated_product.defvjp(_gated_product_fwd, _gated_product_bwd)


# ---------------------------------------------------------------- statistics


@operation
def gate_statistics(
    z: jax.Array,
    probe: Probe,
    weights: jax.Array,
    activation: Activation,
    config: GateStatsConfig,
    numerics: Numerics = Numerics(),  # noqa: B008
) -> dict[str, jax.Array]:
    """Sums over real tokens that the mechanisms and the metrics are made of; constants of the backward pass.

    Args:
      z: ``[batch, seq, d_ff]``, what the block feeds to phi.
      probe: its frozen part and the adapter's on one in ``config.probe_stride`` positions.
      weights: ``[batch, seq]``, which tokens are real.
      activation: the gate's.
      config: strides and tolerance.
      numerics: which implementation; sums are float32.

    Returns:
      ``tokens []``, ``slope [d_ff]``, ``occupancy [4, d_ff]``, ``probe_tokens []``, ``feature``, ``selection`` and
      ``linear`` ``[d_ff]``, all float32 (see `nalora_jax.selection`).
    """
    chex.assert_shape(weights, z.shape[:-1])
    z, probe, weights = lax.stop_gradient((z, probe, weights.astype(jnp.float32)))
    partition = activations.partition(activation.name, config.tolerance)
    taken, probed = (_taken(weights, stride) for stride in (config.stride, config.probe_stride))
    z = selection.sampled(z, weights, config.stride)
    stats = statistics.channel_statistics(z, taken, activation, partition, config.extra)
    return stats | statistics.probe_statistics(probe.base, probe.delta, probed, activation, config.extra)


def cotangent_statistics(
    delta: jax.Array, weights: jax.Array, names: Iterable[str], *, stride: int
) -> dict[str, jax.Array]:
    """Statistics of z's cotangent ``[batch, seq, d_ff]`` on the positions that `gate_statistics` takes."""
    return statistics.cotangent_statistics(selection.sampled(delta, weights, stride), _taken(weights, stride), names)


def _taken(weights: jax.Array, stride: int) -> jax.Array:
    """The weights of the positions that `nalora_jax.selection.sampled` takes."""
    return selection.sampled(weights[..., None], weights, stride)[..., 0]


def tapped(z: jax.Array, measurement: Measurement | None) -> jax.Array:
    """``z``, its cotangent measured where there are sinks for that."""
    if measurement is None or not measurement.sinks:
        return z
    config = measurement.config

    def sums(delta: jax.Array, weights: jax.Array, names: Iterable[str]) -> dict[str, jax.Array]:
        of_rows = partial(cotangent_statistics, names=names, stride=config.stride)
        found: dict[str, jax.Array] = by_shard(of_rows, config.sharding, delta, weights)
        return found

    return statistics.tap(z, measurement.sinks, measurement.weights.astype(jnp.float32), sums)


def take_probe(
    z: jax.Array,
    delta: jax.Array | LowRankHidden | None,
    weights: jax.Array,
    stride: int,
    numerics: Numerics,
    moved: jax.Array | tuple[jax.Array, jax.Array] | None = None,
) -> Probe:
    """Base and adapter apart on one in ``stride`` positions.

    Args:
      z: ``[batch, seq, d_ff]``, a layer's output.
      delta: the adapter's part of it, as `adapted_dense` returns it.
      weights: ``[batch, seq]``, which tokens are real.
      stride: 1 or more, see `nalora_jax.selection.sampled`.
      numerics: dtypes.
      moved: what counts as the adapter's part instead, on these positions; or its factors.
    """
    z, delta, weights = lax.stop_gradient((z, delta, weights))
    z = selection.sampled(z, weights, stride)
    if moved is None and delta is None:
        return Probe(z, jnp.zeros_like(z))
    # Sampled behind A, whose product with all of x the layer has computed: no further pass over x.
    if moved is None and isinstance(delta, LowRankHidden):
        moved = selection.sampled(delta.value, weights, stride).reshape(-1, delta.b.shape[0]), delta.b
    elif moved is None:
        assert isinstance(delta, jax.Array)
        moved = selection.sampled(delta, weights, stride)
    if not isinstance(moved, tuple):
        return Probe(z - moved, moved)
    factors = moved
    part = dot(*factors, numerics, operand=numerics.adapter).astype(z.dtype).reshape(z.shape)
    return Probe(z - part, part, factors)


def _movement(
    x: jax.Array,
    gate: Dense,
    delta: jax.Array | LowRankHidden | None,
    weights: jax.Array,
    stride: int,
    numerics: Numerics,
) -> jax.Array | tuple[jax.Array, jax.Array] | None:
    """How far an adapter has moved from where it started, on one in ``stride`` positions; None if it started at 0.

    As two factors where it is that of a plain adapter: ``s x (A B - A0 B0) = s (x (A - A0)) B + s (x A0) (B - B0)``,
    which is exactly 0 before the first update.
    """
    if gate.adapter is None or gate.adapter.start is None or delta is None:
        return None
    x, (a, b, scale), (a0, b0) = lax.stop_gradient((x, gate.adapter[:3], gate.adapter.start))
    project = partial(dot, numerics=numerics, operand=numerics.adapter)
    rows = selection.sampled(x, weights, stride).reshape(-1, x.shape[-1])
    start = scale * project(rows, a0)
    if isinstance(delta, LowRankHidden):
        return jnp.concatenate([scale * project(rows, a - a0), start], 1), jnp.concatenate([b, b - b0])
    whole = selection.sampled(lax.stop_gradient(delta), weights, stride)
    return moved_from(whole, project(start, b0).astype(whole.dtype).reshape(whole.shape))
