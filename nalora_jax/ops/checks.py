"""What ``--debug.check-gates`` checks on the live arrays of a gated block, channel by channel.

Four things are compared, each as a sum of errors over tokens against what is allowed; a value above 1 is a fault:

    check_preactivation   z is the frozen product and the adapter's residual, computed apart
    check_identity        phi(z) - phi(z - dz) = F + S, of phi against rho, and phi(z) = rho(z) z
    check_gate            `Activation.gate`, which the backward pass and the statistics read, is rho and its derivative
    check_product         what the down projection reads is phi(z) u

z, u and the product are those of the program that trains; identity and gate are evaluated in float32 at that z, so that
no rounding of the program hides a wrong function: an error is held against |F| + |S|, not against the largest output.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from nalora_jax import selection
from nalora_jax.activations import Activation

_EPS = float(jnp.finfo(jnp.float32).eps)
_STEP = 1e-2  # of the finite difference that rho' is compared with
NAMES = {
    "check_preactivation": "the gate's pre-activation is not x W + s (x A) B",
    "check_identity": "phi(z + dz) - phi(z) is not F + S: phi and rho of the activation do not belong together",
    "check_gate": "Activation.gate is not (rho, rho')",
    "check_product": "the gate's output is not phi(z + dz)",
}


class Live(NamedTuple):
    """Arrays of one block, ``[..., d_ff]``."""

    z: Array  # the full pre-activation, as the program holds it
    base: Array  # the frozen layer's part of it, computed apart
    dz: Array | None  # the adapter's part, computed apart
    u: Array | None  # what phi(z) is multiplied by; None where there is no such thing
    product: Array  # phi(z) u as the program computed it


def gate_checks(live: Live, activation: Activation, tolerance: float, residual: str) -> dict[str, Array]:
    """Largest error over its allowance of any channel, by check: float32 scalars, at most 1 where all is well.

    Args:
      live: arrays of the program; constants of the backward pass.
      activation: the one that the block says it uses.
      tolerance: share of ``|F| + |S|`` (or of what else is compared) that an error may have.
      residual: dtype that z and u are rounded to before the product.
    """
    live = jax.tree.map(lax.stop_gradient, live)
    rounding = max(float(jnp.finfo(dtype).eps) for dtype in (live.z.dtype, live.product.dtype, jnp.dtype(residual)))
    z = live.z.astype(residual).astype(jnp.float32)
    base = live.base.astype(jnp.float32)
    dz = jnp.zeros_like(z) if live.dz is None else live.dz.astype(jnp.float32)
    want = activation.phi(z)
    if live.u is not None:
        want = want * live.u.astype(residual).astype(jnp.float32)
    slack = max(rounding, 0.1 * tolerance)
    return {
        "check_preactivation": _worst(
            z - base - dz, tolerance * jnp.abs(dz) + slack * (jnp.abs(base) + jnp.abs(dz) + jnp.abs(z))
        ),
        "check_identity": _identity(z, dz, activation, tolerance),
        "check_gate": _gate(z, activation, tolerance),
        "check_product": _worst(live.product.astype(jnp.float32) - want, slack * jnp.abs(want) + _EPS),
    }


def _identity(z: Array, dz: Array, activation: Activation, tolerance: float) -> Array:
    start = z - dz
    feature, moved = selection.gate_decomposition(start, dz, activation)
    error = activation.phi(z) - activation.phi(start) - feature - moved
    unsure = 16 * _EPS * (jnp.abs(z) + jnp.abs(start)) + _EPS
    compensated = _worst(error, tolerance * (jnp.abs(feature) + jnp.abs(moved)) + unsure)
    return jnp.maximum(compensated, _worst(activation.phi(z) - activation.rho(z) * z, unsure))


def _gate(z: Array, activation: Activation, tolerance: float) -> Array:
    rho, drho = activation.gate(z)
    own, slope = activation.rho(z), activation.drho(z)
    # An activation that jumps at 0 has no derivative there.
    smooth = jnp.ones_like(z) if activation.self_gated else (jnp.abs(z) > 2 * _STEP).astype(jnp.float32)
    difference = (activation.rho(z + _STEP) - activation.rho(z - _STEP)) / (2 * _STEP)
    found = (
        _worst(rho - own, tolerance * jnp.abs(own) + 16 * _EPS),
        _worst(drho - slope, 10 * tolerance * jnp.abs(slope) + 1e-5),
        _worst(smooth * (drho - difference), 0.01 * jnp.abs(difference) + 2e-4),
    )
    return jnp.max(jnp.stack(found))


def _worst(error: Array, allowed: Array) -> Array:
    """Largest ratio, over channels, of the summed errors of all tokens to what is allowed them."""
    sums = [jnp.sum(jnp.abs(x).reshape(-1, x.shape[-1]), axis=0) for x in (error, allowed)]
    return jnp.max(sums[0] / (sums[1] + 1e-30))
