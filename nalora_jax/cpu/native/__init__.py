"""Native kernels for bf16 matmuls, attention, losses and gates that XLA calls on a CPU; sums are float32.

At the shapes of a training step XLA:CPU's matmuls reach half of the throughput of matrix tiles
(AMX) and two thirds of AVX2's. With the dot products of AVX512-BF16 they are fast, but adapters and
roundings take separate passes. Its attention passes over every score several times.
The C++ sources in this folder are compiled on first use, if the CPU has one of these instruction
sets and a C++ compiler is installed, and stored in the cache. Otherwise, and with
``NALORA_NATIVE=0``, XLA does the work.

`jax.vmap` of a foreign call is a loop by default. Operands of the kernels here have an axis of rows
first, so that the rows of all runs of a sweep are joined in one call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from nalora_jax.cpu.native import library
from nalora_jax.ops.storage import Stored

# Columns that the adapters of a group of runs may add to the contraction of a shared kernel.
_WIDEST = 128
# Queries whose weights the gradient of attention stores at once, kQueries in the sources.
_AT_ONCE = 256

Shapes = Sequence[jax.ShapeDtypeStruct]


def call(function: str, shapes: Shapes, **attributes: Any) -> Callable[..., list[jax.Array]]:
    """Returns a call of the library; `jax.vmap` makes it a loop."""
    called = jax.ffi.ffi_call(f"nalora_{function}_{library.kind()}", shapes, vmap_method="sequential")
    return lambda *operands: list(called(*operands, **attributes))


def row_call(function: str, shapes: Shapes, **attributes: Any) -> Callable[..., list[jax.Array]]:
    """Returns a call of the library that `jax.vmap` makes one call for the rows of all runs.

    Args:
      function: name in the library.
      shapes: of the results, with an axis of rows first.
      attributes: of the call.

    The operands have an axis of rows first, of length 1 if all rows are equal, or are scalars; if
    these differ between runs, the call becomes a loop.
    """
    called = custom_vmap(call(function, shapes, **attributes))

    def joined(
        size: int, batched: Sequence[bool], *operands: jax.Array
    ) -> tuple[list[jax.Array], list[bool]]:
        every = [True] * len(shapes)
        if any(flag and x.ndim == 1 for flag, x in zip(batched, operands, strict=True)):
            return _looped(call(function, shapes, **attributes), batched, operands), every
        rows = shapes[0].shape[0]
        flat = [
            _joined_rows(_of_runs(x, size, flag), rows) if flag or x.ndim else x
            for x, flag in zip(operands, batched, strict=True)
        ]
        wide = [
            jax.ShapeDtypeStruct((size * shape.shape[0], *shape.shape[1:]), shape.dtype) for shape in shapes
        ]
        results = row_call(function, wide, **attributes)(*flat)
        return [y.reshape(size, *shape.shape) for y, shape in zip(results, shapes, strict=True)], every

    called.def_vmap(joined)
    return called


def _looped(
    called: Callable[..., list[jax.Array]], batched: Sequence[bool], operands: Sequence[jax.Array]
) -> list[jax.Array]:
    """Returns the results of all runs from one call for each."""
    return jax.vmap(called, [0 if flag else None for flag in batched])(*operands)


def _of_runs(x: jax.Array, size: int, batched: bool) -> jax.Array:
    """Returns an operand with an axis ``[runs]``."""
    return x if batched else jnp.broadcast_to(x, (size, *x.shape))


def _joined_rows(x: jax.Array, rows: int = 1) -> jax.Array:
    """Returns ``[runs, n, ...]`` as ``[runs * n, ...]``; n = 1 is repeated for each of ``rows``."""
    if x.shape[1] == 1:
        x = jnp.broadcast_to(x, (x.shape[0], rows, *x.shape[2:]))
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def bf16_bits(x: jax.Array) -> jax.Array:
    """Returns the bits of bf16 ``x``; other dtypes are unchanged."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16)
    return x


def from_bits(x: jax.Array) -> jax.Array:
    """Computes the inverse of `bf16_bits`."""
    if x.dtype == jnp.uint16:
        return lax.bitcast_convert_type(x, jnp.bfloat16)
    return x


# ---------------------------------------------------------------- sums of matmuls


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slice(Stored):
    """One array of a stack, read in place; slicing would copy it every time."""

    stack: jax.Array  # [n, ...], bf16 viewed as uint16
    at: jax.Array  # int [], index in the stack

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one array."""
        return tuple(self.stack.shape[1:])

    def copied(self) -> jax.Array:
        """Returns a copy of the array, uint16."""
        return lax.dynamic_index_in_dim(self.stack, self.at, keepdims=False)

    def expand(self, dtype: Any = None) -> jax.Array:
        """Returns a copy of the array in ``dtype``, by default bf16."""
        return from_bits(self.copied()).astype(dtype or jnp.bfloat16)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Term:
    """One product of a sum; both operands are bf16, or bf16 viewed as uint16."""

    x: jax.Array  # [rows, depth]
    y: Any  # an array or a `Slice`, [depth, columns] or [columns, depth]
    transposed: bool = field(default=False, metadata={"static": True})  # True for [columns, depth]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the product."""
        return self.x.shape[0], self.y.shape[int(not self.transposed)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum:
    """The sum ``sum_t x_t y_t``."""

    terms: Sequence[Term]
    # Of the result; "bfloat16" is rounded once, from the float32 sum.
    dtype: Any = field(default="float32", metadata={"static": True})


def products(*sums: Sum) -> list[jax.Array]:
    """Computes the sums ``[rows, columns]`` in one call, so that threads share all of the work.

    Under `jax.vmap` the call remains one: see `_of_all_runs`.

    Args:
      sums: the sums; rows and columns may differ between them.

    Raises:
      AssertionError: shapes do not match.
    """
    for of in sums:
        rows, columns = of.terms[0].shape
        for term in of.terms:
            depth = term.x.shape[1]
            chex.assert_shape(term.x, (rows, None))
            chex.assert_equal(term.y.shape, (columns, depth) if term.transposed else (depth, columns))
    results: list[jax.Array] = _call(jax.tree.map(bf16_bits, sums))
    return results


@custom_vmap
def _call(sums: Sequence[Sum]) -> list[jax.Array]:
    """Returns the results of one call; operands are uint16."""
    every = [term for of in sums for term in of.terms]
    slices = [term.y for term in every if isinstance(term.y, Slice)]
    operands = [x for of in every for x in (of.x, of.y.stack if isinstance(of.y, Slice) else of.y)]
    attributes = {
        "terms": np.array([len(of.terms) for of in sums], np.int64),
        "transposed": np.array([term.transposed for term in every], np.int64),
        "stacked": np.array([isinstance(term.y, Slice) for term in every], np.int64),
    }
    stored = {"float32": jnp.float32, "bfloat16": jnp.uint16}
    shapes = [jax.ShapeDtypeStruct(of.terms[0].shape, stored[jnp.dtype(of.dtype).name]) for of in sums]
    indices = [jnp.asarray(y.at, jnp.int32) for y in slices]
    results = call("products", shapes, **attributes)(*operands, *indices)
    return [from_bits(y) for y in results]


@_call.def_vmap
def _of_all_runs(
    size: int, batched: Sequence[Sequence[Sum]], sums: Sequence[Sum]
) -> tuple[list[jax.Array], list[bool]]:
    """Returns the sums of all runs, from one call.

    Runs that share a kernel become rows of one product. The product with a kernel of each run, as
    an adapter's B, joins the same sum: its operands x are blocks on a diagonal. Sums without a
    shared kernel are computed for each run. Results equal the results of single runs to the rounding of
    float32 sums, whose order may differ.
    """
    of_sum = [_groups(size, *both) for both in zip(batched[0], sums, strict=True)]
    results = iter(products(*itertools.chain(*of_sum)))
    joined = []
    for groups in of_sum:
        columns = groups[0].terms[0].shape[1]
        rows = [next(results).reshape(-1, columns) for _ in groups]
        joined.append(jnp.concatenate(rows).reshape(size, -1, columns))
    return joined, [True] * len(sums)


def _groups(size: int, batched: Sum, shared: Sum) -> list[Sum]:
    """Returns a sum of all runs as sums of consecutive runs; ``batched`` has flags in place of arrays."""
    terms = [_of_every_run(size, *both) for both in zip(batched.terms, shared.terms, strict=True)]
    depths = [term.x.shape[2] for term, own in terms if own]
    runs = size if not depths else max(1, _WIDEST // max(depths))
    if len(depths) == len(terms):
        runs = 1
    groups = [slice(start, start + runs) for start in range(0, size, runs)]
    return [Sum([_of_group(*term, group) for term in terms], shared.dtype) for group in groups]


def _of_every_run(size: int, batched: Term, term: Term) -> tuple[Term, bool]:
    """Returns a term whose x has an axis ``[runs]``, and True if y has one, too."""
    x, y, own = _of_runs(term.x, size, bool(batched.x)), term.y, any(jax.tree.leaves(batched.y))
    if own and isinstance(y, Slice):
        axes = jax.tree.map(lambda flag: 0 if flag else None, batched.y)
        y = jax.vmap(Slice.copied, (axes,))(y)
    return Term(x, y, term.transposed), own


def _of_group(term: Term, own: bool, group: slice) -> Term:
    """Returns the products of some runs as one: with kernels of each run, x is block-diagonal."""
    x, y = term.x[group], term.y
    if not own:
        return Term(_joined_rows(x), y, term.transposed)
    runs, rows, depth = x.shape
    if runs > 1:
        on_diagonal = jnp.eye(runs, dtype=bool)[:, None, :, None]
        x = jnp.where(on_diagonal, x[:, :, None, :], 0)
    y = y[group]
    joined = jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1) if term.transposed else y.reshape(-1, y.shape[2])
    return Term(x.reshape(runs * rows, runs * depth), joined, term.transposed)


# ---------------------------------------------------------------- attention


class Heads(NamedTuple):
    """Queries, keys, values, and integers that decide visibility (`nalora_jax.ops.attention`)."""

    q: jax.Array  # [batch, seq, heads, head_dim], scaled; bf16 or a view of it
    k: jax.Array  # [batch, seq, kv_heads, head_dim]
    v: jax.Array  # the same
    positions: jax.Array  # int [batch or 1, seq]
    segments: jax.Array  # int [batch or 1, seq]
    window: jax.Array | int  # scalar
    ordered: bool = True  # tokens of a segment are in order; False: any key may be seen

    def operands(self) -> tuple[jax.Array, ...]:
        """Returns the operands of a library call."""
        chex.assert_rank(self[:3], 4)
        chex.assert_equal_shape([self.k, self.v])
        chex.assert_equal_shape_prefix([self.q, self.k], 2)
        positions, segments, window = (jnp.asarray(x, jnp.int32) for x in self[3:6])
        return (*map(bf16_bits, self[:3]), *jnp.broadcast_arrays(positions, segments), window)


def attention(heads: Heads, softcap: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Computes attention; returns the result and the log-sum-exps.

    They are bf16 ``[batch, seq, heads, head_dim]`` and float32 ``[batch, heads, seq]``.
    """
    batch, seq, n, _ = heads.q.shape
    shapes = [
        jax.ShapeDtypeStruct(heads.q.shape, jnp.uint16),
        jax.ShapeDtypeStruct((batch, n, seq), jnp.float32),
    ]
    options = {"cap": np.float32(softcap), "ordered": heads.ordered}
    out, logsumexp = row_call("attention", shapes, **options)(*heads.operands())
    return from_bits(out), logsumexp


def needs_result(seq: int, softcap: float) -> bool:
    """Returns True if `attention_gradient` needs the result of `attention`."""
    return seq > _AT_ONCE or softcap > 0


def attention_gradient(
    heads: Heads, out: jax.Array | None, logsumexp: jax.Array, g: jax.Array, softcap: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns float32 gradients of q, k and v.

    Args:
      heads: as passed to `attention`.
      out: the result of `attention`, bf16; may be None unless `needs_result`.
      logsumexp: the log-sum-exps that `attention` returned.
      g: the result's cotangent, bf16.
      softcap: as passed to `attention`.
    """
    if out is None:
        assert not needs_result(heads.q.shape[1], softcap)
        out = jnp.zeros((*heads.q.shape[:3], 0), jnp.uint16)
    chex.assert_equal_shape([heads.q, g])
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in heads[:3]]
    options = {"cap": np.float32(softcap), "ordered": heads.ordered}
    arguments = (*heads.operands(), bf16_bits(out), logsumexp, bf16_bits(g))
    dq, dk, dv = row_call("attention_gradient", shapes, **options)(*arguments)
    return dq, dk, dv


# ---------------------------------------------------------------- losses over a vocabulary


def over_vocabulary(
    hidden: jax.Array,
    table: jax.Array,
    count: jax.Array | int,
    *,
    transposed: bool,
    scale: float = 1.0,
    softcap: float = 0.0,
    gradient: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes ``max l``, ``sum exp(l - max)`` and ``sum exp(l - max) l' E`` of the logits ``l``.

    Args:
      hidden: bf16 ``[rows, d_model]``, or a view of it.
      table: E, bf16 ``[d_model, vocab]``, or ``[vocab, d_model]`` if ``transposed``; or a view of
        it.
      count: number of rows to compute, starting at the first; for the others the results are 0, 1
        and zeros.
      transposed: see table.
      scale: products are multiplied by it, before the cap.
      softcap: ``c tanh(l / c)``; 0: none.
      gradient: compute the third sum.

    Returns:
      Float32 ``[rows]``, ``[rows]`` and ``[rows, d_model]`` (``[rows, 0]`` without ``gradient``),
      with ``l'`` the derivative of the logits by the products.
    """
    rows, d_model = hidden.shape
    chex.assert_axis_dimension(table, int(transposed), d_model)
    row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    shapes = [row, row, jax.ShapeDtypeStruct((rows, d_model if gradient else 0), jnp.float32)]
    attributes = {"transposed": transposed, "scale": np.float32(scale), "cap": np.float32(softcap)}
    operands = (bf16_bits(hidden), bf16_bits(table), jnp.asarray(count, jnp.int32))
    called = custom_vmap(call("over_vocabulary", shapes, **attributes))

    def joined(
        size: int, batched: Sequence[bool], *operands: jax.Array
    ) -> tuple[list[jax.Array], list[bool]]:
        """Computes the rows of all runs in one call, each run's first rows first."""
        if batched[1]:
            return _looped(call("over_vocabulary", shapes, **attributes), batched, operands), [True] * 3
        of_run, counts = _of_runs(operands[0], size, batched[0]), _of_runs(operands[2], size, batched[2])
        order = jnp.argsort((jnp.arange(rows)[None] >= counts[:, None]).reshape(-1), stable=True)
        sums = over_vocabulary(
            jnp.take(_joined_rows(of_run), order, axis=0),
            operands[1],
            jnp.sum(counts),
            transposed=transposed,
            scale=scale,
            softcap=softcap,
            gradient=gradient,
        )
        back = jnp.argsort(order)
        return [jnp.take(x, back, axis=0).reshape(size, rows, *x.shape[1:]) for x in sums], [True] * 3

    called.def_vmap(joined)
    top, total, attended = called(*operands)
    return top, total, attended


# ---------------------------------------------------------------- gates


class Logistic(NamedTuple):
    """A gate with selection weight ``sigmoid(a z + b z^3)``."""

    a: float
    b: float

    def attributes(self) -> dict[str, Any]:
        """Returns the parameters as attributes of a library call."""
        return {"a": np.float32(self.a), "b": np.float32(self.b)}


def gate(z: jax.Array, u: jax.Array | None, logistic: Logistic) -> jax.Array:
    """Computes ``phi(z) u`` with ``phi(z) = z sigmoid(a z + b z^3)``; without u, ``phi(z)``.

    All arrays are bf16 of one shape; z and u may be views of bf16.
    """
    shapes = [jax.ShapeDtypeStruct((z.size,), jnp.uint16)]
    (out,) = row_call("gate", shapes, **logistic.attributes())(bf16_bits(z).reshape(-1), _factor(u, z))
    return from_bits(out.reshape(z.shape))


def gate_gradient(
    z: jax.Array, u: jax.Array | None, g: jax.Array, logistic: Logistic
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the gradients of z and u; g is the gradient of `gate`'s result, all bf16 of one shape."""
    chex.assert_equal_shape([z, g])
    flat = bf16_bits(z).reshape(-1), _factor(u, z), bf16_bits(g).reshape(-1)
    shapes = [jax.ShapeDtypeStruct((size,), jnp.uint16) for size in (z.size, flat[1].size)]
    results = row_call("gate_gradient", shapes, **logistic.attributes())(*flat)
    dz, du = map(from_bits, results)
    return dz.reshape(z.shape), None if u is None else du.reshape(z.shape)


def _factor(u: jax.Array | None, z: jax.Array) -> jax.Array:
    """Returns u, the factor of the gate, flat; an empty array means ones."""
    if u is None:
        return jnp.zeros((0,), jnp.uint16)
    chex.assert_equal_shape([z, u])
    return bf16_bits(u).reshape(-1)
