"""Rounding to bf16 with integers: XLA:CPU does not vectorize loops that contain a conversion.

``silu(z) * u`` takes twice as long with one. Arrays that are saved in bf16 are saved as their bits
(`nalora_jax.cpu.storage`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nalora_jax.cpu.storage import Bits, bf16_bits
from nalora_jax.ops import storage
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import SAVED, Stored


@storage.rounded.implements("cpu")
def rounded(x: jax.Array, dtype: Any, numerics: Numerics) -> jax.Array:
    """Rounds float32 to bf16."""
    if (jnp.dtype(dtype), x.dtype) == (jnp.bfloat16, jnp.float32):
        return _rounded(x)
    return x.astype(dtype)


@jax.custom_vjp
def _rounded(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(_upper_bits(x), jnp.bfloat16)


_rounded.defvjp(lambda x: (_rounded(x), None), lambda _, g: (g.astype(jnp.float32),))


def _upper_bits(x: jax.Array) -> jax.Array:
    """Returns the bf16 bits of float32 ``x`` as uint16, rounded to nearest even.

    Infinities and NaN are kept.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    odd = (bits >> 16) & jnp.uint32(1)
    return ((bits + jnp.uint32(0x7FFF) + odd) >> 16).astype(jnp.uint16)


@storage.save_residual.implements("cpu")
def save_residual(x: jax.Array, dtype: str, numerics: Numerics, name: str = SAVED) -> jax.Array | Stored:
    """Saves bf16 as its bits."""
    x = rounded(x, dtype, numerics)
    named: jax.Array = checkpoint_name(bf16_bits(x), name)
    if x.dtype == jnp.bfloat16:
        return Bits(named)
    return named
