"""The checks of ``--debug.check-gates``: the gate-compensation identity on a block's live arrays.

A check is the ratio of an error to its allowance, both summed over tokens, at its largest over
channels. A ratio above 1 is a fault:

    check_preactivation   z = x W + s (x A) B, with both terms computed separately
    check_identity        phi(z) - phi(z - dz) = F + S, and phi(z) = rho(z) z
    check_gate            `Activation.gate` returns rho and its derivative
    check_product         the input of the down projection is phi(z) u

Identity and gate are evaluated in float32 at the program's z, so rounding cannot hide a wrong function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from nalora_jax.method import statistics
from nalora_jax.method.activations import Activation
from nalora_jax.method.low_rank import Dense, LowRankHidden, adapted_dense
from nalora_jax.method.measurement import take_probe
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.reductions import by_shard

_EPS = float(jnp.finfo(jnp.float32).eps)
_STEP = 1e-2  # of the finite difference that rho' is compared with
# Start of the message of a failed check.
BROKEN = "gate-compensation identity broken"
NAMES = {
    "check_preactivation": "the gate's pre-activation is not x W + s (x A) B",
    "check_identity": "phi(z + dz) - phi(z) is not F + S: phi and rho of the activation do not match",
    "check_gate": "Activation.gate is not (rho, rho')",
    "check_product": "the gate's output is not phi(z + dz)",
}


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
    (rho, drho), exact, slope = activation.gate(z), activation.rho(z), activation.drho(z)
    smooth = jnp.ones_like(z)
    if not activation.self_gated:  # an activation with a jump at 0 has no derivative there
        smooth = (jnp.abs(z) > 2 * _STEP).astype(jnp.float32)
    smooth = smooth * (jnp.abs(z - activation.flat_above) > 2 * _STEP)  # rho has a kink there
    difference = (activation.rho(z + _STEP) - activation.rho(z - _STEP)) / (2 * _STEP)
    errors = (
        _worst(rho - exact, tolerance * jnp.abs(exact) + 16 * _EPS),
        _worst(drho - slope, 10 * tolerance * jnp.abs(slope) + 1e-5),
        _worst(smooth * (drho - difference), 0.01 * jnp.abs(difference) + 2e-4),
    )
    return jnp.max(jnp.stack(errors))


def _worst(error: Array, allowed: Array) -> Array:
    """Returns the largest ratio over channels of the errors to the allowances, summed over tokens."""
    sums = [jnp.sum(jnp.abs(x).reshape(-1, x.shape[-1]), axis=0) for x in (error, allowed)]
    return jnp.max(sums[0] / (sums[1] + 1e-30))


def require_compensated(stats: Mapping[str, Mapping[str, Array]]) -> None:
    """Asserts with chex that no check of any block is above 1; the caller must be chexified.

    It runs outside of the model, because a check inside a differentiated scan is dropped silently.

    Args:
      stats: a step's statistics by block.
    """
    for path, sums in stats.items():
        for name, meaning in NAMES.items():
            excess = jnp.maximum(sums[name] - 1.0, 0.0)
            message = f"{BROKEN} in {path}: {meaning}"
            zeros = jnp.zeros_like(excess)
            chex.assert_trees_all_close(excess, zeros, rtol=0.0, atol=0.0, custom_message=message)
