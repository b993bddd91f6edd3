"""The checks of ``--debug.check-gates``: the gate-compensation identity in a live step.

A check of a block is the ratio of an error to its allowance, both summed over tokens, at its largest
over channels. A ratio above 1 is a fault:

    check_preactivation   z = x W + s (x A) B, with both terms computed separately
    check_identity        phi(z) - phi(z - dz) = F + S, and phi(z) = rho(z) z
    check_gate            `Activation.gate` returns rho and its derivative
    check_product         the input of the down projection is phi(z) u

Identity and gate are evaluated in float32 at the program's z, so rounding cannot hide a wrong function.
Two more checks compare the sums of a step with its batch and its masks (`require_real_tokens`,
`require_gated_gradient`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from nalora_jax import trees
from nalora_jax.method import statistics
from nalora_jax.method.activations import Activation
from nalora_jax.method.low_rank import Dense, LowRankHidden, adapted_dense
from nalora_jax.method.measurement import GateStatsConfig, take_probe
from nalora_jax.method.transform import find_gates
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.reductions import by_shard, count, sampled_weights

_EPS = float(jnp.finfo(jnp.float32).eps)
_STEP = 1e-2  # of the finite difference that rho' is compared with
# Largest relative error of A's gradient: bfloat16 rounds it by 0.006, a mask of another layer changes it by 0.5.
_GRADIENT = 0.1
# Start of the message of a failed check.
BROKEN = "gate check failed"
NAMES = {
    "check_preactivation": "the gate's pre-activation is not x W + s (x A) B",
    "check_identity": "phi(z + dz) - phi(z) is not F + S: phi and rho of the activation do not match",
    "check_gate": "Activation.gate is not (rho, rho')",
    "check_product": "the gate's output is not phi(z + dz)",
}
PADDING = "its statistics are not sums over the sampled tokens, without padding"
MASK = "the gradient of A is not gated by this block's mask"


class Live(NamedTuple):
    """Arrays of a block, ``[..., d_ff]``."""

    z: Array  # the full pre-activation of the program
    base: Array  # the frozen layer's part, computed separately
    dz: Array | None  # the adapter's part, computed separately
    u: Array | None  # the factor of phi(z); None in a self-gated block
    product: Array  # phi(z) u of the program


@dataclass(frozen=True)
class GateChecks:
    """The checks with their tolerance, an error relative to ``|F| + |S|`` or to the compared value."""

    tolerance: float

    def block(
        self,
        x: Array,
        gate: Dense,
        live: tuple[Array, Array | None, Array],
        delta: Array | LowRankHidden | None,
        activation: Activation,
        numerics: Numerics,
        sharding: NamedSharding | None,
    ) -> dict[str, Array]:
        """Returns the checks of a block's ``(z, u, phi(z) u)``, by shard if ``sharding`` splits rows."""
        z, u, product = live
        # Both parts are computed apart from z: in one matmul the same fault would cancel.
        base = adapted_dense(x, gate._replace(adapter=None), numerics.within()).y
        ones = jnp.ones(z.shape[:-1], bool)
        dz = take_probe(z.astype(numerics.result), delta, ones, 1, numerics).delta
        check = partial(self.arrays, activation=activation, residual=numerics.residual)
        ratios: dict[str, Array] = by_shard(check, sharding, Live(z, base, dz, u, product))
        return ratios

    def arrays(self, live: Live, activation: Activation, residual: str) -> dict[str, Array]:
        """Returns the checks of arrays: float32 scalars.

        Args:
          live: arrays of the program, without gradients.
          activation: the block's.
          residual: dtype that z and u are rounded to before the product.
        """
        live, tolerance = jax.tree.map(lax.stop_gradient, live), self.tolerance
        dtypes = (live.z.dtype, live.product.dtype, jnp.dtype(residual))
        rounding = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
        z = live.z.astype(residual).astype(jnp.float32)
        base = live.base.astype(jnp.float32)
        dz = jnp.zeros_like(z) if live.dz is None else live.dz.astype(jnp.float32)
        want = activation.phi(z)
        if live.u is not None:
            want = want * live.u.astype(residual).astype(jnp.float32)
        slack = max(rounding, 0.1 * tolerance)
        allowed = tolerance * jnp.abs(dz) + slack * (jnp.abs(base) + jnp.abs(dz) + jnp.abs(z))
        error = live.product.astype(jnp.float32) - want
        return {
            "check_preactivation": _worst(z - base - dz, allowed),
            "check_identity": _identity(z, dz, activation, tolerance),
            "check_gate": _gate(z, activation, tolerance),
            "check_product": _worst(error, slack * jnp.abs(want) + _EPS),
        }


def _identity(z: Array, dz: Array, activation: Activation, tolerance: float) -> Array:
    start = z - dz
    feature, selection = statistics.gate_decomposition(start, dz, activation)
    error = activation.phi(z) - activation.phi(start) - feature - selection
    rounding = 16 * _EPS * (jnp.abs(z) + jnp.abs(start)) + _EPS
    allowed = tolerance * (jnp.abs(feature) + jnp.abs(selection)) + rounding
    self_gated = _worst(activation.phi(z) - activation.rho(z) * z, rounding)
    return jnp.maximum(_worst(error, allowed), self_gated)


def _gate(z: Array, activation: Activation, tolerance: float) -> Array:
    (rho, drho), exact = activation.gate(z), activation.rho(z)
    smooth = jnp.ones_like(z)
    if not activation.self_gated:  # an activation with a jump at 0 has no derivative there
        smooth = (jnp.abs(z) > 2 * _STEP).astype(jnp.float32)
    smooth = smooth * (jnp.abs(z - activation.flat_above) > 2 * _STEP)  # rho has a kink there
    difference = (activation.rho(z + _STEP) - activation.rho(z - _STEP)) / (2 * _STEP)
    errors = (
        _worst(rho - exact, tolerance * jnp.abs(exact) + 16 * _EPS),
        _worst(smooth * (drho - difference), 0.01 * jnp.abs(difference) + 2e-4),
    )
    return jnp.max(jnp.stack(errors))


def _worst(error: Array, allowed: Array) -> Array:
    """Returns the largest ratio over channels of the errors to the allowances, summed over tokens."""
    sums = [jnp.sum(jnp.abs(x).reshape(-1, x.shape[-1]), axis=0) for x in (error, allowed)]
    return jnp.max(sums[0] / (sums[1] + 1e-30))


def require_sound(
    batch: Mapping[str, Array],
    lora: Any,
    masks: Mapping[str, Array],
    sums: Mapping[str, Any],
    config: GateStatsConfig,
) -> None:
    """Asserts all checks with chex; the caller must be chexified.

    It runs outside of the model, because a check inside a differentiated scan is dropped silently.

    Args:
      batch: ``[micro_batches, rows, ...]``; without ``segment_ids`` padding is not checked.
      lora: the adapters.
      masks: the weights of A's gradient by block, ``[..., d_ff]``; 1 by default.
      sums: the step's ``stats`` by block and its ``grads``, before any division.
      config: of the blocks.
    """
    stats = sums["stats"]
    for path, measured in stats.items():
        for name, meaning in NAMES.items():
            _require(jnp.maximum(measured[name] - 1.0, 0.0), path, meaning)
    if "segment_ids" in batch:
        require_real_tokens(batch["segment_ids"] > 0, stats, config)
    require_gated_gradients(trees.flatten(lora), trees.flatten(sums["grads"]), masks, find_gates(lora))


def require_real_tokens(
    real: Array, stats: Mapping[str, Mapping[str, Array]], config: GateStatsConfig
) -> None:
    """Asserts that counts and occupancy sum over the sampled tokens of ``real [..., rows, seq]`` alone.

    Experts, each of which counts its own tokens, are left out.
    """
    config = config.of_rows(real.shape[-1])
    of_gate, of_probe = (
        jnp.sum(sampled_weights(real, stride)) for stride in (config.stride, config.probe_stride)
    )
    shards = count(config.sharding) > 1
    for path, sums in stats.items():
        if sums["tokens"].ndim > 1 + shards:
            continue
        counted = {name: jnp.sum(sums[name], axis=1) if shards else sums[name] for name in sums}
        errors = (
            counted["tokens"] - of_gate,
            counted["probe_tokens"] - of_probe,
            jnp.sum(counted["occupancy"], axis=-2) - of_gate,
        )
        off = jnp.stack([jnp.max(jnp.abs(error)) for error in errors])
        _require(jnp.maximum(off - 1e-4 * of_gate, 0.0), path, PADDING)


def require_gated_gradients(
    lora: Mapping[str, Array],
    grads: Mapping[str, Array],
    masks: Mapping[str, Array],
    gates: Mapping[str, str],
) -> None:
    """Asserts ``A^T dA = dB diag(m) B^T`` for every gate: both are ``s (x A)^T (g (B * m)^T)``.

    Args:
      lora: the adapters by path, of a gate ``a [..., d_in, r]``, ``b [..., r, d_ff]`` and, in AdaLoRA,
        ``singular [..., r]``, which multiplies the columns of A.
      grads: their gradients, by the same paths.
      masks: m by block, ``[..., d_ff]``; 1 by default.
      gates: block of each gate.
    """
    exact = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    for gate, path in gates.items():
        a, b = lora[f"{gate}/a"], lora[f"{gate}/b"]
        sigma = lora.get(f"{gate}/singular", jnp.ones((*a.shape[:-2], a.shape[-1])))
        masked = b * masks[path][..., None, :] if path in masks else b
        of_a = sigma[..., :, None] * exact(jnp.swapaxes(a, -1, -2), grads[f"{gate}/a"])
        of_b = exact(grads[f"{gate}/b"], jnp.swapaxes(masked, -1, -2)) * sigma[..., None, :]
        error, size = (jnp.linalg.norm(x, axis=(-2, -1)) for x in (of_a - of_b, of_b))
        _require(jnp.maximum(error - _GRADIENT * size, 0.0), path, MASK)


def _require(excess: Array, path: str, meaning: str) -> None:
    """Asserts that ``excess`` is 0."""
    message, zeros = f"{BROKEN} in {path}: {meaning}", jnp.zeros_like(excess)
    chex.assert_trees_all_close(excess, zeros, rtol=0.0, atol=0.0, custom_message=message)
