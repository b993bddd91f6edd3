"""Layers that read the same input, by native products (`nalora_jax.cpu.native`): one call for all of them, each way.

    y_i = x W_i + s_i (x A_i) B_i           dx = sum_i g_i W_i^T + s_i (g_i B_i^T) A_i^T

Threads share the work of all layers, and the sum over layers is made where their products are: apart, each gradient of
the input would be written whole, and read again to be added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from nalora_jax.cpu.native import Sum, Term
from nalora_jax.nn.matmul import Numerics, beside_masked, factor, native_sums, stored


class Adapter(NamedTuple):
    """A low-rank adapter of a projection."""

    a: jax.Array  # float32 [d_in, r]
    b: jax.Array  # float32 [r, d_out]
    scale: jax.Array | float = 1.0  # scalar s
    mask: jax.Array | None = None  # [d_out], weights of the output channels in A's gradient


class Projection(NamedTuple):
    """A frozen kernel, which receives no gradient, and its adapter if it has one."""

    kernel: Any  # `nalora_jax.nn.matmul.Kernel` [d_in, d_out]; in a gradient None
    adapter: Adapter | None = None


class Projected(NamedTuple):
    """What comes of a projection."""

    y: jax.Array  # [..., d_out]
    hidden: jax.Array | None  # s x A, float32 [..., r]; no gradient flows back from it


def project(x: jax.Array, projections: Sequence[Projection], numerics: Numerics) -> list[Projected]:
    """``x W + s (x A) B`` of every projection, where `nalora_jax.nn.matmul.is_native`.

    Args:
      x: ``[..., d_in]``.
      projections: what reads it.
      numerics: dtypes of operands and results; sums are float32.

    Returns:
      For each ``[..., d_out]`` in ``numerics.result``, and what its adapter made of x on the way.
    """
    parts = [checked(part, x.shape[-1]) for part in projections]
    ys, hidden = _projected(x.reshape(-1, x.shape[-1]), tuple(parts), (numerics.operand, numerics.result))
    reshaped = jax.tree.map(lambda y: y.reshape(*x.shape[:-1], -1), (ys, hidden))
    return [Projected(y, reshaped[1].get(i)) for i, y in enumerate(reshaped[0])]


def checked(part: Projection, d_in: int) -> Projection:
    """A projection of ``d_in`` numbers whose adapter fits, its scale an array."""
    if part.adapter is None:
        return part
    a, b, scale, _ = part.adapter
    chex.assert_shape(a, (d_in, None))
    chex.assert_shape(b, (a.shape[1], part.kernel.shape[-1]))
    return part._replace(adapter=part.adapter._replace(scale=jnp.asarray(scale, jnp.float32)))


def _adapters(parts: Sequence[Projection]) -> dict[int, Adapter]:
    """The adapters, by the number of their projection."""
    return {i: part.adapter for i, part in enumerate(parts) if part.adapter is not None}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _projected(
    x: jax.Array, parts: tuple[Projection, ...], dtypes: tuple[str, str]
) -> tuple[tuple[jax.Array, ...], dict[int, jax.Array]]:
    return projected_fwd(x, parts, dtypes)[0]


def projected_fwd(x: jax.Array, parts: tuple[Projection, ...], dtypes: tuple[str, str]) -> tuple[Any, tuple[Any, ...]]:
    """The results with each s x A by its projection's number, and what the backward pass reads: x, parts, s x A."""
    (operand, result), rows = dtypes, x.shape[0]
    adapters = _adapters(parts)
    narrow = native_sums(*(Sum([Term(x, adapter.a)]) for adapter in adapters.values())) if adapters else []
    # s x A is kept by a rematerialised layer: r columns, for which it would make a pass over x again.
    hidden = {i: stored(adapters[i].scale * y, "float32") for i, y in zip(adapters, narrow, strict=True)}
    terms = [[Term(x, factor(part.kernel, rows, operand))] for part in parts]
    for i, adapter in adapters.items():
        terms[i].append(Term(hidden[i], adapter.b))
    ys = native_sums(*(Sum(of, result) for of in terms))
    return (tuple(ys), hidden), (x if adapters else jnp.zeros((0,), x.dtype), parts, hidden)


def input_terms(
    gs: Sequence[jax.Array], parts: Sequence[Projection], operand: str
) -> tuple[list[Term], dict[int, jax.Array]]:
    """What the gradient of the input is the sum of, given those of the results.

    Returns:
      The terms, and s g B^T of each adapter by its projection's number: float32 ``[rows, r]``, or ``[rows, 2 r]`` with
      what A's gradient takes last where there is a mask.
    """
    adapters = _adapters(parts)
    wide = [Sum([Term(gs[i], beside_masked(adapter.b, adapter.mask), True)]) for i, adapter in adapters.items()]
    narrow = native_sums(*wide) if wide else []
    backs = {i: adapters[i].scale * back for i, back in zip(adapters, narrow, strict=True)}
    terms = [Term(g, factor(part.kernel, g.shape[0], operand), True) for g, part in zip(gs, parts, strict=True)]
    terms += [Term(backs[i][:, : adapter.a.shape[1]], adapter.a, True) for i, adapter in adapters.items()]
    return terms, backs


def _projected_bwd(
    dtypes: tuple[str, str], kept: tuple[Any, ...], cotangents: tuple[tuple[jax.Array, ...], Any]
) -> tuple[jax.Array, tuple[Projection, ...]]:
    (x, parts, hidden), gs = kept, cotangents[0]
    terms, backs = input_terms(gs, parts, dtypes[0])
    adapters, gradients = _adapters(parts), []
    for i, adapter in adapters.items():
        rank = adapter.a.shape[1]
        gradients += [Sum([Term(backs[i][:, -rank:].T, x)]), Sum([Term(hidden[i].T, gs[i])])]
    dx, *found = native_sums(Sum(terms, x.dtype), *gradients)
    back_parts = [Projection(None) for _ in parts]
    for (i, adapter), da, db in zip(adapters.items(), found[::2], found[1::2], strict=True):
        mask = None if adapter.mask is None else jnp.zeros_like(adapter.mask)
        back_parts[i] = Projection(None, Adapter(da.T, db, jnp.zeros_like(adapter.scale), mask))
    return dx, tuple(back_parts)


_projected.defvjp(projected_fwd, _projected_bwd)
