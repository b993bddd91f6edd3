"""The separate loss of every target, without a gradient.

Logits are computed chunk by chunk, as in `nalora_jax.ops.cross_entropy`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.ops.cross_entropy import PLAIN_HEAD, Columns, Head, chunk_of_rows, loop
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import Kernel

# Floats of one chunk of logits on a device; small chunks suffice without a backward pass.
_CHUNK_FLOATS = 1 << 25


def target_losses(
    hidden: jax.Array,
    kernel: Kernel,
    targets: jax.Array,
    weights: jax.Array,
    head: Head = PLAIN_HEAD,
    numerics: Numerics = Numerics(),  # noqa: B008
    *,
    chunk: int = 0,
    compact: bool = True,
    shards: int = 1,
) -> jax.Array:
    """Returns ``weights * -log p(target)`` of every position, float32 ``[batch, seq]``.

    The result has no gradient.

    Args:
      hidden: ``[batch, seq, d_model]`` after the final norm.
      kernel: the head's kernel, as it is stored.
      targets: int ``[batch, seq]``.
      weights: ``[batch, seq]``, 0 for positions without a target.
      head: static options.
      numerics: dtype of the operands.
      chunk: rows of logits at a time, on each device; 0 derives it from the size of the vocabulary.
      compact: with one shard, compute positions with a target only; see `cross_entropy`.
      shards: parts that a mesh splits the batch into.
    """
    hidden, kernel, weights = lax.stop_gradient((hidden, kernel, weights.astype(jnp.float32)))
    rows = chunk or max(_CHUNK_FLOATS // kernel.shape[head.axis] // 128 * 128, 128)

    def losses(h: Any, t: Any, w: Any) -> jax.Array:
        return chunk_of_rows(h, kernel, t, w, False, head=head, numerics=numerics)[0]

    if compact and shards == 1:
        return _of_targets(hidden, targets, weights, losses, rows)
    return _along_sequence(hidden, targets, weights, losses, rows * shards)


def _of_targets(
    hidden: jax.Array, targets: jax.Array, weights: jax.Array, losses: Any, rows: int
) -> jax.Array:
    n = weights.size
    rows = min(rows, n)
    flat, t, w = hidden.reshape(n, -1), targets.reshape(n), weights.reshape(n)
    order = jnp.pad(jnp.argsort(w == 0, stable=True), (0, rows), constant_values=n)
    count = -(-jnp.sum(w != 0, dtype=jnp.int32) // rows)

    def body(i: jax.Array, unpadded: jax.Array) -> jax.Array:
        index = lax.dynamic_slice(order, (i * rows,), (rows,))
        h, targets, weights = (jnp.take(x, index, axis=0, mode="clip") for x in (flat, t, w))
        return unpadded.at[index].set(losses(h, targets, weights), mode="drop")

    return loop(count, -(-n // rows), body, jnp.zeros((n,), jnp.float32)).reshape(weights.shape)


def _along_sequence(
    hidden: jax.Array, targets: jax.Array, weights: jax.Array, losses: Any, rows: int
) -> jax.Array:
    """Runs chunks of whole columns of the batch, so that every shard processes its own rows."""
    batch, seq = weights.shape
    columns = Columns.of(batch, seq, rows)

    def body(_: None, columns_of: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        h, t, w = (x.reshape(-1, *x.shape[2:]) for x in columns_of)
        return None, losses(h, t, w).reshape(-1, columns.step)

    _, by_columns = lax.scan(body, None, columns.split((hidden, targets, weights)))
    return columns.join(by_columns)
