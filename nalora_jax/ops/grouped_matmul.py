"""Matmuls of rows that are sorted by group with their group's kernel, for mixtures of experts.

Adapters of experts are low-rank. With the factors of all groups joined, every row is multiplied by
all of them and keeps its group's columns (`joins_factors`). One dense matmul then replaces a
grouped one with a few columns, which fills no matrix unit.

XLA has no grouped kernel on GPUs and multiplies every row by every group's kernel. A Pallas kernel
for Triton visits pairs of a tile of rows and a group with rows in the tile. A tile that several
groups share is visited once per group, and each visit stores the rows of its group only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from nalora_jax.ops.dispatch import Numerics, operation

_LANES = 128  # columns of a TPU's matrix unit: fewer columns take the same time
KERNEL_NAMES = (
    "grouped_matmul"  # the Triton kernel's name, by which `nalora plan` recognises it
)
# A tile of the Triton kernel: rows and columns of the result, and inputs that are loaded together.
_ROWS = 128
_COLUMNS = 128
_INNER = 64
# Triton's warps of a tile, and loads that it overlaps with matmuls.
_WARPS = 8
_STAGES = 3


@operation
def grouped_matmul(
    x: Array,
    kernels: Array,
    sizes: Array,
    numerics: Numerics,
    *,
    transposed: bool = False,
) -> Array:
    """Multiplies every row by its group's kernel: ``[rows, d_out]`` in ``numerics.result``, summed
    in float32.

    No gradient is defined if an implementation replaces the plain function.

    Args:
      x: ``[rows, d_in]``, sorted by group.
      kernels: ``[groups, d_in, d_out]``, or with ``transposed`` ``[groups, d_out, d_in]``.
      sizes: int ``[groups]``, rows of each group; their sum is ``rows``.
      numerics: dtypes of operands and result.
      transposed: multiply by the transposed kernels.
    """
    if transposed:
        kernels = kernels.swapaxes(1, 2)
    stored = grouped_result(numerics, numerics.result)
    return ragged(x, kernels, sizes, numerics.operand, stored).astype(numerics.result)


def ragged(
    x: Array, kernels: Array, sizes: Array, operand: str, result: str = "float32"
) -> Array:
    """Computes `lax.ragged_dot` ``[rows, d_out]`` with given dtypes; has no gradient.

    With an axis of runs (`jax.vmap`) it is one grouped matmul over the rows of all runs. Kernels
    that differ by run are separate groups; kernels that all runs share are read once.
    """
    product: Array = _ragged(
        x.astype(operand), kernels.astype(operand), sizes, jnp.zeros((0,), result)
    )
    return product


def ragged_outer(x: Array, y: Array, sizes: Array, operand: str) -> Array:
    """Computes ``x_g^T y_g`` over the rows of every group, float32 ``[groups, d, n]``; has no
    gradient.

    ``x [rows, d]``, rounded to ``operand``, and ``y [rows, n]`` are sorted by group.
    """
    product: Array = _ragged_outer(x.astype(operand), y.astype(jnp.float32), sizes)
    return product


@custom_vmap
def _ragged(x: Array, kernels: Array, sizes: Array, like: Array) -> Array:
    return lax.ragged_dot(x, kernels, sizes, preferred_element_type=like.dtype)


@_ragged.def_vmap
def _ragged_of_runs(
    runs: int,
    batched: Sequence[bool],
    x: Array,
    kernels: Array,
    sizes: Array,
    like: Array,
) -> tuple[Array, bool]:
    """Batches `_ragged`: returns ``[runs, rows, d_out]``, and True because the result has runs."""
    x = _with_runs(x, batched[0], runs)
    sizes = _with_runs(sizes, batched[2], runs)
    rows = x.reshape(-1, x.shape[-1])
    if batched[1]:
        # [runs, groups, d_in, d_out]
        _, _, *kernel = kernels.shape
        y = _ragged(rows, kernels.reshape(-1, *kernel), sizes.reshape(-1), like)
        return y.reshape(*x.shape[:2], -1), True
    # Shared kernels: the rows of all runs are sorted by group, multiplied and put back in order.
    ends = jnp.cumsum(sizes, axis=1)
    places = jnp.arange(x.shape[1])
    group_of = partial(jnp.searchsorted, v=places, side="right")
    group = jax.vmap(group_of)(ends)
    order = jnp.argsort(group.reshape(-1), stable=True)
    of_groups = jnp.sum(sizes, axis=0, dtype=sizes.dtype)
    y = _ragged(jnp.take(rows, order, axis=0), kernels, of_groups, like)
    y = jnp.take(y, jnp.argsort(order), axis=0)
    return y.reshape(*x.shape[:2], -1), True


@custom_vmap
def _ragged_outer(x: Array, y: Array, sizes: Array) -> Array:
    """Returns ``x_g^T y_g`` of every group, float32 ``[groups, d, n]``."""
    # The gradient of a grouped matmul by its kernels ``[groups, d, n]`` is this outer product.
    like = jax.ShapeDtypeStruct((sizes.shape[0], x.shape[1], y.shape[1]), x.dtype)
    product = partial(
        lax.ragged_dot, x, group_sizes=sizes, preferred_element_type=jnp.float32
    )
    outer: Array = jax.linear_transpose(product, like)(y)[0]
    return outer.astype(jnp.float32)


@_ragged_outer.def_vmap
def _ragged_outer_of_runs(
    runs: int, batched: Sequence[bool], x: Array, y: Array, sizes: Array
) -> tuple[Array, bool]:
    """Batches `_ragged_outer`: returns ``[runs, groups, d, n]``; the groups of each run are
    separate."""
    x = _with_runs(x, batched[0], runs)
    y = _with_runs(y, batched[1], runs)
    sizes = _with_runs(sizes, batched[2], runs)
    rows = x.reshape(-1, x.shape[-1])
    of_rows = y.reshape(-1, y.shape[-1])
    outer = _ragged_outer(rows, of_rows, sizes.reshape(-1))
    _, *kernel = outer.shape
    return outer.reshape(runs, -1, *kernel), True


def _with_runs(array: Array, is_batched: bool, runs: int) -> Array:
    """Returns ``array`` with a leading axis ``[runs]``, repeated unless ``is_batched``, when it
    already has the axis."""
    if is_batched:
        return array
    return jnp.broadcast_to(array, (runs, *array.shape))


def own_of_all(x: Array, factors: Array, group: Array, operand: str) -> Array:
    """Multiplies rows ``[rows, d]`` by the narrow factor of their group, of ``[groups, d, rank]``.

    One matmul with the joined factors; ``group`` is int ``[rows]``. The result is float32 ``[rows,
    rank]``.
    """
    groups, d, rank = factors.shape
    joined = factors.swapaxes(0, 1).reshape(d, groups * rank)
    products = _dot(x, joined, operand).reshape(-1, groups, rank)
    own = jax.nn.one_hot(group, groups, dtype=bool)  # [rows, groups]
    return jnp.sum(jnp.where(own[..., None], products, 0.0), axis=1)


def multiply_factor(hidden: Array, factors: Array, group: Array, operand: str) -> Array:
    """Multiplies rows ``[rows, rank]`` by their group's factor, of ``[groups, rank, d]``: float32
    ``[rows, d]``."""
    groups, rank, d = factors.shape
    joined = factors.reshape(groups * rank, d)
    return _dot(_in_all(hidden, group, groups), joined, operand)


def outer_of_all(x: Array, y: Array, group: Array, groups: int, operand: str) -> Array:
    """Computes ``x_g^T y_g`` of ``[rows, d]`` and ``[rows, n]`` over the rows of every group.

    The narrower side is spread over the columns of all groups. The result is float32 ``[groups, d,
    n]``.
    """
    d = x.shape[1]
    n = y.shape[1]
    if n < d:
        products = _dot(x.T, _in_all(y, group, groups), operand)  # [d, groups * n]
        return products.reshape(d, groups, n).swapaxes(0, 1)
    products = _dot(_in_all(x, group, groups).T, y, operand)  # [groups * d, n]
    return products.reshape(groups, d, n)


def _in_all(hidden: Array, group: Array, groups: int) -> Array:
    """Returns ``[rows, groups * rank]`` of ``[rows, rank]``: each row in its group's columns, 0 in
    the others."""
    own = jax.nn.one_hot(group, groups, dtype=bool)
    # [rows, groups, rank]
    by_group = jnp.where(own[..., None], hidden[:, None, :], 0.0)
    return by_group.reshape(hidden.shape[0], -1)


def _dot(x: Array, y: Array, operand: str) -> Array:
    """Multiplies two matrices, rounded to ``operand``, into a float32 result."""
    return jnp.dot(
        x.astype(operand), y.astype(operand), preferred_element_type=jnp.float32
    )


def grouped_result(numerics: Numerics, result: str) -> str:
    """Returns the dtype in which a result of `lax.ragged_dot` is stored.

    On a TPU XLA accumulates in float32 and rounds once, so that it is ``result``; elsewhere
    float32.
    """
    if numerics.facts_of == "tpu":
        return result
    return "float32"


def joins_factors(groups: int, rank: int, numerics: Numerics) -> bool:
    """Returns True if rows are multiplied by the adapters of all groups in one matmul.

    On a TPU this replaces one matmul per group if the factors of all groups fit into one tile, and
    its result is not written in full. Mixtral-8x7B on v6e, four layers compiled: 22% less HBM
    traffic. On a GPU XLA would otherwise copy the rows for every group.
    """
    if numerics.facts_of == "tpu":
        return groups * rank <= _LANES
    return numerics.facts_of == "gpu"


def recomputes_probe(groups: int, rank: int, numerics: Numerics) -> bool:
    """Returns True if the adapters' output on probed rows is computed a second time: on a TPU, if
    factors are joined.

    Mixtral-8x7B on v6e: NA-LoRA's HBM traffic is 1.007 of LoRA's instead of 1.028.
    """
    return numerics.facts_of == "tpu" and joins_factors(groups, rank, numerics)


@grouped_matmul.implements("triton")
def triton_grouped_matmul(
    x: Array,
    kernels: Array,
    sizes: Array,
    numerics: Numerics,
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> Array:
    """Computes `grouped_matmul` of bf16 operands; ``interpret`` runs the kernel without a GPU."""
    if numerics.operand != "bfloat16":
        return NotImplemented
    # Imported here, because Pallas costs every process 5 MB and a tenth of a second.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows = x.shape[0]
    groups, _, d_out = kernels.shape
    if transposed:
        _, d_out, _ = kernels.shape
    # Padding rows belong to no group, so no visit stores them.
    x = jnp.pad(x, ((0, -rows % _ROWS), (0, 0)))
    tiles = x.shape[0] // _ROWS
    full_spec = lambda shape: pl.BlockSpec(shape, lambda i, j: (0,) * len(shape))  # noqa: E731
    visits = _visits(sizes, tiles)
    options: dict[str, Any] = {"name": KERNEL_NAMES, "interpret": interpret}
    out: Array = pl.pallas_call(
        partial(_kernel, transposed=transposed),
        grid=(tiles + groups - 1, pl.cdiv(d_out, _COLUMNS)),
        in_specs=[full_spec(array.shape) for array in (x, kernels, *visits)],
        out_specs=full_spec((x.shape[0], d_out)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], d_out), numerics.result),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        **options,
    )(x.astype(numerics.operand), kernels.astype(numerics.operand), *visits)
    return out[:rows]


def _visits(sizes: Array, tiles: int) -> tuple[Array, Array, Array, Array]:
    """Returns each visit's group, tile of rows, and the group's first row and end, int32 ``[tiles +
    groups - 1]``.

    Groups without rows have no visit; surplus visits have no rows.
    """
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    starts = ends - sizes
    first = starts // _ROWS
    # Tiles with rows of a group.
    touched = jnp.where(sizes > 0, (ends - 1) // _ROWS - first + 1, 0)
    visits_end = jnp.cumsum(touched)
    first_visit = visits_end - touched
    groups = sizes.shape[0]
    visit = jnp.arange(tiles + groups - 1, dtype=jnp.int32)
    group = jnp.searchsorted(visits_end, visit, side="right")
    group = jnp.minimum(group, groups - 1).astype(jnp.int32)
    tile = first[group] + visit - first_visit[group]
    surplus = visit >= visits_end[-1]
    tile = jnp.where(surplus, 0, tile).astype(jnp.int32)
    first_row = jnp.where(surplus, 0, starts[group])
    end_row = jnp.where(surplus, 0, ends[group])
    return group, tile, first_row, end_row


def _kernel(
    x: Any,
    kernels: Any,
    group: Any,
    tile: Any,
    start: Any,
    end: Any,
    out: Any,
    *,
    transposed: bool,
) -> None:
    """Writes ``[_ROWS, _COLUMNS]`` of one visit: its group's rows within a tile, times the group's
    kernel, which is ``[d_out, d_in]`` if ``transposed``."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    d_in = x.shape[1]
    d_out = out.shape[1]
    visit = pl.program_id(0)
    columns = pl.ds(pl.program_id(1) * _COLUMNS, _COLUMNS)
    group_index = group[visit]
    first = tile[visit] * _ROWS
    rows = pl.ds(first, _ROWS)

    def add(step: Array, total: Array) -> Array:
        """Adds the product over ``_INNER`` inputs."""
        inner = pl.ds(step * _INNER, _INNER)
        left = _loaded(x.at[rows, inner], [None, (inner, d_in)])
        if transposed:
            right = _loaded(
                kernels.at[group_index, columns, inner],
                [(columns, d_out), (inner, d_in)],
            )
        else:
            right = _loaded(
                kernels.at[group_index, inner, columns],
                [(inner, d_in), (columns, d_out)],
            )
        over = (((1,), (int(transposed),)), ((), ()))
        return total + lax.dot_general(
            left, right, over, preferred_element_type=jnp.float32
        )

    total = lax.fori_loop(
        0, pl.cdiv(d_in, _INNER), add, jnp.zeros((_ROWS, _COLUMNS), jnp.float32)
    )
    row = first + lax.broadcasted_iota(jnp.int32, (_ROWS, _COLUMNS), 0)
    # A tile may have rows of several groups; each of its visits writes only its group's.
    mine = (row >= start[visit]) & (row < end[visit])
    inside = _inside([None, (columns, d_out)], (_ROWS, _COLUMNS))
    if inside is not None:
        mine &= inside
    triton.store(out.at[rows, columns], total.astype(out.dtype), mask=mine)


# By dimension, a tile's slice and the array's size; None for a dimension that tiles divide.
_Ranges = Sequence[tuple[Any, int] | None]


def _loaded(tile: Any, ranges: _Ranges) -> Array:
    """Returns a tile of an array, with zeros beyond the array's end."""
    from jax.experimental.pallas import triton

    mask = _inside(ranges, tile.shape)
    if mask is None:
        return triton.load(tile)
    return triton.load(tile, mask=mask, other=0)


def _inside(ranges: _Ranges, shape: tuple[int, ...]) -> Array | None:
    """Returns which elements of a tile are within the array, bool of ``shape``; None if tiles
    divide the array, so that all are."""
    mask = None
    for dimension, limits in enumerate(ranges):
        if limits is None or limits[1] % limits[0].size == 0:
            continue
        index = limits[0].start + lax.broadcasted_iota(jnp.int32, shape, dimension)
        within = index < limits[1]
        if mask is not None:
            within = mask & within
        mask = within
    return mask
