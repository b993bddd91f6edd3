"""Cross-entropy over an output head that is trained itself, chunk by chunk as in `nalora_jax.ops.cross_entropy`.

The gradients of hidden states and head are made in the pass that makes the loss, so that logits exist for one chunk at
a time; the head's is as large as the head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.ops.cross_entropy import Columns, Head
from nalora_jax.ops.matmul import dot
from nalora_jax.ops.numerics import Numerics

_CHUNK_FLOATS = 1 << 25  # of one chunk of logits on a device


def trained_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    head: Head,
    numerics: Numerics,
    *,
    chunk: int = 0,
    shards: int = 1,
) -> jax.Array:
    """Sum of ``weights * -log p(target)``, differentiable with respect to ``hidden`` and ``kernel``.

    Args:
      hidden: ``[batch, seq, d_model]`` after the final norm.
      kernel: float32 ``[d_model, vocab]``.
      targets: int ``[batch, seq]``.
      weights: ``[batch, seq]``, 0 where a position has no target.
      head: soft cap and scale.
      numerics: dtype of the operands; logits and gradients are float32.
      chunk: rows of logits at a time, on each device; 0 chooses by the vocabulary.
      shards: parts that a mesh splits the batch into.
    """
    rows = (chunk or max(_CHUNK_FLOATS // kernel.shape[1] // 128 * 128, 128)) * shards
    weights = lax.stop_gradient(weights.astype(jnp.float32))
    return _loss(hidden, kernel, targets, weights, head._replace(transposed=False), numerics, rows)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    head: Head,
    numerics: Numerics,
    rows: int,
) -> jax.Array:
    return _forward(hidden, kernel, targets, weights, head, numerics, rows)[0]


def _forward(hidden: Any, kernel: Any, targets: Any, weights: Any, head: Head, numerics: Numerics, rows: int) -> Any:
    """The loss, and the gradients of hidden states and kernel: chunks of whole columns of the batch."""
    batch, seq, _ = hidden.shape
    columns = Columns.of(batch, seq, rows)

    def body(carry: tuple[jax.Array, jax.Array], part: Any) -> Any:
        h, t, w = (x.reshape(-1, *x.shape[2:]) for x in part)
        logits, slope = head.logits(dot(h, kernel, numerics))
        log_total = jax.nn.logsumexp(logits, axis=-1)
        hit = jnp.arange(logits.shape[1], dtype=t.dtype)[None, :] == t[:, None]
        losses = w * (log_total - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1))
        delta = w[:, None] * (jnp.exp(logits - log_total[:, None]) - hit) * slope
        back = dot(delta, kernel, numerics, dims=(1, 1)).astype(h.dtype)
        loss, gradient = carry
        sums = loss + jnp.sum(losses), gradient + dot(h, delta, numerics, dims=(0, 0))
        return sums, back.reshape(batch, columns.step, -1)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape, jnp.float32))
    (loss, gradient), parts = lax.scan(body, start, columns.split((hidden, targets, weights)))
    return loss, (columns.join(parts), gradient)


def _backward(head: Head, numerics: Numerics, rows: int, gradients: Any, g: jax.Array) -> Any:
    del head, numerics, rows
    hidden, kernel = gradients
    return hidden * g.astype(hidden.dtype), kernel * g, None, None


_loss.defvjp(_forward, _backward)
