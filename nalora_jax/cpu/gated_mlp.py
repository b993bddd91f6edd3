"""The gated block by native kernels (`nalora_jax.cpu.native`), as two functions.

    z = x W_gate + ...,  u = x W_up + ...    one call for both (`nalora_jax.cpu.adapted_dense`)
    h = phi(z) u,        y = h W_down + ...  `_gated_down`

The backward pass of the second function recomputes h together with the gradients of z and u, so
that z and u are read once and h is not saved. Statistics are computed in the same pass as h, in the
forward pass only: not again if a rematerialized layer recomputes h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.cpu import native
from nalora_jax.cpu.adapted_dense import NativeProducts, together
from nalora_jax.cpu.implementation import usable
from nalora_jax.cpu.matmul import is_native, native_sums
from nalora_jax.cpu.native import Logistic, Measured, Sum, Term
from nalora_jax.method import activations, statistics
from nalora_jax.method import ffn as ops
from nalora_jax.method import measurement as measurement_module
from nalora_jax.method.activations import Activation
from nalora_jax.method.low_rank import Adapted, Dense, Factors, LowRankHidden, add_bias
from nalora_jax.method.measurement import GateStatsConfig, Measurement, Probe, tapped
from nalora_jax.ops import reductions
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import SAVED_WIDE, read_residual, save_residual


@ops.gated_mlp.implements("cpu")
def gated_mlp(
    x: jax.Array,
    gate: Dense,
    up: Dense | None,
    down: Dense,
    activation: Activation,
    numerics: Numerics,
    measurement: Measurement | None = None,
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    """Computes a block of plain layers in bf16 whose gate is a logistic function."""
    within = numerics.within()
    bf16 = within.result == numerics.residual == "bfloat16" and is_native(
        math.prod(x.shape[:-1]), numerics.operand, numerics
    )
    if up is None or activation.logistic is None or not bf16:
        return NotImplemented
    elsewhere = gate.adapter is not None and gate.adapter.start is not None
    # Not implemented by the native kernel.
    if measurement is not None and (elsewhere or statistics.extra(measurement.names)):
        return NotImplemented
    if not all(layer.is_plain for layer in (gate, up, down)):
        return NotImplemented
    z, u = together(NativeProducts(within), x, [gate, up])
    z = z._replace(y=tapped(z.y, measurement))
    partition = activations.partition(activation.name)
    gating = Gating(Logistic(*activation.logistic), (partition.z0, partition.z1))
    measured = None
    if measurement is not None:
        measured = _measured(z, measurement)
    y, sums, h = gated_down(z.y, u.y, down, gating, measured, numerics)
    if measured is None or measurement is None or sums is None:
        return add_bias(y, down.bias), None
    values = _named(sums, measured.weights, measured.probe_weights)
    if (config := measurement.config).checks is not None:
        live, sharding = (z.y, u.y, h), config.sharding
        values |= config.checks.block(x, gate, live, z.delta, activation, numerics, sharding)
    return add_bias(y, down.bias), values


def _measured(z: Adapted, measurement: Measurement) -> Measured:
    """Returns the kernel's inputs for statistics.

    They have the weights of all tokens, 0 for tokens that are not sampled.
    """
    weights, config, _, of_probe = measurement
    if isinstance(z.delta, LowRankHidden):
        hidden, b = z.delta.value.reshape(-1, z.delta.value.shape[-1]), z.delta.b
    else:
        hidden, b = jnp.zeros((weights.size, 0)), jnp.zeros((0, z.y.shape[-1]))
    of_gate = reductions.sampled_weights(weights, config.stride).reshape(-1)
    if of_probe is None:
        of_probe = weights
    probed = reductions.sampled_weights(of_probe, config.probe_stride).reshape(-1)
    return Measured(of_gate, probed, hidden, b)


# ---------------------------------------------------------------- gate and down projection


class Gating(NamedTuple):
    """A gate, and the cuts between the regions of z that its statistics count."""

    logistic: Logistic
    cuts: tuple[float, float]


def gated_down(
    z: jax.Array, u: jax.Array, down: Dense, gating: Gating, measured: Measured | None, numerics: Numerics
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Computes ``h W + s (h A) B`` with ``h = phi(z) u``.

    Args:
      z, u: bf16 ``[..., d_ff]``.
      down: the layer, ``[d_ff, d_out]``, whose bias is not added; its kernel receives no gradient.
      gating: phi, and the regions to count.
      measured: inputs of the statistics, or None; constants of the backward pass.
      numerics: dtypes of operands and result; sums are float32.

    Returns:
      ``[..., d_out]`` in ``numerics.result``; the sums of `nalora_jax.cpu.native.gate_statistics`,
      or None; and h, without a gradient, for checks. An unused h has no cost.
    """
    chex.assert_equal_shape([z, u])
    chex.assert_axis_dimension(z, -1, down.kernel.shape[-2])
    factors = Factors.of(down.adapter, down.kernel)
    flat = (x.reshape(-1, x.shape[-1]) for x in (z, u))
    y, sums, h = _gated_down(*flat, factors, lax.stop_gradient(measured), gating, numerics)
    return y.reshape(*z.shape[:-1], -1), sums, h.reshape(z.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _gated_down(
    z: jax.Array, u: jax.Array, down: Factors, measured: Measured | None, gating: Gating, numerics: Numerics
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    return _gated_down_fwd(z, u, down, measured, gating, numerics)[0]


def _gated_down_fwd(
    z: jax.Array, u: jax.Array, down: Factors, measured: Measured | None, gating: Gating, numerics: Numerics
) -> tuple[tuple[jax.Array, jax.Array | None, jax.Array], tuple[Any, ...]]:
    saved = [save_residual(x, "bfloat16", numerics, SAVED_WIDE) for x in (z, u)]
    z, u = (read_residual(x, "bfloat16") for x in saved)
    if measured is None:
        h, sums = native.gate(z, u, gating.logistic), None
    else:
        h, sums = native.gate_measured(z, u, measured, *gating)
    (y,), (hidden,) = NativeProducts(numerics).forward(h, (down,))
    return (y, sums, h), (*saved, down, hidden)


def _gated_down_bwd(
    gating: Gating, numerics: Numerics, residuals: tuple[Any, ...], cotangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array, Factors, None]:
    (*saved, down, hidden), (g, *_) = residuals, cotangents
    z, u = (read_residual(x, "bfloat16") for x in saved)
    products = NativeProducts(numerics)
    if down.a is None:
        (dh,) = native_sums(numerics, Sum(products.input_terms((g,), (down,), (None,)), "bfloat16"))
        dz, du, _ = native.gate_gradient(z, u, dh, gating.logistic)
        assert du is not None
        return dz, du, Factors(None, None), None
    assert down.mask is None, "only a gate's adapter has a mask"
    (back,), _ = products.narrow((g,), (down,), (down.b,))
    exact = down.scale * back
    dh, db = native_sums(
        numerics, Sum(products.input_terms((g,), (down,), (exact,)), "bfloat16"), Sum([Term(hidden.T, g)])
    )
    dz, du, h = native.gate_gradient(z, u, dh, gating.logistic, product=True)
    assert du is not None
    assert h is not None
    (da,) = native_sums(numerics, Sum([Term(exact.T, h)]))
    return dz, du, Factors(da.T, db, jnp.zeros_like(down.scale)), None


_gated_down.defvjp(_gated_down_fwd, _gated_down_bwd)


# ---------------------------------------------------------------- unfused gate and statistics


def _logistic(z: jax.Array, activation: Activation, numerics: Numerics) -> Logistic | None:
    """Returns the gate's parameters for native kernels: bf16 and a logistic function, else None."""
    if activation.logistic is None or z.dtype != jnp.bfloat16 or not usable(numerics):
        return None
    return Logistic(*activation.logistic)


@ops.gated_product.implements("cpu")
def gated_product(
    z: jax.Array, u: jax.Array | None, activation: Activation, numerics: Numerics, up_limit: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Computes ``phi(z) u`` in one pass."""
    logistic = _logistic(z, activation, numerics)
    if logistic is None or numerics.residual != "bfloat16" or up_limit:
        return NotImplemented
    return _gated_product(z, u, logistic, numerics), activation.phi(z.astype(numerics.result))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gated_product(z: jax.Array, u: jax.Array | None, logistic: Logistic, numerics: Numerics) -> jax.Array:
    return native.gate(z, u, logistic)


def _gated_product_fwd(z: jax.Array, u: jax.Array | None, logistic: Logistic, numerics: Numerics) -> Any:
    saved = [None if x is None else save_residual(x, "bfloat16", numerics, SAVED_WIDE) for x in (z, u)]
    return native.gate(*_read(saved), logistic), saved


def _gated_product_bwd(
    logistic: Logistic, numerics: Numerics, saved: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    return native.gate_gradient(*_read(saved), g, logistic)[:2]


def _read(saved: Any) -> tuple[jax.Array, jax.Array | None]:
    z, u = saved
    return read_residual(z, "bfloat16"), None if u is None else read_residual(u, "bfloat16")


_gated_product.defvjp(_gated_product_fwd, _gated_product_bwd)


@measurement_module.gate_statistics.implements("cpu")
def gate_statistics(
    z: jax.Array,
    probe: Probe,
    weights: jax.Array,
    activation: Activation,
    config: GateStatsConfig,
    numerics: Numerics = Numerics(),  # noqa: B008
    names: tuple[str, ...] = statistics.STANDARD,
) -> dict[str, jax.Array]:
    """Computes the statistics in one pass over the sampled tokens, which need not be contiguous."""
    logistic = _logistic(z, activation, numerics)
    if logistic is None or statistics.extra(names) or probe.weights is not None:
        return NotImplemented
    chex.assert_shape(weights, z.shape[:-1])
    z, probe, weights = lax.stop_gradient((z, probe, weights.astype(jnp.float32)))
    partition = activations.partition(activation.name)
    rows = jnp.arange(weights.size // weights.shape[-1], dtype=jnp.int32).reshape(*weights.shape[:-1], 1)

    def taken(stride: int) -> tuple[jax.Array, jax.Array]:
        positions, counted = reductions.sampled_positions(weights, stride)
        return (rows * weights.shape[-1] + positions).reshape(-1), counted.reshape(-1)

    (places, counted), (probed, probe_counted) = taken(config.stride), taken(config.probe_stride)
    delta = probe.factors or probe.delta.astype(jnp.float32).reshape(-1, z.shape[-1])
    sampled = native.Sampled(z.reshape(-1, z.shape[-1]), places, counted, probed, delta, probe_counted)
    sums = native.gate_statistics(sampled, logistic, (partition.z0, partition.z1))
    return _named(sums, sampled.weights, sampled.probe_weights)


def _named(sums: jax.Array, weights: jax.Array, probe_weights: jax.Array) -> dict[str, jax.Array]:
    """Returns the result of `gate_statistics` from the native kernels' sums and token weights."""
    slope, *below, feature, linear_moved, linear = sums
    tokens = jnp.sum(weights)
    return {
        "tokens": tokens,
        "slope": slope,
        "occupancy": _occupancy(below, tokens),
        "probe_tokens": jnp.sum(probe_weights),
        "feature": feature,
        "selection": linear_moved,
        "linear": linear,
    }


def _occupancy(below: Sequence[jax.Array], tokens: jax.Array) -> jax.Array:
    """Returns tokens per region ``[4, d_ff]`` from tokens below each of three cuts, ``[d_ff]``."""
    return jnp.stack([below[0], below[1] - below[0], below[2] - below[1], tokens - below[2]])
