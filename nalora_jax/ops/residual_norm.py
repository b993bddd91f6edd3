"""Residual addition and the root-mean-square norm of the sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import SAVED, round_and_save


def residual_norm(
    x: Array,
    y: Array | None,
    scale: Array,
    eps: float,
    numerics: Numerics,
    recomputed: bool = False,
) -> tuple[Array, Array]:
    """Returns ``x + y`` and its norm in ``numerics.result``; x, and y if it is not None, are
    ``[..., d]``.

    The norm reads the sum as it is saved for the backward pass; the sum itself is not rounded.
    ``scale`` is frozen float32 ``[d]``. With ``recomputed``, x and y follow from saved arrays
    without a matmul, so that the sum need not be saved.
    """
    total = x
    if y is not None:
        total = x + y.astype(x.dtype)
    read = total
    if not recomputed:
        read = round_and_save(total, numerics)
    return total, rms_norm(read, scale, eps).astype(numerics.result)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Returns ``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, in float32."""
    x = x.astype(jnp.float32)
    # A rematerialized layer saves this one number per token; recomputing it would read all of x
    # again.
    inverse = checkpoint_name(
        jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps), SAVED
    )
    return x * inverse * jnp.broadcast_to(scale, x.shape)
