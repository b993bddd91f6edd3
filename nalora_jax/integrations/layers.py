"""Detection of the kernel of a layer by running the layer, independent of names.

A layer can have a low-rank adapter if it computes ``x @ kernel`` or ``x @ kernel.T``, with or
without a bias: then the adapter's output can be added to the layer's output, and merging adds the
adapter's product to the kernel. Shapes alone do not prove this (a square kernel may be transposed,
the product scaled, an activation applied inside), so each layer is run once on random numbers and
compared with the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.errors import NaloraError

ROWS = 2  # size of every input axis that a layer does not contract; enough for the comparison


@dataclass(frozen=True)
class Contraction:
    """The contraction of a layer: its kernel parameter and the kernel's contracted axes."""

    parameter: str  # its name in the layer: "kernel", "w", ...
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    transposed: bool = False  # stored as [*outputs, *inputs]


@dataclass(frozen=True)
class Unfit:
    """The reason why a layer cannot have an adapter."""

    reason: str
    dense: bool = False  # its shapes look like a dense layer, so a user would expect an adapter


def arrangements(
    shapes: Mapping[str, tuple[int, ...]], x: tuple[int, ...], out: tuple[int, ...]
) -> list[Contraction]:
    """Returns the products of an input ``x`` and one parameter that have the shape ``out``.

    Example:
      >>> arrangements({"kernel": (4, 8, 32), "bias": (32,)}, (2, 7, 4, 8), (2, 7, 32))
      [Contraction(parameter='kernel', inputs=(4, 8), outputs=(32,), transposed=False)]
    """
    contractions = []
    for name in sorted(shapes, key=lambda name: (name != "kernel", name)):
        shape = shapes[name]
        for transposed in (False, True):
            for cut in range(1, len(shape)):
                inputs, outputs = shape[:cut], shape[cut:]
                if transposed:
                    inputs, outputs = outputs, inputs
                if x[-len(inputs) :] == inputs and out == (*x[: len(x) - len(inputs)], *outputs):
                    contractions.append(Contraction(name, inputs, outputs, transposed))
    return contractions


def examine(layer: Callable[[Any], Any], params: Mapping[str, Any], x: Any) -> Contraction | Unfit:
    """Runs ``layer`` on ``x`` and returns its contraction, or the reason why it has none.

    Args:
      layer: the layer as a function of its input, with ``params`` bound.
      params: the layer's own parameters, random numbers.
      x: random numbers.
    """
    try:
        with jax.default_matmul_precision("highest"):
            out = layer(x)
    except Exception as error:  # the user's code may reject this call with any exception
        return Unfit(f"it could not be run on its own ({type(error).__name__}: {_short(error)})")
    if not isinstance(out, jax.Array):
        return Unfit(f"it returns {type(out).__name__}, not one array")
    shapes = {name: leaf.shape for name, leaf in params.items() if _is_real(leaf)}
    contractions = arrangements(shapes, x.shape, out.shape)
    if not contractions:
        return Unfit(no_product({name: leaf.shape for name, leaf in params.items()}, x.shape, out.shape))
    return next(
        (contraction for contraction in contractions if _is_product(contraction, params, x, out)),
        _misfit(contractions[0], params, x, out),
    )


def no_product(shapes: Mapping[str, tuple[int, ...]], x: tuple[int, ...], out: tuple[int, ...]) -> str:
    """Returns the reason why a layer of these shapes is not dense."""
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    product = f"no product of its input {list(x)} with one parameter ({listed})"
    return f"{product} has the shape of its output {list(out)}"


def randomised(tree: Any, seed: int = 0) -> Any:
    """Returns ``tree`` with its real arrays or shapes replaced by normal random numbers.

    Other arrays are kept, and other shapes become zeros or keys.
    """
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), max(1, len(leaves)))
    return jax.tree.unflatten(
        structure, [_random(leaf, key) for leaf, key in zip(leaves, keys, strict=False)]
    )


def holds_numbers(tree: Any) -> bool:
    """Returns True if all leaves have values: none is a shape or a tracer."""
    leaves = jax.tree.leaves(tree)
    return not any(isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf in leaves)


def check_merged(merged: Any, adapted: Any, base: Any) -> None:
    """Compares the results of a merged and an adapted model.

    The tolerance is rounding, and 5% of the largest change by the adapters.

    Raises:
      NaloraError: the results differ by more.
    """
    for merged_leaf, want, before in zip(
        *(jax.tree.leaves(tree) for tree in (merged, adapted, base)), strict=True
    ):
        if not jnp.issubdtype(getattr(want, "dtype", jnp.int32), jnp.floating):
            continue
        merged_leaf, want, before = (np.asarray(leaf, np.float32) for leaf in (merged_leaf, want, before))
        short = jnp.finfo(jax.tree.leaves(adapted)[0].dtype).bits < 32
        allowed = 0.05 * np.abs(want - before).max(initial=0) + (3e-2 if short else 1e-3) * np.abs(
            want
        ).max(initial=0)
        difference = np.abs(merged_leaf - want).max(initial=0)
        if not difference <= allowed:
            raise NaloraError(
                "merge",
                expected=f"the adapted model's result, within {allowed:.2g}",
                found=f"a difference of {difference:.2g}",
                remedy="a kernel is also used outside of the layer that holds it: leave that layer unadapted",
            )


def _random(leaf: Any, key: jax.Array) -> Any:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        # Not near zero, so that every parameter has an effect; of size 1, so that no activation is
        # nearly linear.
        return jax.random.normal(key, leaf.shape, jnp.float32).astype(leaf.dtype)
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        if leaf.shape == ():
            return jax.random.key(0)
        return jax.random.split(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _is_product(contraction: Contraction, params: Mapping[str, Any], x: Any, out: Any) -> bool:
    """Returns True if ``out`` is the product, or the product plus one more parameter."""
    product = _product(contraction, params, x)
    residual = np.asarray(out, np.float32) - product
    further = (leaf for name, leaf in params.items() if name != contraction.parameter)
    biases = [leaf for leaf in further if leaf.shape == contraction.outputs]
    return any(_near(residual - np.asarray(bias, np.float32), product, out) for bias in (0.0, *biases))


def _misfit(contraction: Contraction, params: Mapping[str, Any], x: Any, out: Any) -> Unfit:
    """Describes the difference: a constant factor, or else the largest deviation."""
    product, actual = _product(contraction, params, x), np.asarray(out, np.float32)
    formula = f"x @ {contraction.parameter}{'.T' if contraction.transposed else ''} + bias"
    factor = float(np.vdot(product, actual) / max(np.vdot(product, product), 1e-30))
    if _near(actual - factor * product, product, out):
        return Unfit(
            f"it computes {factor:.4g} * x @ {contraction.parameter}, so that a merged adapter would not be it",
            True,
        )
    largest = float(np.abs(actual - product).max())
    scale = float(np.abs(product).max())
    reason = f"it does not compute {formula}: "
    reason += f"on random numbers up to {scale:.3g} the two differ by {largest:.3g}"
    return Unfit(f"{reason} (an activation, a factor or dropout inside?)", True)


def _product(contraction: Contraction, params: Mapping[str, Any], x: Any) -> np.ndarray:
    """Returns ``x @ kernel`` in float32, in the shape of the layer's output."""
    d_in, d_out = math.prod(contraction.inputs), math.prod(contraction.outputs)
    kernel = np.asarray(params[contraction.parameter], np.float32).reshape(d_in, d_out)
    if contraction.transposed:
        kernel = kernel.reshape(d_out, d_in).T
    rows = np.asarray(x, np.float32).reshape(-1, d_in) @ kernel
    return rows.reshape(*x.shape[: x.ndim - len(contraction.inputs)], *contraction.outputs)


def _near(difference: np.ndarray, product: np.ndarray, out: Any) -> bool:
    """Returns True if a difference is within the rounding of the output's dtype."""
    short = False
    if jnp.issubdtype(out.dtype, jnp.floating):
        short = jnp.finfo(out.dtype).bits < 32
    return bool(np.abs(difference).max() <= (3e-2 if short else 2e-3) * np.abs(product).max())


def _is_real(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    if len(text) <= 160:
        return text
    return f"{text[:157]}..."
