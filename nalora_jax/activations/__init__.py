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
from jax import Array

from nalora_jax.activations import formulas
from nalora_jax.errors import NaloraError
from nalora_jax.registry import Registry

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
    if name in _ALIASES:
        return _ACTIVATIONS[_ALIASES[name]]
    if isinstance(name, str) and name in _REGISTERED:
        return _REGISTERED.get(name)
    known = ", ".join(sorted({*_ALIASES, *_REGISTERED.names()}))
    raise NaloraError("activation", expected=f"one of {known}", found=repr(name))


def register_activation(name: str, *, self_gated: bool = True, degree: float = 1.0) -> Callable[[Selection], Selection]:
    """A decorator that makes an activation of a function ``z -> (rho(z), rho'(z))``, selectable by ``name``.

    The function is elementwise and written with `jax.numpy`; it is called with float32. Everything else follows from
    it: phi = z rho, its derivative, the homogeneity and the partition.

    Args:
      name: as a config.json's ``hidden_act`` has it.
      self_gated: whether rho is a smooth selection weight, for which a partition is meaningful.
      degree: the one degree of an activation that is not self-gated.

    Returns:
      A decorator that returns the function as it is.

    Raises:
      NaloraError: the name is taken, or rho' is not the derivative of rho.
    """

    def register(gate: Selection) -> Selection:
        if name in _ALIASES:
            raise NaloraError(f"activation {name!r}", expected="a name that is free", found="one of this library's")

        def excess(z: Array) -> Array:
            rho, slope = gate(z)
            return jnp.where(rho == 0, 0.0, z * slope / jnp.where(rho == 0, 1.0, rho))

        numeric = jax.jit(excess)

        def excess64(z: float) -> float:
            with jax.ensure_compile_time_eval():
                return float(numeric(jnp.float32(z)))

        if self_gated:
            _require_derivative(name, gate)
            formulas.EXCESS64[name] = excess64
        else:
            formulas.SINGLE_DEGREE[name] = degree
        _REGISTERED.add(name, _activation(name, gate, excess, self_gated=self_gated), replace=True)
        _partition.cache_clear()
        return gate

    return register


def _require_derivative(name: str, gate: Selection) -> None:
    """The second of a gate's functions is the derivative of the first, between -6 and 6."""
    with jax.ensure_compile_time_eval():
        z, step = jnp.linspace(-6.0, 6.0, 97), 1e-2
        slope = gate(z)[1]
        difference = (gate(z + step)[0] - gate(z - step)[0]) / (2 * step)
        worst = float(jnp.max(jnp.abs(slope - difference)))
    if not worst < 1e-2:
        raise NaloraError(
            f"activation {name!r}",
            expected="a function that returns rho(z) and its derivative",
            found=f"a derivative that is off by {worst:.2g}",
        )


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
    if name in formulas.SINGLE_DEGREE:
        return Partition(name, -math.inf, 0.0, (formulas.SINGLE_DEGREE[name],) * 4, meaningful=False)
    excess = formulas.EXCESS64[name]
    z0 = _bisect(lambda z: excess(z) + 1, _first_below(excess, name) if name in _REGISTERED else -20.0, 0.0)
    peak = _argmax(excess, 0.0, 10.0)
    z1 = _bisect(lambda z: tol - excess(z), peak, 700.0) if excess(peak) > tol else 0.0
    bounds = ((z0 - 8, z0), (z0, 0.0), (0.0, z1), (z1, z1 + 8))
    inverted, contracting, expanding, linear = (1 + _normal_mean(excess, low, high) for low, high in bounds)
    return Partition(name, z0, z1, (inverted, contracting, expanding, linear), meaningful=True)


def _first_below(excess: Callable[[float], float], name: str) -> float:
    """The first of 0, -1/4, -1/2, ... where h is below 0: farther out rho underflows in float32."""
    for quarter in range(1, 81):
        if excess(-quarter / 4) < -1:
            return -quarter / 4
    raise NaloraError(
        f"activation {name!r}",
        expected="phi to fall somewhere below 0, as that of a self-gated activation does",
        found="none such above -20",
        remedy="register it with self_gated=False",
    )


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

    functools.update_wrapper(gate_in_float32, gate, assigned=())  # a study's records name the file that defines a gate
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
        _activation("silu", formulas.silu, formulas.silu_excess, logistic=(1.0, 0.0)),
        _activation("gelu", formulas.gelu, formulas.gelu_excess),
        _activation(
            "gelu_tanh",
            formulas.gelu_tanh,
            formulas.gelu_tanh_excess,
            precise=formulas.gelu_tanh_precise,
            logistic=(formulas.TANH_SLOPE, formulas.TANH_CUBIC),
        ),
        _activation(
            "quick_gelu", formulas.quick_gelu, formulas.quick_gelu_excess, logistic=(formulas.QUICK_SLOPE, 0.0)
        ),
        _activation("mish", formulas.mish, formulas.mish_excess),
        _activation("relu", formulas.relu, jnp.zeros_like, self_gated=False),
        _activation("relu2", formulas.relu2, formulas.relu2_excess, self_gated=False),
        _activation("identity", formulas.identity, jnp.zeros_like, self_gated=False),
    )
}

# From outside: by `register_activation`, or an entry point whose module uses it.
_REGISTERED: Registry[Activation] = Registry("activation", "nalora_jax.activations")

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
