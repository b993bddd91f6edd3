"""Self-gated activations phi(z) = rho(z) z: derivatives, local homogeneity and its partition.

Every function is elementwise, finite for |z| up to 1e7, and computed in float32 for narrower
inputs; the result has the input's dtype. phi and rho have closed-form derivatives, so ``jax.grad``
never differentiates their formulas.

Accuracy in float32 against float64: phi' within 2e-5 |phi'| + 2^-21 |rho| (the second term is the
rounding of a sum that vanishes at z0).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nalora_jax.common.registry import Registry
from nalora_jax.errors import NaloraError

Elementwise = Callable[[Array], Array]
# z -> (rho(z), rho'(z)), evaluated together because they share their exponential.
Selection = Callable[[Array], tuple[Array, Array]]


@dataclass(frozen=True)
class Activation:
    """An activation; all functions are elementwise and keep shape and dtype.

    ``gate(z)`` is ``(rho(z), rho'(z))``. From it follow phi = z rho, phi' = rho + z rho' and the
    local homogeneity h = z phi' / phi = 1 + z rho' / rho.
    """

    name: str
    phi: Elementwise
    rho: Elementwise
    gate: Selection
    # rho is a smooth selection weight; otherwise the partition has no meaning
    self_gated: bool = True
    flat_above: float = math.inf  # phi is constant above it
    degree: float = 1.0  # the only homogeneity of an activation that is not self-gated


def activation_of(name: str, gate: Selection, **options: Any) -> Activation:
    """Returns the activation of a function ``z -> (rho(z), rho'(z))``.

    ``options`` are the fields of `Activation` after ``gate``.
    """

    def gate_in_float32(z: Array) -> tuple[Array, Array]:
        rho, drho = gate(_at_least_float32(z))
        dtype = jnp.result_type(z)
        return rho.astype(dtype), drho.astype(dtype)

    def derivative(z: Array) -> Array:
        """Returns ``phi'(z)``."""
        rho, drho = gate(z)
        return rho + z * drho

    # records of studies name its file
    functools.update_wrapper(gate_in_float32, gate, assigned=())
    phi = _with_derivative(lambda z: z * gate(z)[0], derivative)
    rho = _with_derivative(lambda z: gate(z)[0], lambda z: gate(z)[1])
    return Activation(name, phi, rho, gate_in_float32, **options)


def _at_least_float32(z: Array) -> Array:
    """Returns ``z`` in float32, or in float64 if it is float64."""
    z = jnp.asarray(z)
    return z.astype(jnp.promote_types(z.dtype, jnp.float32))


def _with_derivative(f: Elementwise, derivative: Elementwise) -> Elementwise:
    """Returns the function ``f``, differentiated by the formula ``derivative``.

    Both are evaluated in float32, or in float64 if the input is; results have the input's dtype.
    """

    def in_float32(function: Elementwise) -> Elementwise:
        """Returns a function that widens its input and returns its dtype."""
        return lambda z: function(_at_least_float32(z)).astype(jnp.result_type(z))

    slope = in_float32(derivative)
    differentiable = jax.custom_jvp(in_float32(f))
    differentiable.defjvps(lambda tangent, value, z: slope(z) * tangent)
    return differentiable


# ---------------------------------------------------------------- homogeneity

_LINEAR = 1.05  # h at which the linear region starts
_FARTHEST = 700.0  # z1 is searched up to here
_TAIL = 8  # length of the part of an unbounded region that its mean is taken over
_POINTS = 1001  # of every grid, so that one program evaluates all of them


class Partition(NamedTuple):
    """Coarse partition of the line by effective homogeneity: inverted, contracting, expanding,
    linear.

    Example:
      >>> partition("silu")
      Partition(activation='silu', z0=-1.278, z1=4.485, degrees=(-0.499, 0.619, 1.192, 1.043),
      meaningful=True)
    """

    activation: str
    z0: float
    z1: float
    # means of h over each region for z ~ N(0, 1)
    degrees: tuple[float, float, float, float]
    meaningful: bool
    # phi is constant above it: h is 0, so the region is contracting
    flat_above: float = math.inf


class Regions(NamedTuple):
    """Boolean masks of z's shape; exactly one of them is true at each element."""

    inverted: Array
    contracting: Array
    expanding: Array
    linear: Array


def regions(z: Array, partition: Partition) -> Regions:
    """Returns the region of each element of z; NaN counts as linear."""
    z = _at_least_float32(z)
    inverted = z < partition.z0
    negative = z < 0
    below_z1 = z < partition.z1
    flat = z > partition.flat_above
    contracting = (negative & ~inverted) | flat
    expanding = below_z1 & ~negative & ~flat
    linear = ~below_z1 & ~flat
    return Regions(inverted, contracting, expanding, linear)


def homogeneity(z: Array, activation: Activation) -> Array:
    """Returns ``h = z phi'(z) / phi(z) = 1 + z rho'(z) / rho(z)``, and 1 if rho is 0."""
    rho, drho = activation.gate(_at_least_float32(z))
    is_zero = rho == 0
    divisor = jnp.where(is_zero, 1.0, rho)
    return 1 + jnp.where(is_zero, 0.0, z * drho / divisor)


@functools.lru_cache(maxsize=64)
def partition(name: str) -> Partition:
    """Returns the cut points z0 < 0 < z1 with phi'(z0) = 0 and h(z) - 1 <= 0.05 for all z >= z1.

    ReLU, squared ReLU and the identity have a single degree; their partition has no meaning
    (z0 = -inf, z1 = 0).

    Raises:
      NaloraError: unknown name, or a phi that does not fall anywhere below 0.
    """
    activation = get_activation(name)
    if not activation.self_gated:
        degrees = (activation.degree,) * 4
        return Partition(activation.name, -math.inf, 0.0, degrees, meaningful=False)

    compiled = jax.jit(functools.partial(homogeneity, activation=activation))

    def degree(z: np.ndarray) -> np.ndarray:
        """Returns h(z) in float64."""
        with jax.ensure_compile_time_eval():
            return np.asarray(compiled(z.astype(np.float32)), np.float64)

    below = _grid(-20.0, 0.0)
    falling = below[degree(below) < 0]  # where phi falls
    if not falling.size:
        raise NaloraError(
            f"activation {name!r}",
            expected="phi to fall somewhere below 0, as that of a self-gated activation does",
            found="no such place above -20",
            remedy="register it with self_gated=False",
        )
    z0 = _crossing(degree, falling[-1], 0.0)
    z1 = 0.0
    above = _grid(0.0, 10.0)
    if degree(above).max() > _LINEAR:
        peak = above[np.argmax(degree(above))]
        z1 = _crossing(lambda z: _LINEAR - degree(z), peak, _FARTHEST)
    degrees = (
        _normal_mean(degree, z0 - _TAIL, z0),
        _normal_mean(degree, z0, 0.0),
        _normal_mean(degree, 0.0, z1),
        _normal_mean(degree, z1, z1 + _TAIL),
    )
    return Partition(
        activation.name,
        z0,
        z1,
        degrees,
        meaningful=True,
        flat_above=activation.flat_above,
    )


def _grid(low: float, high: float) -> np.ndarray:
    """Returns `_POINTS` equidistant numbers from ``low`` to ``high``."""
    return np.linspace(low, high, _POINTS)


def _crossing(f: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> float:
    """Returns the root, to float32's precision, of an f that rises from ``low`` to ``high``."""
    for _ in range(4):  # each shortens the interval to a thousandth
        grid = _grid(low, high)
        first_positive = max(1, int(np.argmax(f(grid) > 0)))
        low = grid[first_positive - 1]
        high = grid[first_positive]
    return float(high)


def _normal_mean(
    f: Callable[[np.ndarray], np.ndarray], low: float, high: float
) -> float:
    """Returns the mean of f under N(0, 1), given that its argument is in [low, high]; 1 if the
    interval is empty.

    The midpoint rule: f is evaluated in the middle of equal parts, and weighed with the density
    there.
    """
    if high <= low:
        return 1.0
    half = (high - low) / (2 * _POINTS)  # half of a part
    z = _grid(low + half, high - half)
    # The density over that at ``low``, which does not underflow far from 0.
    density = np.exp(-0.5 * (z * z - low * low))
    return float(np.average(f(z), weights=density))


# ---------------------------------------------------------------- formulas of released models

# GELU's tanh form is z sigmoid(2 sqrt(2 / pi) (z + 0.044715 z^3)).
_TANH_SLOPE = 2 * math.sqrt(2 / math.pi)
_TANH_CUBIC = _TANH_SLOPE * 0.044715
_QUICK_SLOPE = 1.702  # QuickGELU is z sigmoid(1.702 z)
_DENSITY_AT_0 = 1 / math.sqrt(2 * math.pi)  # of N(0, 1)
# Phi(-x) = exp(-x^2 / 2) P(x) / Q(x) for x >= 0, relative error below 6e-8: a rational minimax fit,
# computed for this module by reweighted least squares on [0, inf) against scipy.special.erfcx.
# Coefficients start at the constant term. All are positive, so float32 evaluation loses no digits
# by cancellation.
_TAIL_P = (0.5, 0.47534456, 0.211904713, 0.0506340449, 0.00568704371)
_TAIL_Q = (1.0, 1.74857559, 1.31894819, 0.545403915, 0.126920933, 0.0142553046)


def _silu(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho') of SiLU."""
    s = lax.logistic(z)
    return s, s * (1 - s)


def _quick_gelu(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho') of QuickGELU."""
    s = lax.logistic(_QUICK_SLOPE * z)
    return s, _QUICK_SLOPE * (s * (1 - s))


@functools.lru_cache(maxsize=16)
def clamped_swish(slope: float, limit: float) -> Activation:
    """Returns ``y sigmoid(slope y)`` with ``y = min(z, limit)``, the gate of gpt-oss.

    Its name, e.g. "clamped_swish(1.702,7.0)", contains both numbers; they are above 0. Above the
    limit phi is constant, so that ``rho = phi(limit) / z``.
    """
    top = limit / (1 + math.exp(-slope * limit))

    def gate(z: Array) -> tuple[Array, Array]:
        """Returns (rho, rho') of the clamped activation."""
        s = lax.logistic(slope * z)
        flat = z > limit
        # z above the limit; the other values are not used, and are not 0 as divisors
        high = jnp.maximum(z, limit)
        rho = jnp.where(flat, top / high, s)
        drho = jnp.where(flat, -top / (high * high), slope * (s * (1 - s)))
        return rho, drho

    return activation_of(f"clamped_swish({slope!r},{limit!r})", gate, flat_above=limit)


def _gelu_tanh(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho') of the tanh form of GELU."""
    square = z * z
    s = lax.logistic(z * (_TANH_SLOPE + _TANH_CUBIC * square))
    return s, s * (1 - s) * (_TANH_SLOPE + 3 * _TANH_CUBIC * square)


def _gelu(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho') of GELU."""
    density = jnp.exp(-0.5 * (z * z))
    tail = density * _tail_ratio(z)
    rho = jnp.where(z > 0, 1 - tail, tail)
    return rho, _DENSITY_AT_0 * density


def _tail_ratio(z: Array) -> Array:
    """Returns Phi(-|z|) exp(z^2 / 2), a scaled complementary error function."""
    x = jnp.minimum(jnp.where(z > 0, z, -z), 1e7)
    numerator = _polynomial(_TAIL_P, x)
    return numerator / _polynomial(_TAIL_Q, x)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    """Returns the polynomial with these ``coefficients``, starting at the constant term, by
    Horner's scheme."""
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total


def _mish(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho') of Mish."""
    # tanh(softplus(z)) = n / (n + 2) with n = e^2 + 2 e and e = exp(z); above 20 it is 1 in
    # float32.
    e = jnp.exp(jnp.minimum(z, 20.0))
    n = e * (e + 2)
    inverse = 1 / (n + 2)
    return n * inverse, 4 * e * (e + 1) * inverse * inverse


def _relu(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho') of ReLU."""
    return (z > 0).astype(z.dtype), jnp.zeros_like(z)


def _relu2(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho') of squared ReLU."""
    return jnp.maximum(z, 0), (z > 0).astype(z.dtype)


def _identity(z: Array) -> tuple[Array, Array]:
    """Returns (rho, rho') of the identity."""
    return jnp.ones_like(z), jnp.zeros_like(z)


# ---------------------------------------------------------------- registry

# Names in transformers' ACT2FN of the same functions up to rounding; "gelu_10" clips and is
# different.
ACTIVATION_ALIASES = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "linear": "identity",
}
_BUILT_IN = (
    activation_of("silu", _silu),
    activation_of("gelu", _gelu),
    activation_of("gelu_tanh", _gelu_tanh),
    activation_of("quick_gelu", _quick_gelu),
    activation_of("mish", _mish),
    activation_of("relu", _relu, self_gated=False),
    activation_of("relu2", _relu2, self_gated=False, degree=2.0),
    activation_of("identity", _identity, self_gated=False),
)
ACTIVATIONS: Registry[Activation] = Registry("activation", "nalora_jax.activations")
for _activation in _BUILT_IN:
    ACTIVATIONS.add(_activation.name, _activation)
_CLAMP_LIMIT = 7.0
_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_CLAMPED = re.compile(rf"clamped_swish(?:\({_NUMBER},{_NUMBER}\))?")


def get_activation(name: str) -> Activation:
    """Returns the activation of a config.json's ``hidden_act``.

    Raises:
      NaloraError: the name is unknown; the message lists the known names.
    """
    clamped = _CLAMPED.fullmatch(str(name))
    if clamped is not None:
        # A name without numbers has those of gpt-oss.
        slope = clamped[1] or _QUICK_SLOPE
        limit = clamped[2] or _CLAMP_LIMIT
        return clamped_swish(float(slope), float(limit))
    canonical = ACTIVATION_ALIASES.get(str(name), str(name))
    if canonical in ACTIVATIONS:
        return ACTIVATIONS.get(canonical)
    known = {*ACTIVATION_ALIASES, *ACTIVATIONS.names(), "clamped_swish(slope,limit)"}
    raise NaloraError(
        "activation", expected=f"one of {', '.join(sorted(known))}", found=repr(name)
    )


def register_activation(
    name: str, *, self_gated: bool = True, degree: float = 1.0
) -> Callable[[Selection], Selection]:
    """Returns a decorator that registers a function ``z -> (rho(z), rho'(z))`` as an activation.

    The function is elementwise and uses `jax.numpy`; it is called with float32. phi = z rho, its
    derivative, the homogeneity and the partition follow from it.

    Args:
      name: value of ``hidden_act`` in a config.json.
      self_gated: True if rho is a smooth selection weight, for which a partition has a meaning.
      degree: the single degree of an activation that is not self-gated.

    Raises:
      NaloraError: the name is taken, or the second value is not the derivative of the first.
    """

    def register(gate: Selection) -> Selection:
        """Registers the decorated function and returns it."""
        built_in = [activation.name for activation in _BUILT_IN]
        if name in (*ACTIVATION_ALIASES, *built_in) or _CLAMPED.fullmatch(name):
            raise NaloraError(
                f"activation {name!r}",
                expected="a name that is free",
                found="a built-in activation",
            )
        if self_gated:
            _require_derivative(name, gate)
        activation = activation_of(name, gate, self_gated=self_gated, degree=degree)
        ACTIVATIONS.add(name, activation, replace=True)
        partition.cache_clear()
        return gate

    return register


def _require_derivative(name: str, gate: Selection) -> None:
    """Raises a NaloraError if the second value of ``gate`` differs from the finite difference of
    the first between -6 and 6."""
    with jax.ensure_compile_time_eval():
        z = jnp.linspace(-6.0, 6.0, 97)
        step = 1e-2
        above, _ = gate(z + step)
        below, _ = gate(z - step)
        difference = (above - below) / (2 * step)
        _, derivative = gate(z)
        worst = float(jnp.max(jnp.abs(derivative - difference)))
    if not worst < 1e-2:  # or NaN
        raise NaloraError(
            f"activation {name!r}",
            expected="a function that returns rho(z) and its derivative",
            found=f"a derivative that is off by {worst:.2g}",
        )
