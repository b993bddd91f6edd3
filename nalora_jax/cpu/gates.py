"""The gated product and its statistics by native kernels (`nalora_jax.cpu.native`), in one pass each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.cpu import native
from nalora_jax.cpu.implementation import usable
from nalora_jax.cpu.native import Logistic
from nalora_jax.method import activations, measurement, statistics
from nalora_jax.method import ffn as ops
from nalora_jax.method.activations import Activation
from nalora_jax.method.measurement import GateStatsConfig, Probe
from nalora_jax.ops import reductions
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import SAVED_WIDE, read_residual, save_residual


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
    return native.gate_gradient(*_read(saved), g, logistic)


def _read(saved: Any) -> tuple[jax.Array, jax.Array | None]:
    z, u = saved
    return read_residual(z, "bfloat16"), None if u is None else read_residual(u, "bfloat16")


_gated_product.defvjp(_gated_product_fwd, _gated_product_bwd)


@measurement.gate_statistics.implements("cpu")
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
