"""Self-gated activations phi(z) = rho(z) z: derivatives, local homogeneity and its partition.

Every function is elementwise, finite for |z| up to 1e7, and computed in float32 for narrower inputs;
the result has the input's dtype. phi and rho have closed-form derivatives, so ``jax.grad`` never
differentiates their formulas (`nalora_jax.ops.activation_formulas`).

Accuracy in float32 against float64: phi' within 1e-5 |phi'| + 2^-21 |rho| (the second term is the
rounding of a sum that vanishes at z0), h within 1e-5 |h| + 2^-21.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from nalora_jax.errors import NaloraError
from nalora_jax.ops import activation_formulas as formulas
from nalora_jax.registry import Registry

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
    # True if rho is a smooth selection weight; otherwise the partition has no meaning.
    self_gated: bool
    # (a, b) if rho(z) = sigmoid(a z + b z^3), else None.
    logistic: tuple[float, float] | None = None
    flat_above: float = math.inf  # phi is constant above it


class Partition(NamedTuple):
    """Coarse partition of the line by effective homogeneity: inverted, contracting, expanding, linear.

    Example:
      >>> partition("silu")
      Partition(activation='silu', z0=-1.278, z1=4.485, degrees=(-0.499, 0.619, 1.192, 1.043), meaningful=True)
    """

    activation: str
    z0: float
    z1: float
    # Mean of h over each region for z ~ N(0, 1).
    degrees: tuple[float, float, float, float]
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
    if name in formulas.SINGLE_DEGREE:
        degrees = (formulas.SINGLE_DEGREE[name],) * 4
        return Partition(name, -math.inf, 0.0, degrees, meaningful=False)
    z0, z1, degrees = formulas.cuts(name, tol, registered=name in REGISTERED)
    return Partition(name, z0, z1, degrees, meaningful=True, flat_above=get(name).flat_above)


# ---------------------------------------------------------------- registry


def get(name: str) -> Activation:
    """Returns the activation of a config.json's ``hidden_act``.

    Raises:
      NaloraError: the name is unknown; the message lists the known names.
    """
    if name in ALIASES:
        return _ACTIVATIONS[ALIASES[name]]
    if isinstance(name, str) and name in REGISTERED:
        return REGISTERED.get(name)
    clamped = _CLAMPED.fullmatch(name) if isinstance(name, str) else None
    if clamped is not None:
        slope, limit = clamped.groups()
        return clamped_swish(float(slope or formulas.QUICK_SLOPE), float(limit or 7.0))
    known = ", ".join(sorted({*ALIASES, *REGISTERED.names(), "clamped_swish(slope,limit)"}))
    raise NaloraError("activation", expected=f"one of {known}", found=repr(name))


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
    )


_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_CLAMPED = re.compile(rf"clamped_swish(?:\({_NUMBER},{_NUMBER}\))?")  # without numbers: gpt-oss's 1.702 and 7


@functools.lru_cache(maxsize=16)
def clamped_swish(slope: float, limit: float) -> Activation:
    """Returns ``y sigmoid(slope y)`` with ``y = min(z, limit)``, the gate of gpt-oss.

    Its name, e.g. "clamped_swish(1.702,7.0)", contains both numbers; they are above 0.
    """
    name = f"clamped_swish({slope!r},{limit!r})"
    formulas.EXCESS64[name] = formulas.clamped_swish_excess64(slope, limit)
    gate, excess = formulas.clamped_swish(slope, limit), formulas.clamped_swish_excess(slope, limit)
    return activation_of(name, gate, excess, flat_above=limit)


_TANH = (formulas.TANH_SLOPE, formulas.TANH_CUBIC)
_QUICK = (formulas.QUICK_SLOPE, 0.0)
_ACTIVATIONS = {
    activation.name: activation
    for activation in (
        activation_of("silu", formulas.silu, formulas.silu_excess, logistic=(1.0, 0.0)),
        activation_of("gelu", formulas.gelu, formulas.gelu_excess),
        activation_of(
            "gelu_tanh",
            formulas.gelu_tanh,
            formulas.gelu_tanh_excess,
            precise=formulas.gelu_tanh_precise,
            logistic=_TANH,
        ),
        activation_of("quick_gelu", formulas.quick_gelu, formulas.quick_gelu_excess, logistic=_QUICK),
        activation_of("mish", formulas.mish, formulas.mish_excess),
        activation_of("relu", formulas.relu, jnp.zeros_like, self_gated=False),
        activation_of("relu2", formulas.relu2, formulas.relu2_excess, self_gated=False),
        activation_of("identity", formulas.identity, jnp.zeros_like, self_gated=False),
    )
}

# User activations, from `nalora_jax.custom_activations` or an entry point whose module calls it.
REGISTERED: Registry[Activation] = Registry("activation", "nalora_jax.activations")

# Names in transformers' ACT2FN of the same functions up to rounding; "gelu_10" clips and is different.
ALIASES = {name: name for name in _ACTIVATIONS} | {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "linear": "identity",
}
