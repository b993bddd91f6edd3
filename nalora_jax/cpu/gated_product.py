"""The product of a gate by native kernels (`nalora_jax.cpu.native`), in one pass each way."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nalora_jax.cpu import native
from nalora_jax.cpu.native import Logistic
from nalora_jax.cpu.storage import usable
from nalora_jax.method import ffn
from nalora_jax.method.activations import Activation
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import SAVED_WIDE, read_residual, save_residual


@ffn.gated_product.implements("cpu")
def gated_product(
    z: jax.Array, u: jax.Array | None, activation: Activation, numerics: Numerics, up_limit: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Computes ``phi(z) u`` of bf16 if phi's selection weight is a logistic function."""
    bf16 = z.dtype == jnp.bfloat16 and numerics.residual == "bfloat16"
    if activation.logistic is None or not bf16 or up_limit or not usable(numerics):
        return NotImplemented
    product = _gated_product(z, u, Logistic(*activation.logistic), numerics)
    return product, activation.phi(z.astype(numerics.result))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gated_product(z: jax.Array, u: jax.Array | None, logistic: Logistic, numerics: Numerics) -> jax.Array:
    return native.gate(z, u, logistic)


def _fwd(z: jax.Array, u: jax.Array | None, logistic: Logistic, numerics: Numerics) -> Any:
    saved = [None if x is None else save_residual(x, "bfloat16", numerics, SAVED_WIDE) for x in (z, u)]
    return native.gate(*_read(saved), logistic), saved


def _bwd(
    logistic: Logistic, numerics: Numerics, saved: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    return native.gate_gradient(*_read(saved), g, logistic)


def _read(saved: Any) -> tuple[jax.Array, jax.Array | None]:
    z, u = saved
    return read_residual(z, "bfloat16"), None if u is None else read_residual(u, "bfloat16")


_gated_product.defvjp(_fwd, _bwd)
