"""The activation that a Flax model applies to a layer's output, read from the model's program.

A trace of the model tags the layer's output (`tag`). The functions of that output alone are then
evaluated on a grid, operation by operation, and compared with the registered activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from nalora_jax.errors import NaloraError
from nalora_jax.method import activations

_Values = dict[Any, Array]  # by variable of a program
_TAG = "nalora.output:"
_CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")
# Operations that leave the elements as they are.
_COPIES = (
    *("copy", "name", "reshape", "squeeze", "transpose", "broadcast_in_dim"),
    *("sharding_constraint", "optimization_barrier"),
)
_ELEMENTWISE = (
    *("abs", "add", "div", "erf", "erfc", "exp", "expm1", "ge", "gt", "integer_pow"),
    *("le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "neg", "pow"),
    *("rsqrt", "select_n", "sign", "sqrt", "square", "sub", "tanh"),
)
# Functions that differ by less are variants of a formula (both GELUs), or rounded to bfloat16.
_VARIANT = 1e-2


def tag(y: Array, path: str) -> Array:
    """Returns the output of the layer at ``path``, marked in the program."""
    return checkpoint_name(y, f"{_TAG}{path}")


def require_activation(program: ClosedJaxpr, path: str, name: str) -> None:
    """Raises an error if the program applies another registered activation to a tagged output.

    An activation that is not registered, or whose operations are not read, passes.

    Args:
      program: of the model, with the output tagged (`tag`).
      path: of the layer.
      name: the activation that the user stated.

    Raises:
      NaloraError: the model applies another activation.
    """
    with jax.ensure_compile_time_eval():
        z = jnp.linspace(-8.0, 8.0, 129)
        functions = list(_functions(program.jaxpr, f"{_TAG}{path}", z))
        if not functions or _distance(functions, name, z) < _VARIANT:
            return
        # The output itself is also that of a layer whose activation is not read.
        names = [n for n in activations.ACTIVATIONS.names() if n != "identity"]
        distances = {other: _distance(functions, other, z) for other in names}
    nearest = min(distances, key=distances.__getitem__)
    if distances[nearest] < _VARIANT:
        raise NaloraError(
            f"gates: {path}",
            expected=f"{nearest!r}, which the model applies to the output of this layer",
            found=repr(name),
        )


def _distance(functions: Sequence[Array], name: str, z: Array) -> float:
    """Returns how far the activation ``name`` is from the nearest of ``functions``, given by their
    values at ``z``: the largest difference over z."""
    phi = activations.get_activation(name).phi(z)
    return min(float(jnp.max(jnp.abs(function - phi))) for function in functions)


def _functions(jaxpr: Jaxpr, tagged: str, z: Array) -> Iterator[Array]:
    """Yields functions of a tagged output alone, as their values at ``z``.

    ``tagged`` is the name of the tag. A function ends where the program combines it with other
    values, or returns it.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name" and equation.params["name"] == tagged:
            yield from _ends(jaxpr, {equation.outvars[0]: z})
        for inner in _programs(equation.params.values()):
            yield from _functions(inner, tagged, z)


def _ends(jaxpr: Jaxpr, values: _Values) -> Iterator[Array]:
    """Yields the values, computed from the given ``values`` alone, that the program combines with
    others or returns."""
    for equation in jaxpr.eqns:
        inputs = [values[v] for v in equation.invars if _is_known(v, values)]
        if not inputs:
            continue
        results = _evaluate(equation, values)
        if results is None:
            yield from inputs
        else:
            values.update(zip(equation.outvars, results, strict=True))
    yield from (values[v] for v in jaxpr.outvars if _is_known(v, values))


def _is_known(variable: Any, values: _Values) -> bool:
    """Returns True if a variable has one of the ``values``; literals cannot be looked up."""
    return not isinstance(variable, Literal) and variable in values


def _evaluate(equation: Any, values: _Values) -> list[Array] | None:
    """Returns the results of an operation for known ``values``, all of one shape.

    None if an input is not known, or if the operation is neither elementwise, nor a copy, nor a
    call of such operations.
    """
    shape = next(iter(values.values())).shape
    inputs = []
    for variable in equation.invars:
        if isinstance(variable, Literal) and jnp.ndim(variable.val) == 0:
            inputs.append(jnp.broadcast_to(_in_float32(variable.val), shape))
        elif _is_known(variable, values):
            inputs.append(values[variable])
        else:
            return None
    name = equation.primitive.name
    if name in _COPIES:
        return inputs[:1]
    if name == "convert_element_type":
        return [_in_float32(inputs[0].astype(equation.params["new_dtype"]))]
    if name in _ELEMENTWISE:
        try:
            return [equation.primitive.bind(*inputs, **equation.params)]
        except TypeError:  # operands whose dtypes differ since floats are float32 here
            return None
    if name not in _CALLS:
        return None
    program = next(_programs(equation.params.values()))
    if len(program.invars) != len(inputs):
        return None
    within: _Values = dict(zip(program.invars, inputs, strict=True))
    for inner in program.eqns:
        results = _evaluate(inner, within)
        if results is None:
            return None
        within.update(zip(inner.outvars, results, strict=True))
    if not all(_is_known(v, within) for v in program.outvars):
        return None
    return [within[v] for v in program.outvars]


def _in_float32(value: Any) -> Array:
    """Returns a value as an array, floats in float32 and other dtypes unchanged."""
    array = jnp.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.float32)
    return array


def _programs(values: Sequence[Any] | Any) -> Iterator[Jaxpr]:
    """Yields the programs among the parameters of an operation, also those in tuples and lists."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _programs(value)
