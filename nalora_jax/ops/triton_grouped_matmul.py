"""Grouped matmuls on a GPU: a Pallas kernel for Triton.

XLA has no such kernel on GPUs and multiplies every row by every group's kernel. This kernel visits
pairs of a tile of rows and a group with rows in the tile. A tile that several groups share is
visited once per group, and each visit stores the rows of its group only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.grouped_matmul import grouped_matmul
from nalora_jax.ops.triton_attention import TRITON

NAME = "grouped_matmul"  # the kernel's name, by which `nalora plan` recognises it
_ROWS, _COLUMNS, _INNER = 128, 128, 64  # tile sizes
_WARPS, _STAGES = 8, 3


@TRITON.implements(grouped_matmul)
def triton_grouped_matmul(
    x: jax.Array,
    kernels: jax.Array,
    sizes: jax.Array,
    numerics: Numerics,
    *,
    transposed: bool = False,
) -> jax.Array:
    """Computes `grouped_matmul` for bf16 operands."""
    if numerics.operand != "bfloat16":
        return NotImplemented
    return tiled(x, kernels, sizes, numerics, transposed=transposed)


def tiled(
    x: jax.Array,
    kernels: jax.Array,
    sizes: jax.Array,
    numerics: Numerics,
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Runs the kernel; for the arguments see `grouped_matmul`.

    ``interpret`` runs it without a GPU.
    """
    # Imported here, because Pallas costs every process 5 MB and a tenth of a second.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, groups, d_out = x.shape[0], kernels.shape[0], kernels.shape[1 if transposed else 2]
    # Padding rows belong to no group, so no visit stores them.
    x = jnp.pad(x, ((0, -rows % _ROWS), (0, 0)))
    tiles = x.shape[0] // _ROWS
    full_spec = lambda shape: pl.BlockSpec(shape, lambda i, j: (0,) * len(shape))  # noqa: E731
    visits = _visits(sizes, tiles)
    options: dict[str, Any] = {"name": NAME, "interpret": interpret}
    out: jax.Array = pl.pallas_call(
        partial(_kernel, transposed=transposed),
        grid=(tiles + groups - 1, pl.cdiv(d_out, _COLUMNS)),
        in_specs=[full_spec(array.shape) for array in (x, kernels, *visits)],
        out_specs=full_spec((x.shape[0], d_out)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], d_out), numerics.result),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        **options,
    )(x.astype(numerics.operand), kernels.astype(numerics.operand), *visits)
    return out[:rows]


def _visits(sizes: jax.Array, tiles: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns each visit's group, tile of rows, and the group's first row and end.

    All are int32 ``[tiles + groups - 1]``. Groups without rows have no visit; surplus visits have
    no rows.
    """
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    starts = ends - sizes
    first = starts // _ROWS
    touched = jnp.where(sizes > 0, (ends - 1) // _ROWS - first + 1, 0)
    until = jnp.cumsum(touched)
    visit = jnp.arange(tiles + sizes.shape[0] - 1, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(until, visit, side="right"), sizes.shape[0] - 1).astype(jnp.int32)
    tile = first[group] + visit - (until - touched)[group]
    left_over = visit >= until[-1]
    tile = jnp.where(left_over, 0, tile).astype(jnp.int32)
    return group, tile, jnp.where(left_over, 0, starts[group]), jnp.where(left_over, 0, ends[group])


def _kernel(
    x: Any, kernels: Any, group: Any, tile: Any, start: Any, end: Any, out: Any, *, transposed: bool
) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    d_in, d_out = x.shape[1], out.shape[1]
    visit, columns = pl.program_id(0), pl.ds(pl.program_id(1) * _COLUMNS, _COLUMNS)
    group_index, first = group[visit], tile[visit] * _ROWS
    rows = pl.ds(first, _ROWS)

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        inner = pl.ds(step * _INNER, _INNER)
        left = _loaded(x.at[rows, inner], [None, (inner, d_in)])
        if transposed:
            right = _loaded(kernels.at[group_index, columns, inner], [(columns, d_out), (inner, d_in)])
        else:
            right = _loaded(kernels.at[group_index, inner, columns], [(inner, d_in), (columns, d_out)])
        over = (((1,), (int(transposed),)), ((), ()))
        return total + lax.dot_general(left, right, over, preferred_element_type=jnp.float32)

    total = lax.fori_loop(0, pl.cdiv(d_in, _INNER), add, jnp.zeros((_ROWS, _COLUMNS), jnp.float32))
    row = first + lax.broadcasted_iota(jnp.int32, (_ROWS, _COLUMNS), 0)
    mine = (row >= start[visit]) & (row < end[visit])
    inside = _inside([None, (columns, d_out)], (_ROWS, _COLUMNS))
    if inside is not None:
        mine &= inside
    triton.store(out.at[rows, columns], total.astype(out.dtype), mask=mine)


Ranges = Sequence[tuple[Any, int] | None]  # by dimension: a tile's slice and the array's size


def _loaded(tile: Any, ranges: Ranges) -> jax.Array:
    """Returns a tile of an array, with zeros beyond the array's end."""
    from jax.experimental.pallas import triton

    mask = _inside(ranges, tile.shape)
    if mask is None:
        return triton.load(tile)
    return triton.load(tile, mask=mask, other=0)


def _inside(ranges: Ranges, shape: tuple[int, ...]) -> jax.Array | None:
    """Returns True for elements of a tile within the array; None if tiles divide the array."""
    mask = None
    for dimension, limits in enumerate(ranges):
        if limits is None or limits[1] % limits[0].size == 0:
            continue
        index = limits[0].start + lax.broadcasted_iota(jnp.int32, shape, dimension)
        within = index < limits[1]
        mask = within if mask is None else mask & within
    return mask
