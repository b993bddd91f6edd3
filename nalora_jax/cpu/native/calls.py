"""Calls of the native library, and their batching: several runs of a sweep take one call.

`jax.vmap` of a foreign call is a loop by default. Operands of the kernels here have an axis of rows
first, so that the rows of all runs are joined instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from nalora_jax.cpu.native.library import name_of

Shapes = Sequence[jax.ShapeDtypeStruct]


def call(function: str, shapes: Shapes, **attributes: Any) -> Callable[..., list[jax.Array]]:
    """Returns a call of the library; `jax.vmap` makes it a loop."""
    called = jax.ffi.ffi_call(name_of(function), shapes, vmap_method="sequential")
    return lambda *operands: list(called(*operands, **attributes))


def row_call(
    function: str, shapes: Shapes, shared: tuple[int, ...] = (), **attributes: Any
) -> Callable[..., list[jax.Array]]:
    """Returns a call of the library that `jax.vmap` makes one call for the rows of all runs.

    Args:
      function: name in the library.
      shapes: of the results, with an axis of rows first.
      shared: places of operands without rows; if these are batched, the call becomes a loop.
        The other operands have an axis of rows first, of length 1 if all rows are equal.
      attributes: of the call.
    """
    called = custom_vmap(call(function, shapes, **attributes))

    def joined(
        size: int, batched: Sequence[bool], *operands: jax.Array
    ) -> tuple[list[jax.Array], list[bool]]:
        every = [True] * len(shapes)
        if any(batched[place] for place in shared):
            return looped(call(function, shapes, **attributes), batched, operands), every
        rows = shapes[0].shape[0]
        flat = [
            x if place in shared else join_rows(of_runs(x, size, batched[place]), rows)
            for place, x in enumerate(operands)
        ]
        wide = [
            jax.ShapeDtypeStruct((size * shape.shape[0], *shape.shape[1:]), shape.dtype) for shape in shapes
        ]
        results = row_call(function, wide, shared, **attributes)(*flat)
        return [y.reshape(size, *shape.shape) for y, shape in zip(results, shapes, strict=True)], every

    called.def_vmap(joined)
    return called


def looped(
    called: Callable[..., list[jax.Array]], batched: Sequence[bool], operands: Sequence[jax.Array]
) -> list[jax.Array]:
    """Returns the results of all runs from one call for each."""
    return jax.vmap(called, vmap_axes(list(batched)))(*operands)


def vmap_axes(batched: Any) -> Any:
    """Returns ``in_axes`` of `jax.vmap` for a tree of flags: 0 for True, None for False."""
    return jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)


def of_runs(x: jax.Array, size: int, batched: bool) -> jax.Array:
    """Returns an operand with an axis ``[runs]``."""
    if batched:
        return x
    return jnp.broadcast_to(x, (size, *x.shape))


def join_rows(x: jax.Array, rows: int = 1) -> jax.Array:
    """Returns ``[runs, n, ...]`` as ``[runs * n, ...]``; n = 1 is repeated for each of ``rows``."""
    if x.shape[1] == 1:
        x = jnp.broadcast_to(x, (x.shape[0], rows, *x.shape[2:]))
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def bits(x: jax.Array) -> jax.Array:
    """Returns bf16 as uint16; the view itself is returned unchanged."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16)
    chex.assert_type(x, jnp.uint16)
    return x
