"""Causal convolution of every channel over the last tokens of its segment."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_conv(x: jax.Array, kernel: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns ``sum_j kernel[width - 1 - j] x[t - j]`` over tokens of t's segment.

    Args:
      x: ``[batch, seq, channels]``.
      kernel: float32 ``[width, channels]``; the last row weighs the token itself.
      segments: int ``[batch or 1, seq]``, 0 for padding, which no other segment reads.

    Returns:
      float32 ``[batch, seq, channels]``.
    """
    width, x = kernel.shape[0], x.astype(jnp.float32)
    total = x * kernel[-1][None, None]
    for back in range(1, min(width, x.shape[1])):
        same = (segments[:, back:] == segments[:, :-back])[..., None]
        earlier = jnp.where(same, x[:, :-back] * kernel[width - 1 - back][None, None], 0.0)
        total = total + jnp.pad(earlier, ((0, 0), (back, 0), (0, 0)))
    return total


def causal_conv_after(
    x: jax.Array, kernel: jax.Array, segments: jax.Array, before: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns `causal_conv` of one segment that continues after ``before``, and the new ``before``.

    Args:
      x: ``[batch, seq, channels]``.
      kernel: float32 ``[width, channels]``.
      segments: int ``[batch or 1, seq]``, 1, or 0 for padding at any place, which is skipped.
      before: ``[batch, width - 1, channels]``, the last inputs, zero before the first token.
    """
    held = before.shape[1]
    real = jnp.broadcast_to(segments > 0, x.shape[:2])
    # Padding first, then the earlier inputs and the tokens: `order` is stable.
    order = jnp.argsort(jnp.pad(real, ((0, 0), (held, 0)), constant_values=True), axis=1, stable=True)
    inputs = jnp.concatenate([before.astype(x.dtype), jnp.where(real[..., None], x, 0)], axis=1)
    inputs = jnp.take_along_axis(inputs, order[..., None], axis=1)
    out = causal_conv(inputs, kernel, jnp.ones((1, inputs.shape[1]), jnp.int32))
    back = jnp.argsort(order, axis=1)[:, held:, None]
    return jnp.take_along_axis(out, back, axis=1), inputs[:, inputs.shape[1] - held :]
