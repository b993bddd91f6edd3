"""Causal convolution of every channel over the last tokens of its segment."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_vjp
def causal_conv(x: Array, kernel: Array, segments: Array) -> Array:
    """Returns ``sum_j kernel[width - 1 - j] x[t - j]`` over tokens of t's segment, float32 as x.

    ``x`` is ``[batch, seq, channels]``; ``kernel`` is float32 ``[width, channels]``, without a
    gradient; ``segments`` are int ``[batch or 1, seq]``, 0 for padding, which no other segment
    reads.
    """
    return _weighed(x, kernel, segments, ahead=False)


def _causal_conv_fwd(x: Array, kernel: Array, segments: Array) -> tuple[Array, Any]:
    return causal_conv(x, kernel, segments), (
        kernel,
        segments,
        jnp.zeros((0,), x.dtype),
    )


def _causal_conv_bwd(saved: Any, g: Array) -> tuple[Array, None, None]:
    kernel, segments, like_x = saved
    return _weighed(g, kernel, segments, ahead=True).astype(like_x.dtype), None, None


causal_conv.defvjp(_causal_conv_fwd, _causal_conv_bwd)


def _weighed(x: Array, kernel: Array, segments: Array, *, ahead: bool) -> Array:
    """Returns float32 sums over each token and the ``width - 1`` tokens before it, or ahead of it.

    All terms are slices of one padded array, so that XLA adds them in one pass over memory.
    """
    width = kernel.shape[0]
    seq = x.shape[1]
    sides = (width - 1, 0)
    if ahead:
        sides = (0, width - 1)
    padded = jnp.pad(x, ((0, 0), sides, (0, 0)))
    ids = jnp.pad(segments, ((0, 0), sides), constant_values=-1)  # of no segment
    terms = [x.astype(jnp.float32) * kernel[-1][None, None]]
    for distance in range(1, width):
        first = distance if ahead else width - 1 - distance
        same = (ids[:, first : first + seq] == segments)[..., None]
        shifted = jnp.where(
            same, padded[:, first : first + seq].astype(jnp.float32), 0.0
        )
        terms.append(shifted * kernel[width - 1 - distance][None, None])
    return functools.reduce(jnp.add, terms)


def causal_conv_after(
    x: Array, kernel: Array, segments: Array, before: Array
) -> tuple[Array, Array]:
    """Returns `causal_conv` of one segment that continues after ``before``, and the new ``before``.

    ``segments`` are 1, or 0 for padding at any place, which is skipped; ``before`` are the last
    inputs ``[batch, width - 1, channels]``, zero before the first token.
    """
    held = before.shape[1]
    real = jnp.broadcast_to(segments > 0, x.shape[:2])
    # Padding first, then the earlier inputs and the tokens: `order` is stable.
    order = jnp.argsort(
        jnp.pad(real, ((0, 0), (held, 0)), constant_values=True), axis=1, stable=True
    )
    inputs = jnp.concatenate(
        [before.astype(x.dtype), jnp.where(real[..., None], x, 0)], axis=1
    )
    inputs = jnp.take_along_axis(inputs, order[..., None], axis=1)
    out = causal_conv(inputs, kernel, jnp.ones((1, inputs.shape[1]), jnp.int32))
    back = jnp.argsort(order, axis=1)[:, held:, None]
    return jnp.take_along_axis(out, back, axis=1), inputs[:, inputs.shape[1] - held :]
