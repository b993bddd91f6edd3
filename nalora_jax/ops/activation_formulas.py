"""Formulas of `nalora_jax.models.builtin_activations`: rho and rho' in float32, h - 1 in both precisions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

# --- In float32. Each `<name>` is a function z -> (rho, rho'), each `<name>_excess` is h - 1 = z rho' / rho. ---

TANH_SLOPE = 2 * math.sqrt(2 / math.pi)
TANH_CUBIC = TANH_SLOPE * 0.044715
QUICK_SLOPE = 1.702
_DENSITY_AT_0 = 1 / math.sqrt(2 * math.pi)
# Phi(-x) = exp(-x^2 / 2) P(x) / Q(x) for x >= 0, relative error below 6e-8: a rational minimax fit,
# computed for this module by reweighted least squares on [0, inf) against scipy.special.erfcx.
# Coefficients start at the constant term. All are positive, so float32 evaluation loses no digits
# by cancellation.
_TAIL_P = (0.5, 0.47534456, 0.211904713, 0.0506340449, 0.00568704371)
_TAIL_Q = (1.0, 1.74857559, 1.31894819, 0.545403915, 0.126920933, 0.0142553046)


def silu(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho\') of SiLU."""
    s = lax.logistic(z)
    return s, s * (1 - s)


def silu_excess(z: Array) -> Array:
    """Returns h - 1 of SiLU."""
    return z * lax.logistic(-z)


def quick_gelu(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho\') of QuickGELU."""
    s = lax.logistic(QUICK_SLOPE * z)
    return s, QUICK_SLOPE * (s * (1 - s))


def quick_gelu_excess(z: Array) -> Array:
    """Returns h - 1 of QuickGELU."""
    return silu_excess(QUICK_SLOPE * z)


def clamped_swish(slope: float, limit: float) -> Callable[[Array], tuple[Array, Array]]:
    """Returns the function (rho, rho') of ``y sigmoid(slope y)`` with ``y = min(z, limit)``.

    Above the limit phi is constant, so that ``rho = phi(limit) / z``.
    """
    top = limit * _sigmoid64(slope * limit)

    def gate(z: Array) -> tuple[Array, Array]:
        s, flat, high = lax.logistic(slope * z), z > limit, jnp.maximum(z, limit)
        return jnp.where(flat, top / high, s), jnp.where(flat, -top / (high * high), slope * (s * (1 - s)))

    return gate


def clamped_swish_excess(slope: float, limit: float) -> Callable[[Array], Array]:
    """Returns the function h - 1 of the clamped swish; -1 above the limit."""
    return lambda z: jnp.where(z > limit, -1.0, silu_excess(slope * z))


def clamped_swish_excess64(slope: float, limit: float) -> Callable[[float], float]:
    """Returns `clamped_swish_excess` for a Python float, in float64."""
    return lambda z: -1.0 if z > limit else slope * z * _sigmoid64(-slope * z)


def gelu_tanh(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho\') of the tanh form of GELU."""
    square = z * z
    s = lax.logistic(z * (TANH_SLOPE + TANH_CUBIC * square))
    return s, s * (1 - s) * (TANH_SLOPE + 3 * TANH_CUBIC * square)


def gelu_tanh_precise(z: Array) -> tuple[Array, Array]:
    """Returns `gelu_tanh` with the sigmoid's argument as an unevaluated sum.

    Rounding the argument costs rho 1.3e-5 in the far tail.

    The cubic's leading bits give an exact product; the remainder is small, and the error of their sum is recovered.
    """
    cubic, head, square = _leading_bits(jnp.full_like(z, TANH_CUBIC)), _leading_bits(z), z * z
    high = cubic * (head * head * head)
    low = (
        cubic * ((z - head) * (z * (z + head) + head * head))
        + ((TANH_CUBIC - cubic) * square + TANH_SLOPE) * z
    )
    total = high + low
    s = lax.logistic(total)
    rho = s + s * (1 - s) * (low - (total - high))
    return rho, rho * (1 - s) * (TANH_SLOPE + 3 * TANH_CUBIC * square)


def _leading_bits(z: Array) -> Array:
    return lax.reduce_precision(z, exponent_bits=8, mantissa_bits=5)


def gelu_tanh_excess(z: Array) -> Array:
    """Returns h - 1 of the tanh form of GELU."""
    square = z * z
    return (
        z * lax.logistic(-z * (TANH_SLOPE + TANH_CUBIC * square)) * (TANH_SLOPE + 3 * TANH_CUBIC * square)
    )


def gelu(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho\') of GELU."""
    density = jnp.exp(-0.5 * (z * z))
    tail = density * _tail_ratio(z)
    return jnp.where(z > 0, 1 - tail, tail), _DENSITY_AT_0 * density


def gelu_excess(z: Array) -> Array:
    """Returns h - 1 of GELU."""
    ratio = _tail_ratio(z)
    density = jnp.exp(-0.5 * (z * z))
    # Below 0 the density cancels, so that h stays finite and accurate even if phi itself
    # underflows.
    return _DENSITY_AT_0 * z * jnp.where(z > 0, density / (1 - density * ratio), 1 / ratio)


def _tail_ratio(z: Array) -> Array:
    """Returns Phi(-|z|) exp(z^2 / 2), a scaled complementary error function."""
    x = jnp.minimum(jnp.where(z > 0, z, -z), 1e7)
    return _polynomial(_TAIL_P, x) / _polynomial(_TAIL_Q, x)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    return functools.reduce(
        lambda total, c: total * x + c, coefficients[-2::-1], jnp.full_like(x, coefficients[-1])
    )


def mish(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho\') of Mish."""
    # tanh(softplus(z)) = n / (n + 2) with n = e^2 + 2 e and e = exp(z); above 20 it is 1 in float32.
    e = jnp.exp(jnp.minimum(z, 20.0))
    n = e * (e + 2)
    inverse = 1 / (n + 2)
    return n * inverse, 4 * e * (e + 1) * inverse * inverse


def mish_excess(z: Array) -> Array:
    """Returns h - 1 of Mish."""
    e = jnp.exp(jnp.minimum(z, 20.0))
    return z * 4 * (e + 1) / ((e + 2) * (e * (e + 2) + 2))


def relu(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho\') of ReLU."""
    return (z > 0).astype(z.dtype), jnp.zeros_like(z)


def relu2(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho\') of squared ReLU."""
    return jnp.maximum(z, 0), (z > 0).astype(z.dtype)


def relu2_excess(z: Array) -> Array:
    """Returns h - 1 of squared ReLU."""
    return (z > 0).astype(z.dtype)


def identity(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho\') of the identity."""
    return jnp.ones_like(z), jnp.zeros_like(z)


# --- The same h - 1 for Python floats, in float64, for the partition. ---


def _sigmoid64(x: float) -> float:
    e = math.exp(-abs(x))
    return (1.0 if x >= 0 else e) / (1 + e)


def silu_excess64(z: float) -> float:
    """Returns h - 1 of SiLU in float64."""
    return z * _sigmoid64(-z)


def quick_gelu_excess64(z: float) -> float:
    """Returns h - 1 of QuickGELU in float64."""
    return silu_excess64(QUICK_SLOPE * z)


def gelu_excess64(z: float) -> float:
    """Returns h - 1 of GELU in float64."""
    return z * math.exp(-0.5 * z * z) * math.sqrt(2 / math.pi) / math.erfc(-z / math.sqrt(2))


def gelu_tanh_excess64(z: float) -> float:
    """Returns h - 1 of the tanh form of GELU in float64."""
    argument = TANH_SLOPE * z + TANH_CUBIC * z**3
    return z * _sigmoid64(-argument) * (TANH_SLOPE + 3 * TANH_CUBIC * z * z)


def mish_excess64(z: float) -> float:
    """Returns h - 1 of Mish in float64."""
    e = math.exp(min(z, 40.0))
    return z * 4 * (e + 1) / ((e + 2) * (e * (e + 2) + 2))
