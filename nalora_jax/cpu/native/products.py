"""Sums of bf16 matmuls in one call, with a batching rule for several runs that share kernels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from nalora_jax.cpu.native.calls import bits, call, join_rows, of_runs, vmap_axes
from nalora_jax.ops.storage import Stored

# Columns that the adapters of a group of runs may add to the contraction of a shared kernel.
_WIDEST = 128


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
        return lax.bitcast_convert_type(self.copied(), jnp.bfloat16).astype(dtype or jnp.bfloat16)


class Term(NamedTuple):
    """One product of a sum; both operands are bf16, or bf16 viewed as uint16."""

    x: jax.Array  # [rows, depth]
    y: Any  # an array or a `Slice`, [depth, columns] or [columns, depth]
    transposed: bool = False  # True for [columns, depth]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the product."""
        return self.x.shape[0], self.y.shape[int(not self.transposed)]


class Sum(NamedTuple):
    """The sum ``sum_t x_t y_t``."""

    terms: Sequence[Term]
    dtype: Any = "float32"  # of the result; "bfloat16" is rounded once, from the float32 sum


def products(*sums: Sum) -> list[jax.Array]:
    """Computes the sums ``[rows, columns]`` in one call, so that threads share all of the work.

    Under `jax.vmap` the call remains one: see `_of_all_runs`.

    Args:
      sums: the sums; rows and columns may differ between them.

    Raises:
      AssertionError: shapes or dtypes do not match.
    """
    for terms, _ in sums:
        rows, columns = terms[0].shape
        for x, y, transposed in terms:
            chex.assert_shape(x, (rows, None))
            chex.assert_equal(y.shape, (columns, x.shape[1]) if transposed else (x.shape[1], columns))
    operands = [[(bits(term.x), _view(term.y)) for term in terms] for terms, _ in sums]

    def filled(operands: Any) -> list[Sum]:
        return [
            Sum(
                [Term(x, y, old.transposed) for (x, y), old in zip(pairs, sum_.terms, strict=True)],
                sum_.dtype,
            )
            for pairs, sum_ in zip(operands, sums, strict=True)
        ]

    called = custom_vmap(lambda operands: _call(filled(operands)))
    called.def_vmap(
        lambda size, batched, operands: _of_all_runs(size, filled(batched[0]), filled(operands))
    )
    results: list[jax.Array] = called(operands)
    return results


def _view(y: Any) -> Any:
    if isinstance(y, Slice):
        return y
    return bits(y)


def _call(sums: Sequence[Sum]) -> list[jax.Array]:
    """Returns the results of one call; operands are uint16."""
    every = [term for terms, _ in sums for term in terms]
    slices = [term.y for term in every if isinstance(term.y, Slice)]
    operands = [
        x for term in every for x in (term.x, term.y.stack if isinstance(term.y, Slice) else term.y)
    ]
    attributes = {
        "terms": np.array([len(terms) for terms, _ in sums], np.int64),
        "transposed": np.array([term.transposed for term in every], np.int64),
        "stacked": np.array([isinstance(term.y, Slice) for term in every], np.int64),
    }
    shapes = [jax.ShapeDtypeStruct(terms[0].shape, _STORED[jnp.dtype(dtype).name]) for terms, dtype in sums]
    results = call("products", shapes, **attributes)(
        *operands, *(jnp.asarray(y.at, jnp.int32) for y in slices)
    )
    return [y if y.dtype == jnp.float32 else lax.bitcast_convert_type(y, jnp.bfloat16) for y in results]


_STORED = {"float32": jnp.float32, "bfloat16": jnp.uint16}


# ---------------------------------------------------------------- several runs


def _of_all_runs(
    size: int, batched: Sequence[Sum], sums: Sequence[Sum]
) -> tuple[list[jax.Array], list[bool]]:
    """Returns the sums of all runs, from one call.

    Runs that share a kernel become rows of one product. The product with a kernel of each run, as
    an adapter's B, joins the same sum: its operands x are blocks on a diagonal. Sums without a
    shared kernel are computed for each run. Results equal the results of single runs to the rounding of
    float32 sums, whose order may differ.
    """
    of_sum = [_groups(size, *both) for both in zip(batched, sums, strict=True)]
    results = iter(products(*itertools.chain(*of_sum)))
    joined = []
    for groups in of_sum:
        columns = groups[0].terms[0].shape[1]
        rows = [next(results).reshape(-1, columns) for _ in groups]
        joined.append(jnp.concatenate(rows).reshape(size, -1, columns))
    return joined, [True] * len(sums)


def _groups(size: int, batched: Sum, shared: Sum) -> list[Sum]:
    """Returns a sum of all runs as sums of consecutive runs."""
    terms = [_RunTerm.of(size, *both) for both in zip(batched.terms, shared.terms, strict=True)]
    depths = [term.x.shape[2] for term in terms if term.has_kernels]
    runs = size
    if depths:
        runs = max(1, _WIDEST // max(depths))
    if len(depths) == len(terms):
        runs = 1
    groups = [slice(start, start + runs) for start in range(0, size, runs)]
    return [Sum([term.joined(group) for term in terms], shared.dtype) for group in groups]


class _RunTerm(NamedTuple):
    """One product of each run."""

    x: jax.Array  # [runs, rows, depth]
    y: Any  # of all runs, or with an axis [runs]
    transposed: bool
    has_kernels: bool  # y has an axis [runs]

    @classmethod
    def of(cls, size: int, batched: Term, term: Term) -> _RunTerm:
        """Returns a term; ``batched`` has flags in place of its arrays."""
        x = of_runs(term.x, size, bool(batched.x))
        if any(jax.tree.leaves(batched.y)):
            return cls(x, _by_run(term.y, batched.y), term.transposed, True)
        return cls(x, term.y, term.transposed, False)

    def joined(self, group: slice) -> Term:
        """Returns the products of some runs as one."""
        x = self.x[group]
        if self.has_kernels:
            return Term(_diagonal(x), _by_depth(self.y[group], self.transposed), self.transposed)
        return Term(join_rows(x), self.y, self.transposed)


def _by_run(y: Any, flag: Any) -> jax.Array:
    """Returns a kernel that differs between runs, uint16 ``[runs, ...]``."""
    if not isinstance(y, Slice):
        return y
    copies: jax.Array = jax.vmap(Slice.copied, (vmap_axes(flag),))(y)
    return copies


def _diagonal(x: jax.Array) -> jax.Array:
    """Returns ``[runs, rows, depth]`` as a matrix with these blocks on its diagonal."""
    runs, rows, depth = x.shape
    if runs == 1:
        return x[0]
    on_diagonal = jnp.eye(runs, dtype=bool)[:, None, :, None]
    return jnp.where(on_diagonal, x[:, :, None, :], 0).reshape(runs * rows, runs * depth)


def _by_depth(y: jax.Array, transposed: bool) -> jax.Array:
    """Returns the kernels of runs joined along the contraction."""
    if transposed:
        return jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1)
    return y.reshape(-1, y.shape[2])
