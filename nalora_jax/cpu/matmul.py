"""Matmuls and adapted layers on a CPU: native (`nalora_jax.cpu.native`) if this CPU supports them, else XLA's.

The adapter's arithmetic is negligible, but its passes over ``[tokens, d_ff]`` are limited by
memory: on a CPU they take a third of the time of the frozen matmuls. Therefore frozen and low-rank
matmuls are fused, of several layers per call. The gated gradient is computed by
`nalora_jax.method.low_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.common import processor
from nalora_jax.cpu import native
from nalora_jax.cpu.native import Sum, Term, bf16_bits, from_bits, library
from nalora_jax.cpu.storage import Bits, usable
from nalora_jax.method import low_rank
from nalora_jax.method.low_rank import (
    Adapted,
    Dense,
    Factors,
    LowRankHidden,
    Products,
    add_bias,
    gated,
    rank_cotangents,
    with_masked,
)
from nalora_jax.ops import delta_rule
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import Kernel, Stored, dot, expand, read_residual, rounded, save_residual

# With fewer rows, as in text generation, XLA's matmuls are used if they are faster.
_FEWEST_ROWS = 32


def is_native(rows: int, operand: str, numerics: Numerics) -> bool:
    """Returns True if matmuls with this number of rows are native."""
    if operand != "bfloat16" or not usable(numerics):
        return False
    return rows >= _FEWEST_ROWS or library.kind() != "floats"


def native_sums(numerics: Numerics, *sums: Sum) -> list[jax.Array]:
    """Computes `nalora_jax.cpu.native.products` of unrounded operands in any storage form."""
    if not sums:
        return []

    def operand(y: Any) -> Any:
        if isinstance(y, native.Slice):
            return y
        if isinstance(y, Bits):
            return y.bits
        return rounded(expand(y), "bfloat16", numerics)

    return native.products(*jax.tree.map(operand, sums, is_leaf=lambda y: isinstance(y, Stored)))


@dot.implements("cpu")
def native_dot(
    x: jax.Array,
    y: Kernel,
    numerics: Numerics,
    dims: tuple[int, int] = (1, 0),
    operand: str = "",
    result: Any = "float32",
) -> jax.Array:
    """Computes the matmul natively, or by XLA's faster matmul if there is a single row."""
    operand = operand or numerics.operand
    if dims[0] != 1:
        return NotImplemented
    if is_native(x.shape[0], operand, numerics):
        return native_sums(numerics, Sum([Term(x, y, dims[1] == 1)], result))[0]
    if x.shape[0] == 1 and operand == "bfloat16":
        # XLA:CPU widens the whole bf16 matrix to float32 for a single row, but not for two.
        return dot.plain(jnp.concatenate([x, x]), y, numerics, dims, operand, result)[:1]
    return NotImplemented


@delta_rule.solve_unit.implements("cpu")
def solve_unit(lower: jax.Array, target: jax.Array, numerics: Numerics) -> jax.Array:
    """Solves by LAPACK's substitution on one device; several would gather the systems.

    It takes a tenth of the time of the plain inverse, whose matmuls suit matrix units.
    """
    if numerics.platform.devices > 1:
        return NotImplemented
    return lax.linalg.triangular_solve(lower, target, left_side=True, lower=True, unit_diagonal=True)


# ---------------------------------------------------------------- adapted layers


@low_rank.adapted_dense.implements("cpu")
def adapted_dense(x: jax.Array, dense: Dense, numerics: Numerics) -> Adapted:
    """Computes a layer with one adapter, without DoRA or dropout."""
    if dense.adapter is None or not dense.is_plain:
        return NotImplemented
    if is_native(_rows(x), numerics.operand, numerics):
        return together(NativeProducts(numerics), x, [dense])[0]
    if worthwhile(x, dense.kernel):
        return together(FusedProducts(numerics), x, [dense])[0]
    return NotImplemented


@low_rank.parallel_dense.implements("cpu")
def parallel_dense(x: jax.Array, layers: Sequence[Dense], numerics: Numerics) -> list[Adapted]:
    """Computes the layers natively, in one call per direction.

    Threads share the work of all layers, and the gradients of x are summed while they are computed.
    Separate calls would write each gradient to memory and read it again for the sum.
    """
    if not all(layer.is_plain for layer in layers) or not is_native(_rows(x), numerics.operand, numerics):
        return NotImplemented
    return together(NativeProducts(numerics), x, layers)


def _rows(x: jax.Array) -> int:
    return math.prod(x.shape[:-1])


def worthwhile(x: jax.Array, kernel: Kernel) -> bool:
    """Returns True if x has enough rows for joining kernel and factor to pay off.

    Joining copies the kernel, which must cost less than a second pass over the rows. During text
    generation it costs more: each token would need a copy.
    """
    return 2 * _rows(x) >= kernel.shape[-2]


def together(products: Products, x: jax.Array, layers: Sequence[Dense]) -> list[Adapted]:
    """Returns the outputs of plain layers for x ``[..., d_in]``."""
    factors = tuple(Factors.of(layer.adapter, layer.kernel) for layer in layers)
    ys, hidden = gated(products, x.reshape(-1, x.shape[-1]), factors)
    ys, hidden = jax.tree.map(lambda y: y.reshape(*x.shape[:-1], -1), (ys, hidden))
    return [
        Adapted(
            add_bias(y, layer.bias),
            None if layer.adapter is None else LowRankHidden(h, layer.adapter.b),
        )
        for layer, y, h in zip(layers, ys, hidden, strict=True)
    ]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FusedProducts(Products):
    """The matmuls of one layer by XLA, with the low-rank factor appended to the frozen kernel.

    The factor on its wide side adds ``r`` rows or columns to the kernel::

        wide output (gate, up)   y  = [x, s x A] [W; B]
                                 dx = g [W; B]^T, its last r columns being g B^T
        wide input (down)        y  = x [W, A], whose last r columns are x A
                                 dx = [g, s g B^T] [W, A]^T
    """

    numerics: Numerics = field(metadata={"static": True})

    def forward(self, x: jax.Array, layers: Sequence[Factors]) -> tuple[list[jax.Array], list[Any]]:
        """See `Products`."""
        ((a, b, scale, _, kernel),), n = layers, self.numerics
        d_in, d_out = kernel.shape
        multiple = contraction_multiple(n)
        # A rematerialized layer saves the r columns s x A; recomputing them would take another
        # matmul over x.
        if d_out > d_in:
            hidden: Any = save_residual(scale * dot(x, a, n), "float32", n)
            y = dot(
                self._joined(x, hidden, 1, multiple),
                self._joined(expand(kernel), b, 0, multiple),
                n,
            )
        else:
            both = dot(x, self._joined(expand(kernel), a, 1), n)
            hidden = save_residual(scale * both[:, d_out:], "float32", n)
            y = both[:, :d_out] + dot(hidden, b, n)
        return [rounded(y, n.result, n)], [hidden]

    def backward(
        self, x: jax.Array, gs: Sequence[jax.Array], layers: Sequence[Factors], hidden: Sequence[Any]
    ) -> tuple[jax.Array, list[Any], list[Any]]:
        """See `Products`."""
        (layer,), (g,), n = layers, gs, self.numerics
        kernel, wide = expand(layer.kernel), with_masked(layer)
        d_in, d_out = kernel.shape
        if d_out > d_in:
            both = dot(g, self._joined(kernel, wide, 0), n, dims=(1, 1))
            exact, masked = rank_cotangents(layer, both[:, d_in:])
            dx = both[:, :d_in] + dot(exact, layer.a, n, dims=(1, 1))
        else:
            exact, masked = rank_cotangents(layer, dot(g, wide, n, dims=(1, 1)))
            multiple = contraction_multiple(n)
            sides = self._joined(g, exact, 1, multiple), self._joined(kernel, layer.a, 1, multiple)
            dx = dot(*sides, n, dims=(1, 1))
        da, db = self._narrow(masked, x).T, self._narrow(hidden[0], g)
        return rounded(dx, x.dtype, n), [da], [db]

    def _joined(self, first: jax.Array, second: jax.Array, axis: int, multiple: int = 1) -> jax.Array:
        """Returns both arrays rounded and concatenated, with zeros up to the next ``multiple``."""
        # As integers: XLA:CPU would concatenate bf16 in float32 and convert both ways.
        parts = [
            bf16_bits(rounded(array, self.numerics.operand, self.numerics)) for array in (first, second)
        ]
        if missing := -sum(array.shape[axis] for array in parts) % multiple:
            shape = (*parts[0].shape[:axis], missing, *parts[0].shape[axis + 1 :])
            parts.append(jnp.zeros(shape, parts[0].dtype))
        return from_bits(jnp.concatenate(parts, axis=axis))

    def _narrow(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Returns ``x^T y [r, d]`` of a narrow x ``[tokens, r]`` and a wide y ``[tokens, d]``."""
        # XLA:CPU contracts the rows of a left operand in float32 only, which would compute the wide
        # side twice. The appended row of zeros makes the transpose a separate array, which XLA does
        # not fold into the matmul.
        transposed = bf16_bits(rounded(x, self.numerics.operand, self.numerics)).T
        transposed = from_bits(jnp.concatenate([transposed, jnp.zeros_like(transposed[:1])]))
        return dot(transposed, y, self.numerics)[: x.shape[1]]


def contraction_multiple(numerics: Numerics) -> int:
    """Returns a number that the length of a contraction should be a multiple of.

    AMX tiles take 32 bf16 values: 608 columns, the last 24 of them zeros, are a fifth faster than
    584.
    """
    if numerics.operand == "bfloat16" and "tiles" in processor.kinds():
        return 32
    return 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NativeProducts(Products):
    """The matmuls of any number of layers by `nalora_jax.cpu.native`, with or without adapters."""

    numerics: Numerics = field(metadata={"static": True})

    def forward(self, x: jax.Array, layers: Sequence[Factors]) -> tuple[list[jax.Array], list[Any]]:
        """See `Products`."""
        n = self.numerics
        narrow = iter(native_sums(n, *(Sum([Term(x, layer.a)]) for layer in layers if layer.a is not None)))
        sums = []
        hidden: list[Any] = []
        for layer in layers:
            terms = [Term(x, layer.kernel)]
            h: Any = None
            if layer.a is not None:
                # A rematerialized layer saves the r columns s x A; recomputing them would take another
                # pass over x.
                h = save_residual(layer.scale * next(narrow), "float32", n)
                terms.append(Term(h, layer.b))
            sums.append(Sum(terms, n.result))
            hidden.append(h)
        return native_sums(n, *sums), hidden

    def backward(
        self, x: jax.Array, gs: Sequence[jax.Array], layers: Sequence[Factors], hidden: Sequence[Any]
    ) -> tuple[jax.Array, list[Any], list[Any]]:
        """See `Products`."""
        n = self.numerics
        terms = [Term(g, layer.kernel, True) for g, layer in zip(gs, layers, strict=True)]
        adapted = [i for i, layer in enumerate(layers) if layer.a is not None]
        backs = native_sums(n, *(Sum([Term(gs[i], with_masked(layers[i]), True)]) for i in adapted))
        of_adapters = []
        for i, back in zip(adapted, backs, strict=True):
            exact, masked = rank_cotangents(layers[i], back)
            terms.append(Term(exact, layers[i].a, True))
            of_adapters += [Sum([Term(masked.T, x)])]
            of_adapters += [Sum([Term(read_residual(hidden[i], "float32").T, gs[i])])]
        dx, *gradients = native_sums(n, Sum(terms, x.dtype), *of_adapters)
        das: list[Any] = [None] * len(layers)
        dbs: list[Any] = [None] * len(layers)
        for i, da, db in zip(adapted, gradients[::2], gradients[1::2], strict=True):
            das[i], dbs[i] = da.T, db
        return dx, das, dbs
