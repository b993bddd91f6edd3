"""A frozen kernel and its adapter as one product: ``x W + s (x A) B`` without a second pass over the wide side.

The adapter's arithmetic is nothing, but its passes over ``[tokens, d_ff]`` are not where memory is the limit: on CPU
they cost a third of the frozen products that they accompany. Here the low-rank factor on the wide side rides along in
the frozen product, as ``r`` more rows or columns of its kernel::

    wide output (gate, up)   y  = [x, s x A] [W; B]      dx = g [W; B]^T, its last r columns being g B^T
    wide input (down)        y  = x [W, A], whose last r columns are x A
                             dx = [g, s g B^T] [W, A]^T

Native products (`nalora_jax.nn.side_by_side`) add up without any of that. Equal to `nalora_jax.nn.matmul.matmul` plus
`nalora_jax.nn.low_rank.residual`, masks included, but for the rounding of the factors to the operand dtype.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp

from nalora_jax.nn.matmul import (
    Kernel,
    Numerics,
    as_integers,
    beside_masked,
    contraction_multiple,
    dot,
    expand,
    is_native,
    rounded,
    stored,
    unpack_leaf,
)
from nalora_jax.nn.side_by_side import Adapter, Projection, project


def worthwhile(x: jax.Array, kernel: Kernel) -> bool:
    """Whether x has so many rows that what a second pass costs is more than a copy of the kernel beside its factor.

    It has not where text is generated: there the copy would be made for every token.
    """
    return 2 * math.prod(x.shape[:-1]) >= kernel.shape[-2]


def adapted_matmul(
    x: jax.Array,
    kernel: Kernel,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array | float,
    mask: jax.Array | None,
    numerics: Numerics,
) -> jax.Array:
    """``x W + s (x A) B`` with the gated gradient of A where there is a mask.

    Args:
      x: ``[..., d_in]``.
      kernel: frozen ``[d_in, d_out]``: float, packed or quantized. It receives no gradient.
      a: ``[d_in, r]`` float32.
      b: ``[r, d_out]`` float32.
      scale: scalar ``s``.
      mask: ``[d_out]`` weights of the output channels in A's gradient, or None.
      numerics: dtypes of operands and result; sums are float32.

    Returns:
      ``[..., d_out]`` in ``numerics.result``.
    """
    chex.assert_shape(a, (x.shape[-1], b.shape[0]))
    chex.assert_shape(b, (a.shape[1], kernel.shape[-1]))
    flat = x.reshape(-1, x.shape[-1])
    if is_native(flat.shape[0], numerics.operand):
        return project(x, [Projection(kernel, Adapter(a, b, scale, mask))], numerics)[0].y
    y = _adapted(flat, kernel, a, b, jnp.asarray(scale, jnp.float32), mask, (numerics.operand, numerics.result))
    return y.reshape(*x.shape[:-1], b.shape[-1])


def _joined(first: jax.Array, second: jax.Array, axis: int, operand: str, multiple: int = 1) -> jax.Array:
    """Both rounded, one behind the other, and zeros up to the next ``multiple``."""
    # As integers: XLA:CPU would join bf16 in float32, and convert both ways.
    parts = [as_integers(rounded(part, operand)) for part in (first, second)]
    if missing := -sum(part.shape[axis] for part in parts) % multiple:
        shape = (*parts[0].shape[:axis], missing, *parts[0].shape[axis + 1 :])
        parts.append(jnp.zeros(shape, parts[0].dtype))
    return unpack_leaf(jnp.concatenate(parts, axis=axis))


def _narrow(x: jax.Array, y: jax.Array, operand: str) -> jax.Array:
    """``x^T y`` of a narrow x ``[tokens, r]`` and a wide y ``[tokens, d]``: ``[r, d]``."""
    # XLA:CPU contracts the rows of a left operand in float32 only, for which the wide side would be made twice. With a
    # row of zeros the transposed side is an array of its own, which XLA does not fold back into the product.
    turned = as_integers(rounded(x, operand)).T
    turned = unpack_leaf(jnp.concatenate([turned, jnp.zeros_like(turned[:1])]))
    return dot(turned, y, operand)[: x.shape[1]]


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _adapted(
    x: jax.Array,
    kernel: Any,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    mask: jax.Array | None,
    dtypes: tuple[str, str],
) -> jax.Array:
    return _adapted_fwd(x, kernel, a, b, scale, mask, dtypes)[0]


def _adapted_fwd(
    x: jax.Array,
    kernel: Any,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
    mask: jax.Array | None,
    dtypes: tuple[str, str],
) -> tuple[jax.Array, tuple[Any, ...]]:
    (d_in, d_out), (operand, result) = kernel.shape, dtypes
    multiple = contraction_multiple(operand)
    # s x A is kept by a rematerialised layer: r columns, for which it would make a product (or a pass over x) again.
    if d_out > d_in:
        hidden = stored(scale * dot(x, a, operand), "float32")
        y = dot(_joined(x, hidden, 1, operand, multiple), _joined(expand(kernel), b, 0, operand, multiple), operand)
    else:
        both = dot(x, _joined(expand(kernel), a, 1, operand), operand)
        hidden = stored(scale * both[:, d_out:], "float32")
        y = both[:, :d_out] + dot(hidden, b, operand)
    return rounded(y, result), (x, kernel, a, b, scale, mask, hidden)


def _adapted_bwd(dtypes: tuple[str, str], kept: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
    x, kernel, a, b, scale, mask, hidden = kept
    (d_in, d_out), rank, operand = kernel.shape, b.shape[0], dtypes[0]
    multiple = contraction_multiple(operand)
    wide = beside_masked(b, mask)
    if d_out > d_in:
        both = dot(g, _joined(expand(kernel), wide, 0, operand), operand, dims=(1, 1))
        back = scale * both[:, d_in:]  # [tokens, r] or [tokens, 2 r]
        dx = both[:, :d_in] + dot(back[:, :rank], a, operand, dims=(1, 1))
    else:
        back = scale * dot(g, wide, operand, dims=(1, 1))
        factors = _joined(g, back[:, :rank], 1, operand, multiple), _joined(expand(kernel), a, 1, operand, multiple)
        dx = dot(*factors, operand, dims=(1, 1))
    da, db = _narrow(back[:, -rank:], x, operand), _narrow(hidden, g, operand)
    dx = rounded(dx, x.dtype)
    return dx, None, da.T, db, jnp.zeros_like(scale), None if mask is None else jnp.zeros_like(mask)


_adapted.defvjp(_adapted_fwd, _adapted_bwd)
