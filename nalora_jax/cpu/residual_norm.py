"""The residual stream and its norm by native kernels (`nalora_jax.cpu.native`), in one pass each way."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nalora_jax.cpu import native
from nalora_jax.cpu.matmul import is_native
from nalora_jax.ops import residual_norm as ops
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import SAVED


@ops.residual_norm.implements("cpu")
def residual_norm(
    x: jax.Array,
    y: jax.Array | None,
    scale: jax.Array,
    eps: float,
    numerics: Numerics,
    recomputed: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes the sum and norm of a float32 stream whose norm is a bf16 operand; always saves the sum."""
    rows = math.prod(x.shape[:-1])
    bf16 = numerics.within().result == numerics.residual == "bfloat16" and x.dtype == jnp.float32
    if not bf16 or not is_native(rows, numerics.operand, numerics):
        return NotImplemented
    flat = x.reshape(rows, -1), None if y is None else y.astype(x.dtype).reshape(rows, -1)
    total, normed = _residual_norm(*flat, scale, eps)
    return total.reshape(x.shape), normed.reshape(x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _residual_norm(
    x: jax.Array, y: jax.Array | None, scale: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    return _fwd(x, y, scale, eps)[0]


def _fwd(x: jax.Array, y: jax.Array | None, scale: jax.Array, eps: float) -> tuple[Any, Any]:
    total, bits, inverse = native.add_rms(x, y, eps)
    # A rematerialized layer recomputes the norm from these, in one pass over half of the bytes.
    bits, inverse = checkpoint_name(bits, SAVED), checkpoint_name(inverse, SAVED)
    return (total, native.normalise(bits, inverse, scale)), (bits, inverse, scale, y is None)


def _bwd(eps: float, residuals: Any, gradients: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    bits, inverse, scale, alone = residuals
    ds, dn = gradients
    dx = native.norm_gradient(bits, inverse, scale, dn, ds)
    return dx, None if alone else dx, jnp.zeros_like(scale)


_residual_norm.defvjp(_fwd, _bwd)
