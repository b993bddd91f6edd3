"""The gated product and the projection behind it as one function, by native kernels (`nalora_jax.cpu.native`).

    h = phi(z) u,   y = h W + s (h A) B

The backward pass makes h again where it makes the gradients of z and u, from one reading of both: h is neither kept nor
made by a pass of its own. And what the gate selects serves the statistics where h is made, not once more where a
rematerialised layer makes h again.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.cpu import native
from nalora_jax.cpu.native import Logistic, Measured, Sum, Term
from nalora_jax.nn.matmul import KEPT_WIDE, Numerics, native_sums, stored
from nalora_jax.nn.side_by_side import Adapter, Projection, checked, input_terms, projected_fwd


class Gating(NamedTuple):
    """A gate and the regions of z that its statistics count."""

    logistic: Logistic
    cuts: tuple[float, float]


def gated_down(
    z: jax.Array,
    u: jax.Array,
    down: Projection,
    gating: Gating,
    measured: Measured | None,
    numerics: Numerics,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """``h W + s (h A) B`` with ``h = phi(z) u``, where products are native.

    Args:
      z, u: bf16 ``[..., d_ff]``.
      down: the projection, ``[d_ff, d_out]``; its kernel receives no gradient.
      gating: phi, and what to count.
      measured: what statistics are taken with, or None; constants of the backward pass.
      numerics: dtypes of operands and result; sums are float32.

    Returns:
      ``[..., d_out]`` in ``numerics.result``, the sums of `nalora_jax.cpu.native.gate_statistics`, or None, and h: it
      has no gradient of its own, is there to be checked, and costs nothing where it is not read.
    """
    chex.assert_equal_shape([z, u])
    chex.assert_axis_dimension(z, -1, down.kernel.shape[-2])
    down = checked(down, z.shape[-1])
    flat = (x.reshape(-1, x.shape[-1]) for x in (z, u))
    y, sums, h = _gated_down(*flat, down, lax.stop_gradient(measured), gating, (numerics.operand, numerics.result))
    return y.reshape(*z.shape[:-1], -1), sums, h.reshape(z.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _gated_down(
    z: jax.Array,
    u: jax.Array,
    down: Projection,
    measured: Measured | None,
    gating: Gating,
    dtypes: tuple[str, str],
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    return _gated_down_fwd(z, u, down, measured, gating, dtypes)[0]


def _gated_down_fwd(
    z: jax.Array,
    u: jax.Array,
    down: Projection,
    measured: Measured | None,
    gating: Gating,
    dtypes: tuple[str, str],
) -> tuple[tuple[jax.Array, jax.Array | None, jax.Array], tuple[Any, ...]]:
    z, u = (stored(x, "bfloat16", KEPT_WIDE) for x in (z, u))
    if measured is None:
        h, sums = native.gate(z, u, gating.logistic), None
    else:
        h, sums = native.gate_measured(z, u, measured, *gating)
    ((y,), _), (_, _, hidden) = projected_fwd(h, (down,), dtypes)
    return (y, sums, h), (z, u, down, hidden.get(0))


def _gated_down_bwd(
    gating: Gating, dtypes: tuple[str, str], kept: tuple[Any, ...], cotangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array, Projection, None]:
    (z, u, down, hidden), g = kept, cotangents[0]
    terms, backs = input_terms((g,), (down,), dtypes[0])
    if down.adapter is None:
        (dh,) = native_sums(Sum(terms, "bfloat16"))
        dz, du, _ = native.gate_gradient(z, u, dh, gating.logistic)
        return dz, du, Projection(None), None
    assert down.adapter.mask is None, "no gate: what is behind one"
    dh, db = native_sums(Sum(terms, "bfloat16"), Sum([Term(hidden.T, g)]))
    dz, du, h = native.gate_gradient(z, u, dh, gating.logistic, product=True)
    assert h is not None
    (da,) = native_sums(Sum([Term(backs[0].T, h)]))
    return dz, du, Projection(None, Adapter(da.T, db, jnp.zeros_like(down.adapter.scale))), None


_gated_down.defvjp(_gated_down_fwd, _gated_down_bwd)
