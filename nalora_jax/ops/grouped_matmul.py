"""Matmuls of rows that are sorted by group with their group's kernel, for mixtures of experts.

Adapters of experts are low-rank. With the factors of all groups joined, every row is multiplied by all
of them and keeps its group's columns (`dispatch.PlatformHooks.joins_expert_factors`). One dense matmul
then replaces a grouped one with a few columns, which fills no matrix unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from nalora_jax.ops.dispatch import Numerics, operation


@operation
def grouped_matmul(
    x: jax.Array, kernels: jax.Array, sizes: jax.Array, numerics: Numerics, *, transposed: bool = False
) -> jax.Array:
    """Multiplies every row by its group's kernel.

    No gradient is defined if an implementation replaces the plain function.

    Args:
      x: ``[rows, d_in]``, sorted by group.
      kernels: ``[groups, d_in, d_out]``, or with ``transposed`` ``[groups, d_out, d_in]``.
      sizes: int ``[groups]``, rows of each group; their sum is ``rows``.
      numerics: dtypes of operands and result.
      transposed: multiply by the transposed kernels.

    Returns:
      ``[rows, d_out]`` in ``numerics.result``, accumulated in float32.
    """
    if transposed:
        kernels = kernels.swapaxes(1, 2)
    stored = numerics.hooks.grouped_result(numerics.result)
    return ragged(x, kernels, sizes, numerics.operand, stored).astype(numerics.result)


def ragged(
    x: jax.Array, kernels: jax.Array, sizes: jax.Array, operand: str, result: str = "float32"
) -> jax.Array:
    """Computes `lax.ragged_dot` ``[rows, d_out]`` with given dtypes; has no gradient.

    With an axis of runs (`jax.vmap`) it is one grouped matmul over the rows of all runs. Kernels that
    differ by run are separate groups; kernels that all runs share are read once.
    """
    like = jnp.zeros((0,), result)
    product: jax.Array = _ragged(x.astype(operand), kernels.astype(operand), sizes, like)
    return product


def ragged_outer(x: jax.Array, y: jax.Array, sizes: jax.Array, operand: str) -> jax.Array:
    """Computes ``x_g^T y_g`` over the rows of every group, float32 ``[groups, d, n]``; has no gradient.

    Args:
      x: ``[rows, d]``, sorted by group.
      y: ``[rows, n]``, the same.
      sizes: int ``[groups]``.
      operand: dtype of x.
    """
    product: jax.Array = _ragged_outer(x.astype(operand), y.astype(jnp.float32), sizes)
    return product


@custom_vmap
def _ragged(x: jax.Array, kernels: jax.Array, sizes: jax.Array, like: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, kernels, sizes, preferred_element_type=like.dtype)


@_ragged.def_vmap
def _ragged_of_runs(
    runs: int,
    batched: Sequence[bool],
    x: jax.Array,
    kernels: jax.Array,
    sizes: jax.Array,
    like: jax.Array,
) -> tuple[jax.Array, bool]:
    x, sizes = _with_runs(x, batched[0], runs), _with_runs(sizes, batched[2], runs)
    rows = x.reshape(-1, x.shape[-1])
    if batched[1]:
        y = _ragged(rows, kernels.reshape(-1, *kernels.shape[2:]), sizes.reshape(-1), like)
        return y.reshape(*x.shape[:2], -1), True
    ends, places = jnp.cumsum(sizes, axis=1), jnp.arange(x.shape[1])
    group = jax.vmap(lambda of_run: jnp.searchsorted(of_run, places, side="right"))(ends)
    order = jnp.argsort(group.reshape(-1), stable=True)
    y = _ragged(jnp.take(rows, order, axis=0), kernels, jnp.sum(sizes, axis=0, dtype=sizes.dtype), like)
    return jnp.take(y, jnp.argsort(order), axis=0).reshape(*x.shape[:2], -1), True


@custom_vmap
def _ragged_outer(x: jax.Array, y: jax.Array, sizes: jax.Array) -> jax.Array:
    like = jax.ShapeDtypeStruct((sizes.shape[0], x.shape[1], y.shape[1]), x.dtype)
    product = partial(lax.ragged_dot, x, group_sizes=sizes, preferred_element_type=jnp.float32)
    outer: jax.Array = jax.linear_transpose(product, like)(y)[0]
    return outer.astype(jnp.float32)


@_ragged_outer.def_vmap
def _ragged_outer_of_runs(
    runs: int, batched: Sequence[bool], x: jax.Array, y: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, bool]:
    x, y, sizes = (_with_runs(*array, runs) for array in zip((x, y, sizes), batched, strict=True))
    outer = _ragged_outer(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), sizes.reshape(-1))
    return outer.reshape(runs, -1, *outer.shape[1:]), True


def _with_runs(array: jax.Array, is_batched: bool, runs: int) -> jax.Array:
    """Returns ``[runs, ...]``."""
    if is_batched:
        return array
    return jnp.broadcast_to(array, (runs, *array.shape))


def own_of_all(x: jax.Array, factors: jax.Array, group: jax.Array, operand: str) -> jax.Array:
    """Multiplies rows by their group's narrow factor, in one matmul with the joined factors.

    Args:
      x: ``[rows, d]``.
      factors: ``[groups, d, rank]``.
      group: int ``[rows]``.
      operand: dtype of the operands.

    Returns:
      float32 ``[rows, rank]``.
    """
    groups, d, rank = factors.shape
    joined = factors.swapaxes(0, 1).reshape(d, groups * rank)
    products = _dot(x, joined, operand).reshape(-1, groups, rank)
    return jnp.sum(jnp.where(_own(group, groups)[..., None], products, 0.0), axis=1)


def own_in_all(hidden: jax.Array, group: jax.Array, groups: int) -> jax.Array:
    """Places each row ``[rank]`` in its group's columns of ``[groups * rank]``, 0 in the others.

    ``hidden`` is ``[rows, rank]``; the result is ``[rows, groups * rank]``.
    """
    return jnp.where(_own(group, groups)[..., None], hidden[:, None, :], 0.0).reshape(hidden.shape[0], -1)


def from_all(hidden: jax.Array, factors: jax.Array, group: jax.Array, operand: str) -> jax.Array:
    """Multiplies ``hidden [rows, rank]`` by its group's ``factors [groups, rank, d]``.

    The result is float32 ``[rows, d]``.
    """
    groups, rank, d = factors.shape
    return _dot(own_in_all(hidden, group, groups), factors.reshape(groups * rank, d), operand)


def outer_of_all(x: jax.Array, y: jax.Array, group: jax.Array, groups: int, operand: str) -> jax.Array:
    """Computes ``x_g^T y_g`` over the rows of every group.

    The narrower side is spread over the columns of all groups.

    Args:
      x: ``[rows, d]``.
      y: ``[rows, n]``.
      group: int ``[rows]``.
      groups: number of groups.
      operand: dtype of the operands.

    Returns:
      float32 ``[groups, d, n]``.
    """
    d, n = x.shape[1], y.shape[1]
    if n < d:
        return _dot(x.T, own_in_all(y, group, groups), operand).reshape(d, groups, n).swapaxes(0, 1)
    return _dot(own_in_all(x, group, groups).T, y, operand).reshape(groups, d, n)


def _own(group: jax.Array, groups: int) -> jax.Array:
    return jax.nn.one_hot(group, groups, dtype=bool)


def _dot(x: jax.Array, y: jax.Array, operand: str) -> jax.Array:
    return jnp.dot(x.astype(operand), y.astype(operand), preferred_element_type=jnp.float32)
