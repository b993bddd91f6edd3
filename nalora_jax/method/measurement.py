"""The measurement of a gated block in a live program: its channel statistics, and checks of its
arrays.

Statistics and checks read the arrays of the program that trains and change neither values nor
gradients. Statistics are taken on a sample of positions (`GateStatsConfig`). The probe splits z
into the frozen part and the adapter's part on a thinner sample.

The checks of ``--debug.check-gates`` are taken on all positions. Each is the ratio of an error to
its allowance, both summed over tokens, at its largest over channels; a ratio above 1 is a fault:

    check_preactivation   z = x W + s (x A) B, with both terms computed separately
    check_identity        phi(z) - phi(z - dz) = F + S, and phi(z) = rho(z) z
    check_gate            `Activation.gate` returns rho and its derivative
    check_product         the input of the down projection is phi(z) u

Identity and gate are evaluated in float32 at the program's z, so rounding cannot hide a wrong
function. `require_sound` asserts them, and compares the sums of a step with its batch and its
masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax

from nalora_jax.common import trees
from nalora_jax.method import activations, statistics
from nalora_jax.method.activations import Activation
from nalora_jax.method.low_rank import (
    Dense,
    LowRankHidden,
    adapted_dense,
    displacement,
    find_gates,
)
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.reductions import sample_positions, sampled_weights, sum_by_shard
from nalora_jax.ops.shardings import RowSharding
from nalora_jax.ops.storage import dot


@dataclass(frozen=True)
class GateStatsConfig:
    """The measurements of a block."""

    stride: int = (
        1  # gate statistics use one in n positions of a row (`sample_positions`)
    )
    probe_stride: int = 8  # probe statistics use one in n positions
    positions: int = (
        0  # most positions of a row: longer rows have larger strides; 0: no limit
    )
    checks: GateChecks | None = None
    # Of [batch, seq, d_model]. If it splits the rows, sums have a leading axis [shards].
    sharding: RowSharding = None

    def of_rows(self, length: int) -> GateStatsConfig:
        """Returns the configuration with the strides for rows of ``length`` positions."""
        if not self.positions:
            return self
        factor = max(1, -(-length // (self.stride * self.positions)))
        stride = factor * self.stride
        probe_stride = factor * self.probe_stride
        return replace(self, stride=stride, probe_stride=probe_stride, positions=0)


class Measurement(NamedTuple):
    """A request for statistics."""

    weights: Array  # [batch, seq], weights of the tokens
    config: GateStatsConfig
    # zeros whose gradients are the statistics (`statistics.emit`)
    taps: Mapping[str, Array]
    probe_weights: Array | None = (
        None  # [batch, seq], weights for the probe, if they differ
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The statistics of the forward pass."""
        return statistics.forward(self.taps)

    @classmethod
    def of(
        cls, weights: Array | SampledWeights, config: GateStatsConfig, taps: Any
    ) -> Measurement:
        """Returns the request for rows with these weights ``[batch, seq]``."""
        if isinstance(weights, SampledWeights):
            stride, probe_stride = weights.strides
            config = replace(config, stride=stride, probe_stride=probe_stride)
            return cls(weights.gate, config, taps, weights.probe)
        return cls(weights, config.of_rows(weights.shape[-1]), taps)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampledWeights:
    """Token weights of parts of rows, of which the sample is taken as of the whole rows."""

    every: Array  # [batch, seq]
    gate: Array  # [batch, seq], 0 at positions that the sample of the whole row does not take
    probe: Array  # the same for the probe
    # of samples that contain the rows' samples
    strides: tuple[int, int] = field(metadata={"static": True})
    length: int = field(metadata={"static": True})  # of the whole rows


# ---------------------------------------------------------------- statistics


def block_statistics(
    x: Array,
    gate: Dense,
    z: Array,
    delta: Array | LowRankHidden | None,
    activation: Activation,
    numerics: Numerics,
    measurement: Measurement,
) -> dict[str, Array]:
    """Returns sums over real tokens of a block's statistics, without gradients.

    Args:
      x: ``[batch, seq, d_model]``, the block's input.
      gate: its first layer.
      z: that layer's output ``[batch, seq, d_ff]``, the argument of phi.
      delta: the adapter's part of z, from `adapted_dense`.
      activation, numerics: the block's.
      measurement: the request.

    Returns:
      ``tokens []``, ``probe_tokens []``, ``slope [d_ff]``, ``occupancy [4, d_ff]``, ..., all
      float32 (see `nalora_jax.method.statistics`); by shard if the measurement's config has a
      sharding.
    """
    config = measurement.config
    names = measurement.names
    partition = activations.partition(activation.name)

    def sums(
        z: Array, base: Array, moved: Array, weights: Array, of_probe: Array
    ) -> dict[str, Array]:
        """Returns the sums of some rows: z for gate statistics ``[rows, seq, d_ff]``, and the parts
        of z on the probe's positions, ``base`` and ``moved``."""
        z = sample_positions(z, weights, config.stride)
        of_gate = _taken(weights, config.stride)
        of_channels = statistics.channel_statistics(
            z, of_gate, activation, partition, names
        )
        probed = _taken(of_probe, config.probe_stride)
        of_moves = statistics.probe_statistics(base, moved, probed, activation, names)
        return of_channels | of_moves

    with jax.named_scope("statistics"):
        weights = measurement.weights
        of_probe = measurement.probe_weights
        if of_probe is None:
            of_probe = weights
        stored = z.astype(numerics.result)
        stride = config.probe_stride
        base, moved = _parts(
            x, gate, stored, delta, of_probe, stride, numerics, since_start=True
        )
        chex.assert_shape(weights, z.shape[:-1])
        z = lax.stop_gradient(z)
        weights = lax.stop_gradient(weights.astype(jnp.float32))
        of_probe = lax.stop_gradient(of_probe.astype(jnp.float32))
        measured: dict[str, Array] = sum_by_shard(
            sums, config.sharding, z, base, moved, weights, of_probe
        )
        return measured


def _taken(weights: Array, stride: int) -> Array:
    """Returns the weights of the positions that `sample_positions` takes."""
    return sample_positions(weights[..., None], weights, stride)[..., 0]


def tapped(z: Array, measurement: Measurement | None) -> Array:
    """Returns ``z`` unchanged. The gradients of the measurement's cotangent taps are the statistics
    of the cotangent of z."""
    if measurement is None:
        return z
    taps = {
        name: measurement.taps[name] for name in statistics.cotangent(measurement.taps)
    }
    if not taps:
        return z
    stride = measurement.config.stride
    sharding = measurement.config.sharding

    def sums(delta: Array, weights: Array, names: Iterable[str]) -> dict[str, Array]:
        """Returns the statistics of the cotangent ``delta [batch, seq, d_ff]``, by shard."""

        def of_rows(delta: Array, weights: Array) -> dict[str, Array]:
            """Returns the statistics of some rows."""
            delta = sample_positions(delta, weights, stride)
            weights = _taken(weights, stride)
            return statistics.cotangent_statistics(delta, weights, names)

        measured: dict[str, Array] = sum_by_shard(of_rows, sharding, delta, weights)
        return measured

    return statistics.emit(z, taps, {}, measurement.weights.astype(jnp.float32), sums)


def _parts(
    x: Array,
    gate: Dense,
    z: Array,
    delta: Array | LowRankHidden | None,
    weights: Array,
    stride: int,
    numerics: Numerics,
    *,
    since_start: bool,
) -> tuple[Array, Array]:
    """Returns the frozen and the adapter's part of z on one in ``stride`` positions, without
    gradients.

    Args:
      x, gate, z, delta, numerics: see `block_statistics`; z is in the layer's dtype.
      weights: ``[batch, seq]``, 0 for padding.
      stride: 1 or more, see `reductions.sample_positions`.
      since_start: the adapter's part is its output minus its initial output. That of a plain
        adapter is ``s x (A B - A0 B0) = s (x (A - A0)) B + s (x A0) (B - B0)``, exactly 0 before
        the first update.
    """
    adapter: Any
    x, z, delta, adapter, weights = lax.stop_gradient(
        (x, z, delta, gate.adapter, weights)
    )
    z = sample_positions(z, weights, stride)
    project = partial(dot, numerics=numerics, operand=numerics.adapter)
    if delta is None:
        return z, jnp.zeros_like(z)
    from_start = since_start and adapter.start is not None
    if from_start:
        a, b, scale, *_ = adapter
        a0, b0 = adapter.start
        rows = sample_positions(x, weights, stride).reshape(-1, x.shape[-1])
        start = scale * project(rows, a0)  # [rows, r]
    if isinstance(delta, LowRankHidden):
        # [rows, r] and [r, d_ff]. Sampled after A: the layer has multiplied all of x by A, so x is
        # not read again.
        rank = delta.b.shape[0]
        left = sample_positions(delta.value, weights, stride).reshape(-1, rank)
        right = delta.b
        if from_start:
            left = jnp.concatenate([scale * project(rows, a - a0), start], 1)
            right = jnp.concatenate([b, b - b0])
        moved = project(left, right).astype(z.dtype).reshape(z.shape)
    else:
        moved = sample_positions(delta, weights, stride)
        if from_start:
            initial = project(start, b0).astype(moved.dtype).reshape(moved.shape)
            moved = displacement(moved, initial)
    return z - moved, moved


# ---------------------------------------------------------------- checks

_EPS = float(jnp.finfo(jnp.float32).eps)
_STEP = 1e-2  # of the finite difference that rho' is compared with
# Largest relative error of A's gradient: bfloat16 rounds it by 0.006, a mask of another layer
# changes it by 0.5.
_GRADIENT = 0.1
_COUNTING = 1e-4  # largest relative error of a count, from the rounding of sums
# Start of the message of a failed check.
CHECK_FAILED = "gate check failed"
CHECKS = {
    "check_preactivation": "the gate's pre-activation is not x W + s (x A) B",
    "check_identity": (
        "phi(z + dz) - phi(z) is not F + S: phi and rho of the activation do not match"
    ),
    "check_gate": "Activation.gate is not (rho, rho')",
    "check_product": "the gate's output is not phi(z + dz)",
}
_PADDING = "its statistics are not sums over the sampled tokens, without padding"
_MASK = "the gradient of A is not gated by this block's mask"


class Live(NamedTuple):
    """Arrays of a block, ``[..., d_ff]``."""

    z: Array  # the full pre-activation of the program
    base: Array  # the frozen layer's part, computed separately
    dz: Array | None  # the adapter's part, computed separately
    u: Array | None  # the factor of phi(z); None in a self-gated block
    product: Array  # phi(z) u of the program


@dataclass(frozen=True)
class GateChecks:
    """The checks with their tolerance, an error relative to ``|F| + |S|`` or to the compared
    value."""

    tolerance: float

    def block(
        self,
        x: Array,
        gate: Dense,
        live: tuple[Array, Array | None, Array],
        delta: Array | LowRankHidden | None,
        activation: Activation,
        numerics: Numerics,
        sharding: RowSharding,
    ) -> dict[str, Array]:
        """Returns the checks of a block's ``(z, u, phi(z) u)``, by shard if ``sharding`` splits
        rows."""
        z, u, product = live
        # Both parts are computed apart from z: in one matmul the same fault would cancel.
        base = adapted_dense(x, gate._replace(adapter=None), numerics.within()).y
        ones = jnp.ones(z.shape[:-1], bool)
        stored = z.astype(numerics.result)
        every = 1  # position
        _, dz = _parts(x, gate, stored, delta, ones, every, numerics, since_start=False)
        check = partial(self.arrays, activation=activation, residual=numerics.residual)
        ratios: dict[str, Array] = sum_by_shard(
            check, sharding, Live(z, base, dz, u, product)
        )
        return ratios

    def arrays(
        self, live: Live, activation: Activation, residual: str
    ) -> dict[str, Array]:
        """Returns the checks of arrays: float32 scalars.

        Args:
          live: arrays of the program, without gradients.
          activation: the block's.
          residual: dtype that z and u are rounded to before the product.
        """
        live = jax.tree.map(lax.stop_gradient, live)
        tolerance = self.tolerance
        dtypes = (live.z.dtype, live.product.dtype, jnp.dtype(residual))
        rounding = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
        z = live.z.astype(residual).astype(jnp.float32)
        base = live.base.astype(jnp.float32)
        if live.dz is None:
            dz = jnp.zeros_like(z)
        else:
            dz = live.dz.astype(jnp.float32)
        want = activation.phi(z)
        if live.u is not None:
            want = want * live.u.astype(residual).astype(jnp.float32)
        # Relative error of z and of the product that is allowed besides that of dz.
        slack = max(rounding, 0.1 * tolerance)
        size = jnp.abs(base) + jnp.abs(dz) + jnp.abs(z)
        allowed = tolerance * jnp.abs(dz) + slack * size
        error = live.product.astype(jnp.float32) - want
        return {
            "check_preactivation": _worst(z - base - dz, allowed),
            "check_identity": _identity(z, dz, activation, tolerance),
            "check_gate": _gate(z, activation, tolerance),
            "check_product": _worst(error, slack * jnp.abs(want) + _EPS),
        }


def _identity(z: Array, dz: Array, activation: Activation, tolerance: float) -> Array:
    """Returns the check that ``phi(z) - phi(z - dz) = F + S`` and that ``phi(z) = rho(z) z``,
    float32 ``[]``."""
    start = z - dz
    feature, selection = statistics.gate_decomposition(start, dz, activation)
    error = activation.phi(z) - activation.phi(start) - feature - selection
    # Sixteen units in the last place of both values, and one of 1.
    rounding = 16 * _EPS * (jnp.abs(z) + jnp.abs(start)) + _EPS
    allowed = tolerance * (jnp.abs(feature) + jnp.abs(selection)) + rounding
    self_gated = _worst(activation.phi(z) - activation.rho(z) * z, rounding)
    return jnp.maximum(_worst(error, allowed), self_gated)


def _gate(z: Array, activation: Activation, tolerance: float) -> Array:
    """Returns the check that `Activation.gate` returns rho and its derivative, float32 ``[]``.

    The derivative is compared with a finite difference, at z where rho is smooth.
    """
    rho, drho = activation.gate(z)
    exact = activation.rho(z)
    smooth = jnp.ones_like(z)
    # rho of an activation that is not self-gated may jump at 0, and has no derivative there.
    if not activation.self_gated:
        smooth = (jnp.abs(z) > 2 * _STEP).astype(jnp.float32)
    # rho has a kink at `flat_above`.
    smooth = smooth * (jnp.abs(z - activation.flat_above) > 2 * _STEP)
    above = activation.rho(z + _STEP)
    below = activation.rho(z - _STEP)
    difference = (above - below) / (2 * _STEP)
    # The error of the finite difference.
    allowed = 0.01 * jnp.abs(difference) + 2e-4
    slopes = _worst(smooth * (drho - difference), allowed)
    values = _worst(rho - exact, tolerance * jnp.abs(exact) + 16 * _EPS)
    return jnp.maximum(values, slopes)


def _worst(error: Array, allowed: Array) -> Array:
    """Returns the largest ratio, over channels, of the error to the allowed error, both summed over
    tokens as absolute values; float32 ``[]``."""
    return jnp.max(_over_tokens(error) / (_over_tokens(allowed) + 1e-30))


def _over_tokens(x: Array) -> Array:
    """Returns the sum over tokens of absolute values, ``[d_ff]`` of ``[..., d_ff]``."""
    rows = jnp.abs(x).reshape(-1, x.shape[-1])
    return jnp.sum(rows, axis=0)


def require_sound(
    batch: Mapping[str, Array],
    lora: Any,
    masks: Mapping[str, Array],
    sums: Mapping[str, Any],
    config: GateStatsConfig,
    readers: Iterable[str] = (),
) -> None:
    """Asserts all checks with chex; the caller must be chexified.

    It runs outside of the model, because a check inside a differentiated scan is dropped silently.

    Args:
      batch: arrays ``[micro_batches, rows, ...]``.
      lora: the adapters.
      masks: the weights of A's gradient by block, ``[..., d_ff]``; 1 by default.
      sums: the step's ``stats`` by block and its ``grads``, before any division.
      config: of the blocks.
      readers: paths of the blocks that read every token of the batch, whose segment is 0 in
        padding.
    """
    stats = sums["stats"]
    for path, measured in stats.items():
        for name, meaning in CHECKS.items():
            _require(measured[name] - 1.0, path, meaning)
    if readers:
        of_readers = {path: stats[path] for path in readers}
        require_real_tokens(batch["segment_ids"] > 0, of_readers, config)
    require_gated_gradients(lora, sums["grads"], masks)


def require_real_tokens(
    real: Array, stats: Mapping[str, Mapping[str, Array]], config: GateStatsConfig
) -> None:
    """Asserts that counts and occupancy are sums over the sampled real tokens, in every layer.

    Args:
      real: bool ``[..., rows, seq]``, False for padding.
      stats: sums by block and statistic, ``[layers, ...]``.
      config: of the blocks.
    """
    config = config.of_rows(real.shape[-1])
    of_gate = jnp.sum(sampled_weights(real, config.stride))
    of_probe = jnp.sum(sampled_weights(real, config.probe_stride))
    for path, sums in stats.items():
        layers, *_, d_ff = sums["occupancy"].shape
        # Over shards, and of the occupancy over regions: [layers, d_ff] and [layers].
        occupied = jnp.sum(sums["occupancy"].reshape(layers, -1, d_ff), axis=1)
        gate = jnp.sum(sums["tokens"].reshape(layers, -1), axis=1)
        probe = jnp.sum(sums["probe_tokens"].reshape(layers, -1), axis=1)
        for counted, total in ((gate, of_gate), (probe, of_probe), (occupied, of_gate)):
            excess = jnp.abs(counted - total) - _COUNTING * total
            _require(excess, path, _PADDING)


def require_gated_gradients(lora: Any, grads: Any, masks: Mapping[str, Array]) -> None:
    """Asserts ``A^T dA = dB diag(m) B^T`` for every gate: both are ``s (x A)^T (g (B * m)^T)``.

    Args:
      lora: the adapters, of a gate ``a [..., d_in, r]``, ``b [..., r, d_ff]`` and, in AdaLoRA,
        ``singular [..., r]``, which multiplies the columns of A.
      grads: their gradients.
      masks: m by block, ``[..., d_ff]``; 1 by default.
    """
    gates = find_gates(lora)
    lora = trees.flatten(lora)
    grads = trees.flatten(grads)
    exact = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    for gate, path in gates.items():
        a = lora[f"{gate}/a"]
        b = lora[f"{gate}/b"]
        da = grads[f"{gate}/a"]
        db = grads[f"{gate}/b"]
        *lead, _, rank = a.shape
        sigma = lora.get(f"{gate}/singular", jnp.ones((*lead, rank)))
        masked = b
        if path in masks:
            masked = b * masks[path][..., None, :]
        # Both sides of the equation, [..., r, r].
        of_a = sigma[..., :, None] * exact(jnp.swapaxes(a, -1, -2), da)
        of_b = exact(db, jnp.swapaxes(masked, -1, -2)) * sigma[..., None, :]
        error = jnp.linalg.norm(of_a - of_b, axis=(-2, -1))
        size = jnp.linalg.norm(of_b, axis=(-2, -1))
        _require(error - _GRADIENT * size, path, _MASK)


def _require(excess: Array, path: str, meaning: str) -> None:
    """Asserts that no element of ``excess`` is above 0; ``meaning`` is the text of the failure in
    the block at ``path``."""
    message = f"{CHECK_FAILED} in {path}: {meaning}"
    excess = jnp.maximum(excess, 0.0)
    zeros = jnp.zeros_like(excess)
    chex.assert_trees_all_close(
        excess, zeros, rtol=0.0, atol=0.0, custom_message=message
    )
