"""The measurement of a gated block: which arrays and positions its channel statistics are taken of.

Statistics read the arrays of the program that trains and change neither values nor gradients. They
are taken on a sample of positions (`GateStatsConfig`). The probe splits z into the frozen part and
the adapter's part on a thinner sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from nalora_jax.method import activations, statistics
from nalora_jax.method.activations import Activation
from nalora_jax.method.low_rank import Dense, LowRankHidden, moved_from
from nalora_jax.ops.dispatch import Numerics, operation
from nalora_jax.ops.matmul import dot
from nalora_jax.ops.reductions import by_shard, count, sampled

if TYPE_CHECKING:
    from nalora_jax.method.checks import GateChecks  # which imports this module


@dataclass(frozen=True)
class GateStatsConfig:
    """The measurements of a block."""

    stride: int = 1  # gate statistics use one in n positions of a row (`reductions.sampled`)
    probe_stride: int = 8  # probe statistics use one in n positions
    positions: int = 0  # most positions of a row: longer rows have larger strides; 0: no limit
    tolerance: float = 0.05  # |h - 1| at which the linear region starts
    checks: GateChecks | None = None  # of live arrays, see `nalora_jax.method.checks`
    # Of [batch, seq, d_model]. If it splits the rows, sums have a leading axis [shards].
    sharding: NamedSharding | None = None

    def of_rows(self, length: int) -> GateStatsConfig:
        """Returns the configuration with the strides for rows of ``length`` positions."""
        if not self.positions:
            return self
        factor = max(1, -(-length // (self.stride * self.positions)))
        stride, probe_stride = factor * self.stride, factor * self.probe_stride
        return replace(self, stride=stride, probe_stride=probe_stride, positions=0)


class Measurement(NamedTuple):
    """A request for statistics."""

    weights: Array  # [batch, seq], weights of the tokens
    config: GateStatsConfig
    taps: Mapping[str, Array]  # zeros whose gradients are the statistics (`statistics.emit`)
    probe_weights: Array | None = None  # [batch, seq], weights for the probe, if they differ

    @property
    def names(self) -> tuple[str, ...]:
        """The statistics of the forward pass."""
        return statistics.forward(self.taps)

    @classmethod
    def of(cls, weights: Array | SampledWeights, config: GateStatsConfig, taps: Any) -> Measurement:
        """Returns the request for rows with these weights ``[batch, seq]``."""
        if isinstance(weights, SampledWeights):
            gate, probe = weights.strides
            return cls(weights.gate, replace(config, stride=gate, probe_stride=probe), taps, weights.probe)
        return cls(weights, config.of_rows(weights.shape[-1]), taps)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampledWeights:
    """Token weights of parts of rows, of which the sample is taken as of the whole rows."""

    every: Array  # [batch, seq]
    gate: Array  # [batch, seq], 0 at positions that the sample of the whole row does not take
    probe: Array  # the same for the probe
    strides: tuple[int, int] = field(metadata={"static": True})  # of samples that contain the rows' samples
    length: int = field(metadata={"static": True})  # of the whole rows


class Probe(NamedTuple):
    """The two parts of a gate's pre-activations on one in n positions, without gradients."""

    base: Array  # [batch, seq / n, d_ff], of the frozen layer
    delta: Array  # the same shape, of the adapter
    # The two factors of delta if it is a low-rank product: float32 [tokens, r] and [r, d_ff].
    factors: tuple[Array, Array] | None = None
    weights: Array | None = None  # [batch, seq], see `Measurement.probe_weights`


# ---------------------------------------------------------------- statistics


@operation
def gate_statistics(
    z: Array,
    probe: Probe,
    weights: Array,
    activation: Activation,
    config: GateStatsConfig,
    numerics: Numerics = Numerics(),  # noqa: B008
    names: tuple[str, ...] = statistics.STANDARD,
) -> dict[str, Array]:
    """Returns sums over real tokens of the statistics, without gradients.

    Args:
      z: ``[batch, seq, d_ff]``, the argument of phi.
      probe: frozen and adapter part on one in ``config.probe_stride`` positions.
      weights: ``[batch, seq]``, 0 for padding.
      activation: the gate's.
      config: strides and tolerance.
      numerics: selects the implementation; sums are float32.
      names: statistics of the forward pass.

    Returns:
      ``tokens []``, ``probe_tokens []``, ``slope [d_ff]``, ``occupancy [4, d_ff]``, ..., all float32
      (see `nalora_jax.method.statistics`).
    """
    chex.assert_shape(weights, z.shape[:-1])
    z, probe, weights = lax.stop_gradient((z, probe, weights.astype(jnp.float32)))
    partition = activations.partition(activation.name, config.tolerance)
    of_probe = weights if probe.weights is None else probe.weights
    of_gate, probed = _taken(weights, config.stride), _taken(of_probe, config.probe_stride)
    z = sampled(z, weights, config.stride)
    sums = statistics.channel_statistics(z, of_gate, activation, partition, names)
    return sums | statistics.probe_statistics(probe.base, probe.delta, probed, activation, names)


def block_statistics(
    x: Array,
    gate: Dense,
    z: Array,
    delta: Array | LowRankHidden | None,
    activation: Activation,
    numerics: Numerics,
    measurement: Measurement,
) -> dict[str, Array]:
    """Returns `gate_statistics` of a block; by shard if the measurement's config has a sharding.

    Args:
      x: ``[batch, seq, d_model]``, the block's input.
      gate: its first layer.
      z: that layer's output ``[batch, seq, d_ff]``.
      delta: the adapter's part of z, from `adapted_dense`.
      activation, numerics: the block's.
      measurement: the request.
    """
    with jax.named_scope("statistics"):
        weights, config = measurement.weights, measurement.config
        probed = weights if measurement.probe_weights is None else measurement.probe_weights
        movement = _movement(x, gate, delta, probed, config.probe_stride, numerics)
        rounded = z.astype(numerics.result)
        probe = take_probe(rounded, delta, probed, config.probe_stride, numerics, movement)
        probe = probe._replace(weights=measurement.probe_weights)
        if count(config.sharding) > 1:
            probe = probe._replace(factors=None)  # the factors have the tokens of all shards
        options: dict[str, Any] = {"config": config, "numerics": numerics, "names": measurement.names}
        sums = partial(gate_statistics, activation=activation, **options)
        measured: dict[str, Array] = by_shard(sums, config.sharding, z, probe, weights)
        return measured


def _taken(weights: Array, stride: int) -> Array:
    """Returns the weights of the positions that `sampled` takes."""
    return sampled(weights[..., None], weights, stride)[..., 0]


def tapped(z: Array, measurement: Measurement | None) -> Array:
    """Returns ``z`` whose cotangent's statistics are the gradients of the measurement's taps for them."""
    if measurement is None or not (of_cotangent := statistics.cotangent(measurement.taps)):
        return z
    taps = {name: measurement.taps[name] for name in of_cotangent}
    stride, sharding = measurement.config.stride, measurement.config.sharding

    def row_sums(delta: Array, weights: Array, names: Iterable[str]) -> dict[str, Array]:
        delta, weights = sampled(delta, weights, stride), _taken(weights, stride)
        return statistics.cotangent_statistics(delta, weights, names)

    def sums(delta: Array, weights: Array, names: Iterable[str]) -> dict[str, Array]:
        by: dict[str, Array] = by_shard(partial(row_sums, names=names), sharding, delta, weights)
        return by

    return statistics.emit(z, taps, {}, measurement.weights.astype(jnp.float32), sums)


def take_probe(
    z: Array,
    delta: Array | LowRankHidden | None,
    weights: Array,
    stride: int,
    numerics: Numerics,
    movement: Array | tuple[Array, Array] | None = None,
) -> Probe:
    """Returns base and adapter part on one in ``stride`` positions.

    Args:
      z: ``[batch, seq, d_ff]``, a layer's output.
      delta: the adapter's part of it, from `adapted_dense`.
      weights: ``[batch, seq]``, 0 for padding.
      stride: 1 or more, see `reductions.sampled`.
      numerics: dtypes.
      movement: replaces the adapter's part on these positions; an array or its two factors.
    """
    z, delta, weights = lax.stop_gradient((z, delta, weights))
    z = sampled(z, weights, stride)
    if movement is None and delta is None:
        return Probe(z, jnp.zeros_like(z))
    # Sampled after A: the layer has multiplied all of x by A, so x is not read again.
    if movement is None and isinstance(delta, LowRankHidden):
        hidden = sampled(delta.value, weights, stride).reshape(-1, delta.b.shape[0])
        movement = hidden, delta.b
    elif movement is None:
        assert isinstance(delta, Array)
        movement = sampled(delta, weights, stride)
    if not isinstance(movement, tuple):
        return Probe(z - movement, movement)
    product = dot(*movement, numerics, operand=numerics.adapter).astype(z.dtype).reshape(z.shape)
    return Probe(z - product, product, movement)


def _movement(
    x: Array,
    gate: Dense,
    delta: Array | LowRankHidden | None,
    weights: Array,
    stride: int,
    numerics: Numerics,
) -> Array | tuple[Array, Array] | None:
    """Returns the adapter's output minus its initial output on sampled positions; None if that is 0.

    A plain adapter has the factors ``s x (A B - A0 B0) = s (x (A - A0)) B + s (x A0) (B - B0)``, whose
    product is exactly 0 before the first update.
    """
    if gate.adapter is None or gate.adapter.start is None or delta is None:
        return None
    x, (a, b, scale), (a0, b0) = lax.stop_gradient((x, gate.adapter[:3], gate.adapter.start))
    project = partial(dot, numerics=numerics, operand=numerics.adapter)
    rows = sampled(x, weights, stride).reshape(-1, x.shape[-1])
    start = scale * project(rows, a0)
    if isinstance(delta, LowRankHidden):
        left = jnp.concatenate([scale * project(rows, a - a0), start], 1)
        return left, jnp.concatenate([b, b - b0])
    current = sampled(lax.stop_gradient(delta), weights, stride)
    return moved_from(current, project(start, b0).astype(current.dtype).reshape(current.shape))
