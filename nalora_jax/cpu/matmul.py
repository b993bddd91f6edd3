"""Matmuls and adapted layers on a CPU: native (`nalora_jax.cpu.native`) if this CPU supports them,
else XLA's.

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

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap

from nalora_jax.cpu.native.library import call
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
    stack_masked,
)
from nalora_jax.ops.dispatch import Numerics, native_kind
from nalora_jax.ops.storage import (
    Bits,
    Kernel,
    Stored,
    Trained,
    bf16_bits,
    bf16_from_bits,
    dot,
    expand,
    read_residual,
    round_to,
    save_residual,
)

# With fewer rows, as in text generation, XLA's matmuls are used if they are faster.
_FEWEST_ROWS = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Term:
    """One product of a sum; both operands are bf16, or bf16 viewed as uint16. With runs, x has
    their axis first."""

    x: Array  # [rows, depth]
    # [depth, columns] or [columns, depth]: an array (or one of each run), or `Bits` of a stack
    y: Any
    # True for [columns, depth]
    transposed: bool = field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the product."""
        rows = self.x.shape[-2]
        if self.transposed:
            return rows, self.y.shape[-2]
        return rows, self.y.shape[-1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum:
    """The sum ``sum_t x_t y_t``."""

    terms: Sequence[Term]
    # Of the result; "bfloat16" is rounded once, from the float32 sum.
    dtype: Any = field(default="float32", metadata={"static": True})


def products(*sums: Sum) -> list[Array]:
    """Computes the sums ``[rows, columns]``, whose shapes may differ, in one call: threads share
    all of the work."""
    for each in sums:
        rows, columns = each.terms[0].shape
        for term in each.terms:
            depth = term.x.shape[1]
            chex.assert_shape(term.x, (rows, None))
            expected = (depth, columns)
            if term.transposed:
                expected = (columns, depth)
            chex.assert_equal(term.y.shape, expected)
    results: list[Array] = _products(jax.tree.map(bf16_bits, sums))
    return results


@custom_vmap
def _products(sums: Sequence[Sum]) -> list[Array]:
    """Computes `products` of operands that are uint16."""
    return _call_native(sums)


@_products.def_vmap
def _products_of_runs(
    runs: int, batched: Sequence[Sequence[Sum]], sums: Sequence[Sum]
) -> tuple[list[Array], list[bool]]:
    """Computes the sums of all runs in one call; runs that share their kernels are rows of one
    product."""

    def with_runs(term: Term, is_batched: Term) -> Term:
        """Returns a term whose x has the axis of runs; a kernel in a stack has none."""
        if isinstance(term.y, Bits):
            assert not any(jax.tree.leaves(is_batched.y)), "kernels are shared"
        x = term.x
        if not is_batched.x:
            x = jnp.broadcast_to(x, (runs, *x.shape))
        return Term(x, term.y, term.transposed)

    sums_of_runs = []
    for each, flags in zip(sums, batched[0], strict=True):
        terms = list(map(with_runs, each.terms, flags.terms))
        sums_of_runs.append(Sum(terms, each.dtype))
    return _call_native(sums_of_runs, runs), [True] * len(sums)


def _call_native(sums: Sequence[Sum], *runs: int) -> list[Array]:
    """Returns the results of one call, with an axis of ``runs`` first if they are given; operands
    are uint16."""
    stored = {"float32": jnp.float32, "bfloat16": jnp.uint16}  # dtypes of the results
    terms: list[Term] = []
    shapes = []
    for each in sums:
        terms += each.terms
        dtype = stored[jnp.dtype(each.dtype).name]
        shape = (*runs, *each.terms[0].shape)
        shapes.append(jax.ShapeDtypeStruct(shape, dtype))
    operands: list[Array] = []
    indices = []
    for term in terms:
        y = term.y
        if isinstance(y, Bits):
            indices.append(jnp.asarray(y.at, jnp.int32))
            y = y.bits
        operands += [term.x, y]
    attributes = {
        "terms": np.array([len(each.terms) for each in sums], np.int64),
        "transposed": np.array([term.transposed for term in terms], np.int64),
        "stacked": np.array([isinstance(term.y, Bits) for term in terms], np.int64),
    }
    results = call("products", shapes, **attributes)(*operands, *indices)
    return [bf16_from_bits(result) for result in results]


def is_native(rows: int, operand: str, numerics: Numerics) -> bool:
    """Returns True if matmuls with this number of rows are native."""
    kind = ""
    if operand == numerics.operand == "bfloat16":
        kind = native_kind(numerics)
    if (
        kind == "floats"
    ):  # float32 instructions (AVX2): XLA's matmuls of few rows are faster
        return rows >= _FEWEST_ROWS
    return bool(kind)


def native_sums(numerics: Numerics, *sums: Sum) -> list[Array]:
    """Computes `products` of unrounded operands in any storage form."""

    def operand(y: Any) -> Any:
        """Returns an operand in bf16; an array in a stack stays in place."""
        if not isinstance(y, Bits):
            return round_to(expand(y), "bfloat16", numerics)
        if y.at is None:
            return y.bits
        return y

    if not sums:
        return []
    operands = jax.tree.map(operand, sums, is_leaf=lambda y: isinstance(y, Stored))
    return products(*operands)


@dot.implements("cpu")
def native_dot(
    x: Array,
    y: Kernel,
    numerics: Numerics,
    dims: tuple[int, int] = (1, 0),
    operand: str = "",
    result: Any = "float32",
) -> Array:
    """Computes the matmul natively, or by XLA's faster matmul if there is a single row."""
    operand = operand or numerics.operand
    if dims[0] != 1:
        return NotImplemented
    if is_native(x.shape[0], operand, numerics):
        return native_sums(numerics, Sum([Term(x, y, dims[1] == 1)], result))[0]
    if x.shape[0] == 1 and operand == "bfloat16":
        # XLA:CPU widens the whole bf16 matrix to float32 for a single row, but not for two.
        doubled = jnp.concatenate([x, x])
        return dot.plain(doubled, y, numerics, dims, operand, result)[:1]
    return NotImplemented


@low_rank.adapted_dense.implements("cpu")
def adapted_dense(x: Array, dense: Dense, numerics: Numerics) -> Adapted:
    """Computes one layer as `parallel_dense` does, or with an adapter by `FusedProducts`.

    Joining kernel and factor copies the kernel, which must cost less than a second pass over the
    rows. In text generation it costs more: each token would need a copy.
    """
    if isinstance(dense.kernel, Trained):
        return NotImplemented
    products = _native_products(x, [dense], numerics)
    if products is None:
        rows = math.prod(x.shape[:-1])
        worthwhile = 2 * rows >= dense.kernel.shape[-2]
        if dense.adapter is None or not dense.is_plain or not worthwhile:
            return NotImplemented
        products = FusedProducts(numerics)
    return _apply(products, x, [dense])[0]


@low_rank.parallel_dense.implements("cpu")
def parallel_dense(
    x: Array, layers: Sequence[Dense], numerics: Numerics
) -> list[Adapted]:
    """Computes layers without DoRA and dropout natively, in one call per direction.

    Threads share the work of all layers, and the gradients of x are summed while they are computed.
    Separate calls would write each gradient to memory and read it again for the sum.
    """
    if any(isinstance(layer.kernel, Trained) for layer in layers):
        return NotImplemented
    products = _native_products(x, layers, numerics)
    if products is None:
        return NotImplemented
    return _apply(products, x, layers)


def _native_products(
    x: Array, layers: Sequence[Dense], numerics: Numerics
) -> Products | None:
    """Returns the native matmuls of these layers, or None if they do not apply to them."""
    rows = math.prod(x.shape[:-1])
    plain = all(layer.is_plain for layer in layers)
    if plain and is_native(rows, numerics.operand, numerics):
        return NativeProducts(numerics)
    return None


def _apply(products: Products, x: Array, layers: Sequence[Dense]) -> list[Adapted]:
    """Returns the outputs of plain layers for x ``[..., d_in]``."""
    *leading, d_in = x.shape

    def unflatten(y: Array) -> Array:
        """Returns ``[..., n]`` of ``[rows, n]``."""
        return y.reshape(*leading, -1)

    factors = tuple(Factors.of(layer.adapter, layer.kernel) for layer in layers)
    rows = x.reshape(-1, d_in)
    flat = gated(products, rows, factors)
    ys, hidden = jax.tree.map(unflatten, flat)
    outputs = []
    for layer, y, h in zip(layers, ys, hidden, strict=True):
        low_rank_hidden = None
        if layer.adapter is not None:
            low_rank_hidden = LowRankHidden(h, layer.adapter.b)
        outputs.append(Adapted(add_bias(y, layer.bias), low_rank_hidden))
    return outputs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FusedProducts(Products):
    """The matmuls of one layer by XLA, with the low-rank factor as ``r`` more rows or columns of
    the kernel.

    Without it a bf16 step by XLA takes 15% longer (8 x 128 on Zen 4)::

        wide output (gate, up)   y  = [x, s x A] [W; B]
                                 dx = g [W; B]^T, its last r columns being g B^T
        wide input (down)        y  = x [W, A], whose last r columns are x A
                                 dx = [g, s g B^T] [W, A]^T
    """

    numerics: Numerics = field(metadata={"static": True})

    def forward(
        self, x: Array, layers: Sequence[Factors]
    ) -> tuple[list[Array], list[Any]]:
        """See `Products`."""
        ((a, b, scale, _, kernel),) = layers
        n = self.numerics
        d_in, d_out = kernel.shape
        # A rematerialized layer saves the r columns s x A; recomputing them would take another
        # matmul over x.
        if d_out > d_in:
            hidden: Any = save_residual(scale * dot(x, a, n), "float32", n)
            rows = self._join(x, hidden, 1)
            y = dot(rows, self._join(kernel, b, 0), n)
        else:
            both = dot(x, self._join(kernel, a, 1), n)
            hidden = save_residual(scale * both[:, d_out:], "float32", n)
            y = both[:, :d_out] + dot(hidden, b, n)
        return [round_to(y, n.result, n)], [hidden]

    def backward(
        self,
        x: Array,
        gs: Sequence[Array],
        layers: Sequence[Factors],
        hidden: Sequence[Any],
    ) -> tuple[Array, list[Any], list[Any]]:
        """See `Products`."""
        (layer,) = layers
        (g,) = gs
        n = self.numerics
        wide = stack_masked(layer)  # [r or 2 r, d_out]
        d_in, d_out = layer.kernel.shape
        if d_out > d_in:
            joined = self._join(layer.kernel, wide, 0)
            both = dot(g, joined, n, dims=(1, 1))
            exact, masked = rank_cotangents(layer, both[:, d_in:])
            dx = both[:, :d_in] + dot(exact, layer.a, n, dims=(1, 1))
        else:
            back = dot(g, wide, n, dims=(1, 1))
            exact, masked = rank_cotangents(layer, back)
            rows = self._join(g, exact, 1)
            joined = self._join(layer.kernel, layer.a, 1)
            dx = dot(rows, joined, n, dims=(1, 1))
        da = self._narrow_dot(masked, x).T
        db = self._narrow_dot(hidden[0], g)
        return round_to(dx, x.dtype, n), [da], [db]

    def _join(self, first: Kernel, second: Array, axis: int) -> Array:
        """Returns both arrays, rounded to the operands' dtype and concatenated along ``axis``."""
        # As integers: XLA:CPU would concatenate bf16 in float32 and convert both ways.
        bits = [self._bits(expand(first)), self._bits(second)]
        return bf16_from_bits(jnp.concatenate(bits, axis=axis))

    def _bits(self, x: Array) -> Array:
        """Returns ``x`` rounded to the operands' dtype, bf16 as uint16."""
        return bf16_bits(round_to(x, self.numerics.operand, self.numerics))

    def _narrow_dot(self, x: Array, y: Array) -> Array:
        """Returns ``x^T y [r, d]`` of a narrow x ``[tokens, r]`` and a wide y ``[tokens, d]``."""
        # XLA:CPU contracts the rows of a left operand in float32 only, which would compute the wide
        # side twice. The appended row of zeros makes the transpose a separate array, which XLA does
        # not fold into the matmul.
        bits = self._bits(x).T
        zeros = jnp.zeros_like(bits[:1])
        padded = bf16_from_bits(jnp.concatenate([bits, zeros]))
        return dot(padded, y, self.numerics)[: x.shape[1]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NativeProducts(Products):
    """The matmuls of any number of layers, with or without adapters, as `products`."""

    numerics: Numerics = field(metadata={"static": True})

    def forward(
        self, x: Array, layers: Sequence[Factors]
    ) -> tuple[list[Array], list[Any]]:
        """See `Products`."""
        n = self.numerics
        factors = [layer.a for layer in layers if layer.a is not None]
        narrow_sums = [Sum([Term(x, a)]) for a in factors]
        narrow = iter(native_sums(n, *narrow_sums))  # x A of each layer with an adapter
        sums = []
        hidden: list[Any] = []
        for layer in layers:
            terms = [Term(x, layer.kernel)]
            h: Any = None
            if layer.a is not None:
                # A rematerialized layer saves the r columns s x A; recomputing them would take
                # another pass over x.
                h = save_residual(layer.scale * next(narrow), "float32", n)
                terms.append(Term(h, layer.b))
            sums.append(Sum(terms, n.result))
            hidden.append(h)
        return native_sums(n, *sums), hidden

    def backward(
        self,
        x: Array,
        gs: Sequence[Array],
        layers: Sequence[Factors],
        hidden: Sequence[Any],
    ) -> tuple[Array, list[Any], list[Any]]:
        """See `Products`."""
        n = self.numerics
        terms = []  # of dx
        adapted = []  # indices of the layers with an adapter
        back_sums = []
        for i, (layer, g) in enumerate(zip(layers, gs, strict=True)):
            terms.append(Term(g, layer.kernel, True))
            if layer.a is not None:
                adapted.append(i)
                back_sums.append(Sum([Term(g, stack_masked(layer), True)]))
        backs = native_sums(n, *back_sums)
        of_adapters = []
        for i, back in zip(adapted, backs, strict=True):
            exact, masked = rank_cotangents(layers[i], back)
            terms.append(Term(exact, layers[i].a, True))
            h = read_residual(hidden[i], "float32")
            of_adapters.append(Sum([Term(masked.T, x)]))
            of_adapters.append(Sum([Term(h.T, gs[i])]))
        dx, *gradients = native_sums(n, Sum(terms, x.dtype), *of_adapters)
        das: list[Any] = [None] * len(layers)
        dbs: list[Any] = [None] * len(layers)
        for i, da, db in zip(adapted, gradients[::2], gradients[1::2], strict=True):
            das[i] = da.T
            dbs[i] = db
        return dx, das, dbs
