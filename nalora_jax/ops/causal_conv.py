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
    """Returns the result and the residuals of `_causal_conv_bwd`."""
    like_x = jnp.zeros((0,), x.dtype)  # an empty array that carries the dtype of x
    return causal_conv(x, kernel, segments), (kernel, segments, like_x)


def _causal_conv_bwd(saved: Any, g: Array) -> tuple[Array, None, None]:
    """Returns the gradient of x in its dtype: the same sums, with the taps reversed in time."""
    kernel, segments, like_x = saved
    return _weighed(g, kernel, segments, ahead=True).astype(like_x.dtype), None, None


causal_conv.defvjp(_causal_conv_fwd, _causal_conv_bwd)


def _weighed(x: Array, kernel: Array, segments: Array, *, ahead: bool) -> Array:
    """Returns each token's sum over its segment, float32 ``[batch, seq, channels]``.

    The sum is over the token and the ``width - 1`` tokens before it, or after it with ``ahead``: a
    token at distance d has the weight ``kernel[width - 1 - d]``. All terms are slices of one padded
    array, so that XLA adds them in one pass over memory.

    Args:
      x: ``[batch, seq, channels]``.
      kernel: ``[width, channels]``; the last row is the token's own weight.
      segments: int ``[batch, seq]``.
      ahead: add tokens after each token.
    """
    width = kernel.shape[0]
    seq = x.shape[1]
    sides = (width - 1, 0)
    if ahead:
        sides = (0, width - 1)
    padded = jnp.pad(x, ((0, 0), sides, (0, 0)))
    # Segments of the padded tokens; -1 is the id of no segment.
    ids = jnp.pad(segments, ((0, 0), sides), constant_values=-1)
    terms = [x.astype(jnp.float32) * kernel[-1][None, None]]
    for distance in range(1, width):
        # Place in the padded array of the first token's neighbor at this distance.
        first = width - 1 - distance
        if ahead:
            first = distance
        same = (ids[:, first : first + seq] == segments)[..., None]
        neighbor = padded[:, first : first + seq].astype(jnp.float32)
        shifted = jnp.where(same, neighbor, 0.0)
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
    # Padding first, then the earlier inputs and the tokens in their order.
    is_input = jnp.pad(real, ((0, 0), (held, 0)), constant_values=True)
    order = jnp.argsort(is_input, axis=1, stable=True)
    tokens = jnp.where(real[..., None], x, 0)
    # [batch, width - 1 + seq, channels]
    inputs = jnp.concatenate([before.astype(x.dtype), tokens], axis=1)
    inputs = jnp.take_along_axis(inputs, order[..., None], axis=1)
    out = causal_conv(inputs, kernel, jnp.ones((1, inputs.shape[1]), jnp.int32))
    back = jnp.argsort(order, axis=1)[:, held:, None]  # place of each token in `out`
    return jnp.take_along_axis(out, back, axis=1), inputs[:, inputs.shape[1] - held :]
