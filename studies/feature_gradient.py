"""A gate's adapter that follows the gradient of the feature and not of the selection.

    nalora train --import studies/feature_gradient.py --mechanisms feature_gradient   # or feature_gradient_half

With phi(z) = rho(z) z, the cotangent of the adapter's output dz is g u phi'(z), phi' = rho + z rho'. The second term is
the gradient through the selection weight. These rules multiply the cotangent that reaches A and B of the gate by

    (rho + keep z rho') / phi',  clipped to [-10, 10]

with keep = 0 (``feature_gradient``) or 1/2 (``feature_gradient_half``). Near the zero of phi' the factor has a pole,
which the product with phi' removes but a permutation does not, hence the clip. The gradient of the block's input stays
exact. ``feature_gradient_permuted`` and ``feature_gradient_half_permuted`` are the controls: the same factors on other
channels, by one permutation for all layers. The rules act on the training program alone, from the first step, and on
CPUs.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nalora_jax.errors import NaloraError
from nalora_jax.method import ffn
from nalora_jax.method.activations import Activation
from nalora_jax.method.low_rank import Dense, adapted_dense, parallel_dense
from nalora_jax.method.measurement import Measurement, block_statistics, tapped
from nalora_jax.method.rules import register_mechanism
from nalora_jax.method.statistics import Gate, Statistic, register_statistic
from nalora_jax.ops.dispatch import Implementation, Numerics

LIMIT = 10.0
_SEED = 57  # of the controls' permutation
# By name: the share of the selection's gradient that is kept, and True for a control.
RULES = {
    "feature_gradient": (0.0, False),
    "feature_gradient_permuted": (0.0, True),
    "feature_gradient_half": (0.5, False),
    "feature_gradient_half_permuted": (0.5, True),
}


def feature_factor(z: Array, rho: Array, drho: Array, keep: float) -> Array:
    """Returns ``(rho + keep z rho') / (rho + z rho')`` within ``LIMIT``, of arrays of one shape.

    1 where the denominator is 0.
    """
    whole = rho + z * drho
    ratio = (rho + keep * z * drho) / jnp.where(whole == 0, 1, whole)
    return jnp.where(whole == 0, 1, jnp.clip(ratio, -LIMIT, LIMIT))


def permutation(channels: int) -> np.ndarray:
    """Returns the controls' order of the channels, int ``[channels]``."""
    return np.random.default_rng(_SEED).permutation(channels)


def _factor(gate: Gate, name: str) -> Array:
    keep, permuted = RULES[name]
    factor = feature_factor(gate.z, gate.rho, gate.drho, keep)
    return factor[..., permutation(factor.shape[-1])] if permuted else factor


FEATURE = Implementation("feature_gradient", platform="cpu")


@FEATURE.implements(ffn.gated_mlp)
def gated_mlp(
    x: Array,
    gate: Dense,
    up: Dense | None,
    down: Dense,
    activation: Activation,
    numerics: Numerics,
    measurement: Measurement | None = None,
) -> tuple[Array, dict[str, Array] | None]:
    """Computes a block with one of the rules; other blocks are not implemented."""
    chosen = () if measurement is None else [name for name in RULES if name in measurement.taps]
    if not chosen or measurement is None or gate.adapter is None:
        return NotImplemented
    if len(chosen) > 1 or up is None or not gate.is_plain:
        expected = "one rule, on a block with gate and up projection and a plain adapter"
        raise NaloraError("mechanism feature_gradient", expected=expected, found=", ".join(chosen))
    within, adapter = numerics.within(), gate.adapter
    fixed = gate._replace(adapter=lax.stop_gradient(adapter))  # x has its exact gradient, A and B none
    (z, delta), (u, _) = parallel_dense(x, [fixed, up], within)
    z = tapped(z, measurement)
    h, _ = ffn.gated_product(z, u, activation, numerics)
    dz = adapter.scale * (lax.stop_gradient(x).astype(jnp.float32) @ adapter.a) @ adapter.b
    at = lax.stop_gradient(z).astype(jnp.float32)
    rho, drho = activation.gate(at)
    of_gate = Gate(at, rho, drho, None)  # type: ignore[arg-type]  # the partition is not used
    weight = lax.stop_gradient(u).astype(jnp.float32) * (rho + at * drho) * _factor(of_gate, chosen[0])
    h = h + (weight * (dz - lax.stop_gradient(dz))).astype(h.dtype)  # adds 0, with a gradient
    y = adapted_dense(h, down, numerics).y
    return y, block_statistics(x, gate, z, delta, activation, numerics, measurement)


def _ones(averages, context):
    """Returns 1: the rule acts on the cotangent, and its mean factor is in the log."""
    (average,) = averages.values()
    return jnp.ones_like(average)


for _name in RULES:
    register_statistic(Statistic(_name, "gate", partial(_factor, name=_name), metric=_name))
    register_mechanism(_name, statistics=(_name,), places=())(_ones)
