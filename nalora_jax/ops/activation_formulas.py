"""Formulas of `nalora_jax.method.activations`: rho and rho' in float32, h - 1 in both precisions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from nalora_jax.errors import NaloraError

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
    low = cubic * ((z - head) * (z * (z + head) + head * head)) + ((TANH_CUBIC - cubic) * square + TANH_SLOPE) * z
    total = high + low
    s = lax.logistic(total)
    rho = s + s * (1 - s) * (low - (total - high))
    return rho, rho * (1 - s) * (TANH_SLOPE + 3 * TANH_CUBIC * square)


def _leading_bits(z: Array) -> Array:
    return lax.reduce_precision(z, exponent_bits=8, mantissa_bits=5)


def gelu_tanh_excess(z: Array) -> Array:
    """Returns h - 1 of the tanh form of GELU."""
    square = z * z
    return z * lax.logistic(-z * (TANH_SLOPE + TANH_CUBIC * square)) * (TANH_SLOPE + 3 * TANH_CUBIC * square)


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
    return functools.reduce(lambda total, c: total * x + c, coefficients[-2::-1], jnp.full_like(x, coefficients[-1]))


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


def _gelu_excess64(z: float) -> float:
    return z * math.exp(-0.5 * z * z) * math.sqrt(2 / math.pi) / math.erfc(-z / math.sqrt(2))


def _gelu_tanh_excess64(z: float) -> float:
    argument = TANH_SLOPE * z + TANH_CUBIC * z**3
    return z * _sigmoid64(-argument) * (TANH_SLOPE + 3 * TANH_CUBIC * z * z)


def _mish_excess64(z: float) -> float:
    e = math.exp(min(z, 40.0))
    return z * 4 * (e + 1) / ((e + 2) * (e * (e + 2) + 2))


EXCESS64: dict[str, Callable[[float], float]] = {
    "silu": lambda z: z * _sigmoid64(-z),
    "gelu": _gelu_excess64,
    "gelu_tanh": _gelu_tanh_excess64,
    "quick_gelu": lambda z: QUICK_SLOPE * z * _sigmoid64(-QUICK_SLOPE * z),
    "mish": _mish_excess64,
}
SINGLE_DEGREE = {"relu": 1.0, "relu2": 2.0, "identity": 1.0}


# --- The partition, by bisection of h - 1. ---

Degrees = tuple[float, float, float, float]


def cuts(name: str, tol: float, *, registered: bool) -> tuple[float, float, Degrees]:
    """Returns z0, z1 and the mean degree of each region (`nalora_jax.method.activations.partition`).

    Args:
      name: an activation in `EXCESS64`.
      tol: h - 1 at which the linear region starts.
      registered: True for a user's activation, whose h is evaluated in float32.
    """
    excess = EXCESS64[name]
    lowest = _first_below(excess, name) if registered else -20.0
    z0 = _bisect(lambda z: excess(z) + 1, lowest, 0.0)
    peak = _argmax(excess, 0.0, 10.0)
    z1 = _bisect(lambda z: tol - excess(z), peak, 700.0) if excess(peak) > tol else 0.0
    bounds = ((z0 - 8, z0), (z0, 0.0), (0.0, z1), (z1, z1 + 8))
    inverted, contracting, expanding, linear = (1 + _normal_mean(excess, *b) for b in bounds)
    return z0, z1, (inverted, contracting, expanding, linear)


def _first_below(excess: Callable[[float], float], name: str) -> float:
    """Returns the first of -1/4, -1/2, ... with h < 0; farther out rho underflows in float32."""
    for quarter in range(1, 81):
        if excess(-quarter / 4) < -1:
            return -quarter / 4
    raise NaloraError(
        f"activation {name!r}",
        expected="phi to fall somewhere below 0, as that of a self-gated activation does",
        found="no such place above -20",
        remedy="register it with self_gated=False",
    )


def _bisect(f: Callable[[float], float], low: float, high: float) -> float:
    """Returns the root of an f that is negative at ``low`` and positive at ``high``."""
    while True:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            return middle
        low, high = (middle, high) if f(middle) < 0 else (low, middle)


def _argmax(f: Callable[[float], float], low: float, high: float) -> float:
    """Returns the maximum of a unimodal f, by ternary search."""
    for _ in range(100):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if f(left) < f(right) else (low, right)
    return 0.5 * (low + high)


def _normal_mean(f: Callable[[float], float], low: float, high: float, points: int = 500) -> float:
    """Returns the mean of f over [low, high] under N(0, 1), by the midpoint rule; 0 if empty."""
    if high <= low:
        return 0.0
    nodes = [low + (high - low) * (i + 0.5) / points for i in range(points)]
    weights = [math.exp(-0.5 * (z * z - low * low)) for z in nodes]
    return sum(w * f(z) for w, z in zip(weights, nodes, strict=True)) / sum(weights)
