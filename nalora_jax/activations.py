"""Self-gated activations phi(z) = rho(z) * z: values, derivatives, local homogeneity and its coarse partition.

Every formula is elementwise, finite for |z| up to 1e7, and computed in float32 for narrower inputs (the result keeps
the input's dtype). phi and rho carry closed-form derivatives: ``jax.grad`` never differentiates their formulas.

Accuracy in float32 against float64: phi' within 1e-5 * |phi'| + 2^-21 * |rho| (the second term is the rounding of a sum
that vanishes at z_0), the homogeneity h within 1e-5 * |h| + 2^-21; below the smallest normal float32 a value may be 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from nalora_jax.errors import NaloraError

Elementwise = Callable[[Array], Array]
# z -> (rho(z), rho'(z)), evaluated together because they share their exponential.
Selection = Callable[[Array], tuple[Array, Array]]


@dataclass(frozen=True)
class Activation:
    """One activation and what the mechanisms need of it; all functions are elementwise and keep shape and dtype.

    ``gate(z)`` is ``(rho(z), rho'(z))`` from one exponential: phi = z rho, phi' = rho + z rho', h = 1 + z rho' / rho.
    """

    name: str
    phi: Elementwise
    rho: Elementwise
    dphi: Elementwise
    drho: Elementwise
    # h(z) = z phi'(z) / phi(z), by convention 1 where phi is identically 0.
    homogeneity: Elementwise
    gate: Selection
    # rho is a smooth selection weight, so that selection can be misaligned and a partition is meaningful.
    self_gated: bool
    # (a, b) where rho(z) = sigmoid(a z + b z^3), else None.
    logistic: tuple[float, float] | None = None


class Partition(NamedTuple):
    """Coarse effective-homogeneity partition of the line into inverted, contracting, expanding and linear regions.

    Example:
      >>> partition("silu")
      Partition(activation='silu', z0=-1.278, z1=4.485, degrees=(-0.499, 0.619, 1.192, 1.043), meaningful=True)
    """

    activation: str
    z0: float
    z1: float
    # Mean of h over each region under z ~ N(0, 1).
    degrees: tuple[float, float, float, float]
    meaningful: bool


class Regions(NamedTuple):
    """Boolean masks of z's shape, exactly one of them true at each element."""

    inverted: Array
    contracting: Array
    expanding: Array
    linear: Array


def get(name: str) -> Activation:
    """The activation of a config.json's ``hidden_act``.

    Raises:
      NaloraError: the name is unknown; the message lists the known ones.
    """
    if name not in _ALIASES:
        known = ", ".join(sorted(_ALIASES))
        raise NaloraError("activation", expected=f"one of {known}", found=repr(name))
    return _ACTIVATIONS[_ALIASES[name]]


def regions(z: Array, partition: Partition) -> Regions:
    """Which region each element of z lies in; NaN counts as linear."""
    z = _at_least_float32(z)
    below0, below, below1 = z < partition.z0, z < 0, z < partition.z1
    return Regions(below0, below & ~below0, below1 & ~below, ~below1)


def partition(name: str, tol: float = 0.05) -> Partition:
    """Cut points z0 < 0 < z1 with phi'(z0) = 0 and h(z) - 1 <= tol for all z >= z1, found by bisection in float64.

    ReLU, squared ReLU and the identity have one degree only: their partition is not meaningful (z0 = -inf, z1 = 0).

    Raises:
      NaloraError: unknown name, or a tolerance that is not above 0.
    """
    if not tol > 0:
        raise NaloraError("partition tolerance", expected="a number above 0", found=tol)
    return _partition(get(name).name, float(tol))


@functools.lru_cache(maxsize=64)
def _partition(name: str, tol: float) -> Partition:
    if name in _SINGLE_DEGREE:
        return Partition(name, -math.inf, 0.0, (_SINGLE_DEGREE[name],) * 4, meaningful=False)
    excess = _EXCESS64[name]
    z0 = _bisect(lambda z: excess(z) + 1, -20.0, 0.0)
    peak = _argmax(excess, 0.0, 10.0)
    z1 = _bisect(lambda z: tol - excess(z), peak, 700.0) if excess(peak) > tol else 0.0
    bounds = ((z0 - 8, z0), (z0, 0.0), (0.0, z1), (z1, z1 + 8))
    inverted, contracting, expanding, linear = (1 + _normal_mean(excess, low, high) for low, high in bounds)
    return Partition(name, z0, z1, (inverted, contracting, expanding, linear), meaningful=True)


def _bisect(f: Callable[[float], float], low: float, high: float) -> float:
    """The root of an f that is negative at ``low`` and positive at ``high``."""
    while True:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            return middle
        low, high = (middle, high) if f(middle) < 0 else (low, middle)


def _argmax(f: Callable[[float], float], low: float, high: float) -> float:
    """The maximum of a unimodal f, by ternary search."""
    for _ in range(100):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if f(left) < f(right) else (low, right)
    return 0.5 * (low + high)


def _normal_mean(f: Callable[[float], float], low: float, high: float, points: int = 500) -> float:
    """Mean of f over [low, high] under the standard normal density, by the midpoint rule; 0 for an empty interval."""
    nodes = [low + (high - low) * (i + 0.5) / points for i in range(points)]
    weights = [math.exp(-0.5 * (z * z - low * low)) for z in nodes]
    return sum(w * f(z) for w, z in zip(weights, nodes, strict=True)) / sum(weights) if high > low else 0.0


# --- Formulas in float32. Each `_<name>` is a Selection, each `_<name>_excess` is h - 1 = z rho' / rho. ---

_TANH_SLOPE = 2 * math.sqrt(2 / math.pi)
_TANH_CUBIC = _TANH_SLOPE * 0.044715
_QUICK_SLOPE = 1.702
_DENSITY_AT_0 = 1 / math.sqrt(2 * math.pi)
# Phi(-x) = exp(-x^2 / 2) P(x) / Q(x) for x >= 0, relative error below 6e-8: a rational minimax fit made for this module
# by reweighted least squares on [0, inf) against scipy.special.erfcx, coefficients from the constant term upwards. All
# are positive, so float32 evaluation loses nothing by cancellation.
_TAIL_P = (0.5, 0.47534456, 0.211904713, 0.0506340449, 0.00568704371)
_TAIL_Q = (1.0, 1.74857559, 1.31894819, 0.545403915, 0.126920933, 0.0142553046)


def _silu(z: Array) -> tuple[Array, Array]:
    s = lax.logistic(z)
    return s, s * (1 - s)


def _silu_excess(z: Array) -> Array:
    return z * lax.logistic(-z)


def _quick_gelu(z: Array) -> tuple[Array, Array]:
    s = lax.logistic(_QUICK_SLOPE * z)
    return s, _QUICK_SLOPE * (s * (1 - s))


def _quick_gelu_excess(z: Array) -> Array:
    return _silu_excess(_QUICK_SLOPE * z)


def _gelu_tanh(z: Array) -> tuple[Array, Array]:
    square = z * z
    s = lax.logistic(z * (_TANH_SLOPE + _TANH_CUBIC * square))
    return s, s * (1 - s) * (_TANH_SLOPE + 3 * _TANH_CUBIC * square)


def _gelu_tanh_precise(z: Array) -> tuple[Array, Array]:
    """`_gelu_tanh` whose sigmoid's argument is an unevaluated sum: rounding it costs rho 1.3e-5 in the far tail.

    The cubic's leading bits give an exact product; the remainder is small, and the error of their sum is recovered.
    """
    cubic, head, square = _leading_bits(jnp.full_like(z, _TANH_CUBIC)), _leading_bits(z), z * z
    high = cubic * (head * head * head)
    low = cubic * ((z - head) * (z * (z + head) + head * head)) + ((_TANH_CUBIC - cubic) * square + _TANH_SLOPE) * z
    total = high + low
    s = lax.logistic(total)
    rho = s + s * (1 - s) * (low - (total - high))
    return rho, rho * (1 - s) * (_TANH_SLOPE + 3 * _TANH_CUBIC * square)


def _leading_bits(z: Array) -> Array:
    return lax.reduce_precision(z, exponent_bits=8, mantissa_bits=5)


def _gelu_tanh_excess(z: Array) -> Array:
    square = z * z
    return z * lax.logistic(-z * (_TANH_SLOPE + _TANH_CUBIC * square)) * (_TANH_SLOPE + 3 * _TANH_CUBIC * square)


def _gelu(z: Array) -> tuple[Array, Array]:
    density = jnp.exp(-0.5 * (z * z))
    tail = density * _tail_ratio(z)
    return jnp.where(z > 0, 1 - tail, tail), _DENSITY_AT_0 * density


def _gelu_excess(z: Array) -> Array:
    ratio = _tail_ratio(z)
    density = jnp.exp(-0.5 * (z * z))
    # Below 0 the density cancels, so that h stays finite and accurate where phi itself underflows.
    return _DENSITY_AT_0 * z * jnp.where(z > 0, density / (1 - density * ratio), 1 / ratio)


def _tail_ratio(z: Array) -> Array:
    """Phi(-|z|) exp(z^2 / 2), a scaled complementary error function."""
    x = jnp.minimum(jnp.where(z > 0, z, -z), 1e7)
    return _polynomial(_TAIL_P, x) / _polynomial(_TAIL_Q, x)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    return functools.reduce(lambda total, c: total * x + c, coefficients[-2::-1], jnp.full_like(x, coefficients[-1]))


def _mish(z: Array) -> tuple[Array, Array]:
    # tanh(softplus(z)) = n / (n + 2) with n = e^2 + 2 e and e = exp(z); above 20 it is 1 in float32.
    e = jnp.exp(jnp.minimum(z, 20.0))
    n = e * (e + 2)
    inverse = 1 / (n + 2)
    return n * inverse, 4 * e * (e + 1) * inverse * inverse


def _mish_excess(z: Array) -> Array:
    e = jnp.exp(jnp.minimum(z, 20.0))
    return z * 4 * (e + 1) / ((e + 2) * (e * (e + 2) + 2))


def _relu(z: Array) -> tuple[Array, Array]:
    return (z > 0).astype(z.dtype), jnp.zeros_like(z)


def _relu2(z: Array) -> tuple[Array, Array]:
    return jnp.maximum(z, 0), (z > 0).astype(z.dtype)


def _relu2_excess(z: Array) -> Array:
    return (z > 0).astype(z.dtype)


def _identity(z: Array) -> tuple[Array, Array]:
    return jnp.ones_like(z), jnp.zeros_like(z)


# --- The same h - 1 for Python floats, in float64, for the partition. ---


def _sigmoid64(x: float) -> float:
    e = math.exp(-abs(x))
    return (1.0 if x >= 0 else e) / (1 + e)


def _gelu_excess64(z: float) -> float:
    return z * math.exp(-0.5 * z * z) * math.sqrt(2 / math.pi) / math.erfc(-z / math.sqrt(2))


def _gelu_tanh_excess64(z: float) -> float:
    argument = _TANH_SLOPE * z + _TANH_CUBIC * z**3
    return z * _sigmoid64(-argument) * (_TANH_SLOPE + 3 * _TANH_CUBIC * z * z)


def _mish_excess64(z: float) -> float:
    e = math.exp(min(z, 40.0))
    return z * 4 * (e + 1) / ((e + 2) * (e * (e + 2) + 2))


_EXCESS64: dict[str, Callable[[float], float]] = {
    "silu": lambda z: z * _sigmoid64(-z),
    "gelu": _gelu_excess64,
    "gelu_tanh": _gelu_tanh_excess64,
    "quick_gelu": lambda z: _QUICK_SLOPE * z * _sigmoid64(-_QUICK_SLOPE * z),
    "mish": _mish_excess64,
}
_SINGLE_DEGREE = {"relu": 1.0, "relu2": 2.0, "identity": 1.0}


# --- Assembly ---


def _at_least_float32(z: Array) -> Array:
    z = jnp.asarray(z)
    return z.astype(jnp.promote_types(z.dtype, jnp.float32))


def _in_float32(f: Elementwise) -> Elementwise:
    """``f`` evaluated in float32 (or wider), its result in the input's dtype."""
    return lambda z: f(_at_least_float32(z)).astype(jnp.result_type(z))


def _with_derivative(f: Elementwise, derivative: Elementwise) -> Elementwise:
    differentiable = jax.custom_jvp(f)
    differentiable.defjvps(lambda tangent, value, z: derivative(z) * tangent)
    return differentiable


def _derivative(gate: Selection, z: Array) -> Array:
    rho, drho = gate(z)
    return rho + z * drho


def _activation(
    name: str,
    gate: Selection,
    excess: Elementwise,
    *,
    precise: Selection | None = None,
    self_gated: bool = True,
    logistic: tuple[float, float] | None = None,
) -> Activation:
    """Assemble the functions; ``precise`` is a slower ``gate`` for those that need not be as fast as the model."""
    reference = precise or gate

    def gate_in_float32(z: Array) -> tuple[Array, Array]:
        rho, slope = gate(_at_least_float32(z))
        return rho.astype(jnp.result_type(z)), slope.astype(jnp.result_type(z))

    return Activation(
        name=name,
        phi=_with_derivative(_in_float32(lambda z: z * gate(z)[0]), _in_float32(lambda z: _derivative(gate, z))),
        rho=_with_derivative(_in_float32(lambda z: gate(z)[0]), _in_float32(lambda z: gate(z)[1])),
        dphi=_in_float32(lambda z: _derivative(reference, z)),
        drho=_in_float32(lambda z: reference(z)[1]),
        homogeneity=_in_float32(lambda z: 1 + excess(z)),
        gate=gate_in_float32,
        self_gated=self_gated,
        logistic=logistic,
    )


_ACTIVATIONS = {
    activation.name: activation
    for activation in (
        _activation("silu", _silu, _silu_excess, logistic=(1.0, 0.0)),
        _activation("gelu", _gelu, _gelu_excess),
        _activation(
            "gelu_tanh",
            _gelu_tanh,
            _gelu_tanh_excess,
            precise=_gelu_tanh_precise,
            logistic=(_TANH_SLOPE, _TANH_CUBIC),
        ),
        _activation("quick_gelu", _quick_gelu, _quick_gelu_excess, logistic=(_QUICK_SLOPE, 0.0)),
        _activation("mish", _mish, _mish_excess),
        _activation("relu", _relu, jnp.zeros_like, self_gated=False),
        _activation("relu2", _relu2, _relu2_excess, self_gated=False),
        _activation("identity", _identity, jnp.zeros_like, self_gated=False),
    )
}

# Names of transformers' ACT2FN that compute the same function up to rounding; "gelu_10" clips and is another function.
_ALIASES = {name: name for name in _ACTIVATIONS} | {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "linear": "identity",
}
