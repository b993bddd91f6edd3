"""Self-gated activations phi(z) = rho(z) z: derivatives, local homogeneity and its partition.

Every function is elementwise, finite for |z| up to 1e7, and computed in float32 for narrower inputs;
the result has the input's dtype. phi and rho have closed-form derivatives, so ``jax.grad`` never
differentiates their formulas (`nalora_jax.models.builtin_activations`).

Accuracy in float32 against float64: phi' within 1e-5 |phi'| + 2^-21 |rho| (the second term is the
rounding of a sum that vanishes at z0), h within 1e-5 |h| + 2^-21.
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
from jax import Array

from nalora_jax.common.registry import Registry
from nalora_jax.errors import NaloraError

Elementwise = Callable[[Array], Array]
# z -> (rho(z), rho'(z)), evaluated together because they share their exponential.
Selection = Callable[[Array], tuple[Array, Array]]


@dataclass(frozen=True)
class Activation:
    """An activation and its derivatives; all functions are elementwise and keep shape and dtype.

    ``gate(z)`` is ``(rho(z), rho'(z))``. From it follow phi = z rho, phi' = rho + z rho' and the
    local homogeneity h = z phi' / phi = 1 + z rho' / rho.
    """

    name: str
    phi: Elementwise
    rho: Elementwise
    dphi: Elementwise
    drho: Elementwise
    homogeneity: Elementwise  # by convention 1 where phi is identically 0
    gate: Selection
    self_gated: bool  # rho is a smooth selection weight; otherwise the partition has no meaning
    logistic: tuple[float, float] | None = None  # (a, b) if rho(z) = sigmoid(a z + b z^3)
    flat_above: float = math.inf  # phi is constant above it
    # h - 1 of a Python float, in float64, for the partition; None if the only degree is ``degree``.
    excess64: Callable[[float], float] | None = None
    degree: float = 1.0
    # Returns the activation with other numbers, for names such as "clamped_swish(1.702,7.0)".
    variant: Callable[..., Activation] | None = None


class Partition(NamedTuple):
    """Coarse partition of the line by effective homogeneity: inverted, contracting, expanding, linear.

    Example:
      >>> partition("silu")
      Partition(activation='silu', z0=-1.278, z1=4.485, degrees=(-0.499, 0.619, 1.192, 1.043), meaningful=True)
    """

    activation: str
    z0: float
    z1: float
    degrees: tuple[float, float, float, float]  # means of h over each region for z ~ N(0, 1)
    meaningful: bool
    flat_above: float = math.inf  # phi is constant above it: h is 0, so the region is contracting


class Regions(NamedTuple):
    """Boolean masks of z's shape; exactly one of them is true at each element."""

    inverted: Array
    contracting: Array
    expanding: Array
    linear: Array


def regions(z: Array, partition: Partition) -> Regions:
    """Returns the region of each element of z; NaN counts as linear."""
    z = _at_least_float32(z)
    below0, below, below1 = z < partition.z0, z < 0, z < partition.z1
    flat = z > partition.flat_above
    return Regions(below0, (below & ~below0) | flat, below1 & ~below & ~flat, ~below1 & ~flat)


def partition(name: str, tol: float = 0.05) -> Partition:
    """Returns the cut points z0 < 0 < z1 with phi'(z0) = 0 and h(z) - 1 <= tol for all z >= z1.

    ReLU, squared ReLU and the identity have a single degree; their partition has no meaning
    (z0 = -inf, z1 = 0).

    Args:
      name: of the activation.
      tol: |h - 1| at which the linear region starts.

    Raises:
      NaloraError: unknown name, or a tolerance that is not above 0.
    """
    if not tol > 0:
        raise NaloraError("partition tolerance", expected="a number above 0", found=tol)
    return partition_of(get(name).name, float(tol))


@functools.lru_cache(maxsize=64)
def partition_of(name: str, tol: float) -> Partition:
    """Returns `partition` of checked arguments."""
    activation = get(name)
    excess = activation.excess64
    if excess is None:
        return Partition(name, -math.inf, 0.0, (activation.degree,) * 4, meaningful=False)
    z0 = _bisect(lambda z: excess(z) + 1, _first_below(excess, name), 0.0)
    peak, z1 = _argmax(excess, 0.0, 10.0), 0.0
    if excess(peak) > tol:
        z1 = _bisect(lambda z: tol - excess(z), peak, 700.0)
    bounds = ((z0 - 8, z0), (z0, 0.0), (0.0, z1), (z1, z1 + 8))
    inverted, contracting, expanding, linear = (1 + _normal_mean(excess, *b) for b in bounds)
    degrees = (inverted, contracting, expanding, linear)
    return Partition(name, z0, z1, degrees, meaningful=True, flat_above=activation.flat_above)


def _first_below(excess: Callable[[float], float], name: str) -> float:
    """Returns the first of -1/4, -1/2, ... with h < 0; farther out rho underflows in float32."""
    for quarter in range(1, 81):
        if excess(-quarter / 4) < -1:
            return -quarter / 4
    actual, remedy = "no such place above -20", "register it with self_gated=False"
    expected = "phi to fall somewhere below 0, as that of a self-gated activation does"
    raise NaloraError(f"activation {name!r}", expected=expected, found=actual, remedy=remedy)


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


# ---------------------------------------------------------------- registry

# Names in transformers' ACT2FN of the same functions up to rounding; "gelu_10" clips and is different.
ALIASES = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "linear": "identity",
}
BUILT_IN = ("silu", "gelu", "gelu_tanh", "quick_gelu", "mish", "relu", "relu2", "identity", "clamped_swish")
_MODULES = dict.fromkeys(BUILT_IN, "nalora_jax.models.builtin_activations")
ACTIVATIONS: Registry[Activation] = Registry("activation", "nalora_jax.activations", modules=_MODULES)
_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_NAME = re.compile(rf"([^()]+)(?:\({_NUMBER},{_NUMBER}\))?")


def get(name: str) -> Activation:
    """Returns the activation of a config.json's ``hidden_act``.

    Raises:
      NaloraError: the name is unknown; the message lists the known names.
    """
    match = _NAME.fullmatch(str(name))
    if match is not None and (canonical := ALIASES.get(match[1], match[1])) in ACTIVATIONS:
        activation, numbers = ACTIVATIONS.get(canonical), match.groups()[1:]
        if numbers == (None, None):
            return activation
        if activation.variant is not None:
            return activation.variant(*map(float, numbers))
    names = ", ".join(
        sorted({*ALIASES, *ACTIVATIONS.names()} - {"clamped_swish"} | {"clamped_swish(slope,limit)"})
    )
    raise NaloraError("activation", expected=f"one of {names}", found=repr(name))


# ---------------------------------------------------------------- construction


def _at_least_float32(z: Array) -> Array:
    z = jnp.asarray(z)
    return z.astype(jnp.promote_types(z.dtype, jnp.float32))


def _in_float32(f: Elementwise) -> Elementwise:
    """Returns ``f`` evaluated in float32 or wider, with the result in the input's dtype."""
    return lambda z: f(_at_least_float32(z)).astype(jnp.result_type(z))


def _with_derivative(f: Elementwise, derivative: Elementwise) -> Elementwise:
    differentiable = jax.custom_jvp(f)
    differentiable.defjvps(lambda tangent, value, z: derivative(z) * tangent)
    return differentiable


def _derivative(gate: Selection, z: Array) -> Array:
    rho, drho = gate(z)
    return rho + z * drho


def activation_of(
    name: str,
    gate: Selection,
    excess: Elementwise,
    *,
    precise: Selection | None = None,
    self_gated: bool = True,
    logistic: tuple[float, float] | None = None,
    flat_above: float = math.inf,
    excess64: Callable[[float], float] | None = None,
    degree: float = 1.0,
    variant: Callable[..., Activation] | None = None,
) -> Activation:
    """Returns an activation; ``precise`` is a slower ``gate`` for derivatives outside of the model."""
    reference = precise or gate

    def gate_in_float32(z: Array) -> tuple[Array, Array]:
        rho, slope = gate(_at_least_float32(z))
        return rho.astype(jnp.result_type(z)), slope.astype(jnp.result_type(z))

    functools.update_wrapper(gate_in_float32, gate, assigned=())  # records of studies name its file
    value, slope = _in_float32(lambda z: z * gate(z)[0]), _in_float32(lambda z: _derivative(gate, z))
    rho, drho = _in_float32(lambda z: gate(z)[0]), _in_float32(lambda z: gate(z)[1])
    return Activation(
        name=name,
        phi=_with_derivative(value, slope),
        rho=_with_derivative(rho, drho),
        dphi=_in_float32(lambda z: _derivative(reference, z)),
        drho=_in_float32(lambda z: reference(z)[1]),
        homogeneity=_in_float32(lambda z: 1 + excess(z)),
        gate=gate_in_float32,
        self_gated=self_gated,
        logistic=logistic,
        flat_above=flat_above,
        excess64=excess64,
        degree=degree,
        variant=variant,
    )


# ---------------------------------------------------------------- registration


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
        if name in (*ALIASES, *BUILT_IN):
            actual = "a built-in activation"
            raise NaloraError(f"activation {name!r}", expected="a name that is free", found=actual)

        def excess(z: Array) -> Array:
            rho, slope = gate(z)
            return jnp.where(rho == 0, 0.0, z * slope / jnp.where(rho == 0, 1.0, rho))

        numeric = jax.jit(excess)

        def excess64(z: float) -> float:
            with jax.ensure_compile_time_eval():
                return float(numeric(jnp.float32(z)))

        if self_gated:
            _require_derivative(name, gate)
            options: dict[str, Any] = {"excess64": excess64}
        else:
            options = {"self_gated": False, "degree": degree}
        activation = activation_of(name, gate, excess, **options)
        ACTIVATIONS.add(name, activation, replace=True)
        partition_of.cache_clear()
        return gate

    return register


def _require_derivative(name: str, gate: Selection) -> None:
    """Raises a NaloraError unless ``gate`` returns rho and its derivative between -6 and 6."""
    with jax.ensure_compile_time_eval():
        z, step = jnp.linspace(-6.0, 6.0, 97), 1e-2
        difference = (gate(z + step)[0] - gate(z - step)[0]) / (2 * step)
        worst = float(jnp.max(jnp.abs(gate(z)[1] - difference)))
    if not worst < 1e-2:
        raise NaloraError(
            f"activation {name!r}",
            expected="a function that returns rho(z) and its derivative",
            found=f"a derivative that is off by {worst:.2g}",
        )
