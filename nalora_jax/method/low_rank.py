"""A frozen dense layer with a low-rank adapter, and the gated gradient of A.

    y = x W + b + s (x A) B

W and b are frozen and have no gradient. The adapter of a gate has a mask m with one weight for each
output channel (mechanism 1). The mask does not change the value. With g the cotangent of y,

    dx = g W^T + s (g B^T) A^T          exact
    dB = s (x A)^T g                    exact
    dA = s x^T (g (B * m)^T)            gated: the mask weighs the channels that shape A

A masked dB would starve the optimizer's moments; a masked dx would bias the gradients of the layers
below.

Sources: LoRA, arXiv 2106.09685; DoRA, 2402.09353.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nalora_jax.ops.dispatch import Numerics, operation
from nalora_jax.ops.matmul import dot, matmul
from nalora_jax.ops.storage import SAVED, Kernel, expand


class Adapter(NamedTuple):
    """A low-rank adapter."""

    a: jax.Array  # float32 [d_in, r]
    b: jax.Array  # float32 [r, d_out]
    scale: jax.Array | float = 1.0  # scalar s
    mask: jax.Array | None = None  # [d_out], weights of the output channels in A's gradient
    magnitude: jax.Array | None = None  # [d_out], of a weight-decomposed adapter (DoRA)
    start: tuple[jax.Array, jax.Array] | None = None  # initial A and B if B is not 0 (PiSSA, LoRA-GA)


class Dense(NamedTuple):
    """The arrays of a frozen layer and of its adapter."""

    kernel: Kernel  # [d_in, d_out]
    adapter: Adapter | None = None
    bias: jax.Array | None = None  # [d_out]
    dropout: Callable[[jax.Array], jax.Array] | None = None  # of the adapter's input
    name: str = "dense"  # in profiles
    inner: jax.Array | None = None  # x for the adapter, if its gradient is summed separately

    @property
    def is_plain(self) -> bool:
        """True if the layer has no DoRA and no dropout of an adapter."""
        return self.adapter is None or (self.adapter.magnitude is None and self.dropout is None)


class LowRankHidden(NamedTuple):
    """The adapter's output as two factors, whose product is not formed."""

    value: jax.Array  # s x A, float32 [..., r]; has no gradient
    b: jax.Array  # float32 [r, d_out]


class Adapted(NamedTuple):
    """The output of a layer."""

    y: jax.Array  # [..., d_out]
    # The adapter's part of y, [..., d_out] or its factors; None without an adapter.
    delta: jax.Array | LowRankHidden | None = None


# ---------------------------------------------------------------- the gated gradient of A


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _low_rank(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: Any, mask: jax.Array | None, numerics: Numerics
) -> tuple[jax.Array, jax.Array]:
    """Returns ``s (x A) B`` and ``s x A``; see the equations above."""
    return _low_rank_fwd(x, a, b, scale, mask, numerics)[0]


def _low_rank_fwd(x: Any, a: Any, b: Any, scale: Any, mask: Any, numerics: Numerics) -> Any:
    product = partial(dot, numerics=numerics, operand=numerics.adapter)
    # [rows, r]; saved by a rematerialized layer, which would multiply x by A again otherwise
    hidden = checkpoint_name(scale * product(x, a), SAVED)
    return (product(hidden, b), hidden), (x, a, b, scale, mask, hidden)


def _low_rank_bwd(numerics: Numerics, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    (x, a, b, scale, mask, hidden), (g, _) = saved, cotangents
    product = partial(dot, numerics=numerics, operand=numerics.adapter)
    # One matmul over the wide cotangent for both: B for dx and, below it, B * m for dA.
    wide = b
    if mask is not None:
        wide = jnp.concatenate([b, b * mask[None, :]])
    back = scale * product(g, wide, dims=(1, 1))  # [rows, r or 2 r]
    exact, gated = back[:, : b.shape[0]], back[:, -b.shape[0] :]
    dx = product(exact, a, dims=(1, 1)).astype(x.dtype)
    da, db = product(x, gated, dims=(0, 0)), product(hidden, g, dims=(0, 0))
    return dx, da, db, jnp.zeros_like(scale), jax.tree.map(jnp.zeros_like, mask)


_low_rank.defvjp(_low_rank_fwd, _low_rank_bwd)


def residual(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | float, mask: jax.Array | None = None
) -> jax.Array:
    """Returns the adapter's output ``s (x A) B``, with the gated gradient of A if there is a mask.

    Args:
      x: ``[..., d_in]``.
      a: ``[d_in, r]`` float32.
      b: ``[r, d_out]`` float32.
      scale: scalar ``s``.
      mask: ``[d_out]`` weights of the output channels, or None for the plain gradient.

    Returns:
      ``[..., d_out]`` float32.
    """
    return _residual(x, Adapter(a, b, scale, mask), Numerics())[0]


def _residual(x: jax.Array, adapter: Adapter, numerics: Numerics) -> tuple[jax.Array, jax.Array]:
    """Returns ``s (x A) B`` float32 ``[..., d_out]`` and ``s x A``."""
    a, b, scale, mask, *_ = adapter
    chex.assert_shape(a, (x.shape[-1], b.shape[0]))
    if mask is not None:
        chex.assert_shape(mask, b.shape[1:])
    flat = x.reshape(-1, x.shape[-1])  # [rows, d_in]
    y, hidden = _low_rank(flat, a, b, jnp.asarray(scale, jnp.float32), mask, numerics)
    lead = x.shape[:-1]
    return y.reshape(*lead, b.shape[1]), hidden.reshape(*lead, b.shape[0])


# ---------------------------------------------------------------- the layer


@operation
def adapted_dense(x: jax.Array, dense: Dense, numerics: Numerics) -> Adapted:
    """Returns ``x W + b + s (x A) B`` and the adapter's part of it.

    Args:
      x: ``[..., d_in]``.
      dense: the layer.
      numerics: dtypes of operands and result; sums are float32.

    Returns:
      ``[..., d_out]`` in ``numerics.result``, and the adapter's part.
    """
    with jax.named_scope(dense.name):
        base, adapter = matmul(x, dense.kernel, numerics), dense.adapter
        if adapter is None:
            return Adapted(add_bias(base, dense.bias))
        inner = x if dense.inner is None else dense.inner
        dropped = inner if dense.dropout is None else dense.dropout(inner)
        delta, hidden = _residual(dropped, adapter, numerics)
        if adapter.magnitude is not None:
            delta = _dora(base, delta, dense.kernel, adapter)
        delta = delta.astype(base.dtype)
        y = add_bias(base, dense.bias) + delta
        if not dense.is_plain:
            return Adapted(y, delta)
        # The factors: a returned delta would be written to memory for the few rows of a probe.
        return Adapted(y, LowRankHidden(hidden, adapter.b))


@operation
def parallel_dense(x: jax.Array, layers: Sequence[Dense], numerics: Numerics) -> list[Adapted]:
    """Returns `adapted_dense` of several layers that read the same input."""
    return [adapted_dense(x, layer, numerics) for layer in layers]


def add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Returns ``y + bias``, or y if there is no bias."""
    if bias is None:
        return y
    return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def moved_from(delta: jax.Array, start: jax.Array) -> jax.Array:
    """Returns ``delta - start``, and 0 if the difference is within the rounding of both."""
    difference = delta - start
    rounding = 4 * jnp.finfo(delta.dtype).eps * jnp.abs(start)
    return jnp.where(jnp.abs(difference) <= rounding, 0, difference)


# ---------------------------------------------------------------- variants


def column_norm(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Returns the norm of every output channel of ``W + s A B``, float32 ``[d_out]`` (DoRA).

    The sum is not formed: ``|w|^2 + 2 s w.(A b) + s^2 |A b|^2`` takes rank-wide matmuls only.
    """
    w, s, exact = kernel.astype(jnp.float32), jnp.asarray(scale, jnp.float32), Numerics()
    cross = jnp.sum(dot(a, w, exact, (0, 0)) * b, axis=0)
    gram = jnp.sum(dot(dot(a, a, exact, (0, 0)), b, exact) * b, axis=0)
    return jnp.sqrt(jnp.maximum(jnp.sum(w * w, axis=0) + 2 * s * cross + s * s * gram, 0.0))


def _dora(base: jax.Array, delta: jax.Array, kernel: Kernel, adapter: Adapter) -> jax.Array:
    """Returns the residual for which ``base + residual`` is ``m (x W + s x A B) / |W + s A B|``."""
    frozen = lax.stop_gradient(expand(kernel))
    # The norm is a constant of the backward pass, as in the paper (section 4.3) and in PEFT.
    assert adapter.magnitude is not None
    ratio = adapter.magnitude / lax.stop_gradient(column_norm(frozen, *adapter[:3]))
    ratio = jnp.where(jnp.asarray(adapter.scale) == 0, 1.0, ratio)  # rank 0: the magnitude is unused
    ratio = jnp.broadcast_to(ratio, base.shape)
    return (ratio - 1.0) * base.astype(jnp.float32) + ratio * delta
