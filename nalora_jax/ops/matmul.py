"""Matmuls with frozen kernels, accumulated in float32."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.ops.dispatch import Numerics, operation
from nalora_jax.ops.storage import Kernel, expand, rounded


@operation
def dot(
    x: jax.Array,
    y: Kernel,
    numerics: Numerics,
    dims: tuple[int, int] = (1, 0),
    operand: str = "",
    result: Any = "float32",
) -> jax.Array:
    """Multiplies two matrices over one dimension of each, with sums in float32.

    Args:
      x: matrix.
      y: matrix, in any storage form.
      numerics: of the forward pass.
      dims: contracted dimension of x and of y.
      operand: dtype that both are rounded to; "" is ``numerics.operand``.
      result: dtype of the result.
    """
    operand = operand or numerics.operand
    operands = rounded(x, operand, numerics), rounded(expand(y, operand), operand, numerics)
    contract = (((dims[0],), (dims[1],)), ((), ()))
    product = lax.dot_general(*operands, contract, preferred_element_type=jnp.float32)
    return rounded(product, result, numerics)


def matmul(x: jax.Array, kernel: Kernel, numerics: Numerics) -> jax.Array:
    """Computes ``x @ kernel`` for a frozen kernel.

    Args:
      x: ``[..., d_in]``.
      kernel: ``[d_in, d_out]``, as it is stored. It receives **no gradient**: zeros.
      numerics: dtypes of operands and result.

    Returns:
      ``[..., d_out]`` in ``numerics.result``.
    """
    # Two-dimensional operands: XLA:CPU needs 60% more time for the same matmul in three dimensions.
    y = _matmul(x.reshape(-1, x.shape[-1]), kernel, numerics)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, kernel: Any, numerics: Numerics) -> jax.Array:
    return dot(x, kernel, numerics, result=numerics.result)


def _matmul_fwd(x: jax.Array, kernel: Any, numerics: Numerics) -> tuple[jax.Array, tuple[Any, ...]]:
    # x is not saved, because a frozen kernel has no gradient. The kernel is saved as it is stored.
    return _matmul(x, kernel, numerics), (kernel, jnp.zeros((0,), x.dtype))


def _matmul_bwd(numerics: Numerics, residuals: tuple[Any, ...], g: jax.Array) -> tuple[jax.Array, None]:
    # Autodiff would mix a float32 cotangent with a bf16 kernel; here both are rounded to
    # the operands' dtype.
    kernel, like_x = residuals
    return dot(g, kernel, numerics, dims=(1, 1), result=like_x.dtype), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
