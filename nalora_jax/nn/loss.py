"""Cross-entropy over a frozen output head, without ever holding the logits of all tokens.

Logits exist for one chunk of rows at a time. Because the head has no gradient, the gradient of the hidden states is
made in the same pass, while the chunk's probabilities are at hand: nothing is computed twice and nothing of size
``[tokens, vocab]`` is kept for the backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.nn.matmul import dot, look_up, unpack_leaf

# Floats of one chunk of logits when the chunk is chosen here: 64 MB keeps within caches' reach and far below a model.
_CHUNK_FLOATS = 1 << 24


class Head(NamedTuple):
    """How logits come from hidden states (static)."""

    transposed: bool = False  # the kernel is an embedding [vocab, d_model]
    operand: str = "float32"  # dtype of the operands; logits are float32
    softcap: float = 0.0  # c tanh(logits / c); 0: none
    scale: float = 1.0  # logits are multiplied by it, before the cap


PLAIN_HEAD = Head()


def cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    head: Head = PLAIN_HEAD,
    chunk: int = 0,
    compact: bool = True,
) -> jax.Array:
    """Sum of ``weights * -log p(target)``.

    Args:
      hidden: ``[batch, seq, d_model]`` after the final norm.
      kernel: frozen ``[d_model, vocab]``, or ``[vocab, d_model]`` with ``head.transposed``. No gradient.
      targets: int ``[batch, seq]``.
      weights: ``[batch, seq]``, 0 where a position has no target.
      head: static options.
      chunk: rows of logits at a time; 0 chooses by vocabulary size.
      compact: gather the rows that have a target and compute logits for those only. On a mesh that splits the batch
        this would move rows between devices; there, chunks run along the sequence instead.

    Returns:
      float32 scalar; differentiable with respect to ``hidden`` only.
    """
    chex.assert_rank(hidden, 3)
    chex.assert_equal_shape([targets, weights])
    chex.assert_shape(targets, hidden.shape[:2])
    vocab = kernel.shape[0] if head.transposed else kernel.shape[1]
    rows = chunk or max(16, _CHUNK_FLOATS // vocab)
    weights = lax.stop_gradient(weights.astype(jnp.float32))
    return _cross_entropy(hidden, lax.stop_gradient(kernel), targets, weights, head, rows, compact)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, head: Head, rows: int, compact: bool
) -> jax.Array:
    run = _compacted if compact else _along_sequence
    return run(hidden, kernel, targets, weights, head, rows, False)[0]


def _fwd(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, head: Head, rows: int, compact: bool
) -> tuple[jax.Array, Any]:
    run = _compacted if compact else _along_sequence
    loss, gradient = run(hidden, kernel, targets, weights, head, rows, True)
    return loss, (gradient, kernel, targets, weights)


def _bwd(head: Head, rows: int, compact: bool, kept: Any, g: jax.Array) -> tuple[Any, ...]:
    gradient, kernel, _, weights = kept
    return (gradient * g.astype(gradient.dtype), jnp.zeros_like(kernel), None, jnp.zeros_like(weights))


_cross_entropy.defvjp(_fwd, _bwd)


def _target_rows(kernel: jax.Array, targets: jax.Array, transposed: bool) -> jax.Array:
    """The head's weights of every target, ``[..., d_model]`` of ``[...]``, as `unpack_leaf` takes them.

    Looked up once, before the chunks: XLA:CPU would take the view of the table (`look_up`) out of the loop as a copy.
    """
    rows = look_up(kernel, targets.reshape(-1), axis=0 if transposed else 1)
    return (rows if transposed else rows.T).reshape(*targets.shape, -1)


def _chunk(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    target_rows: jax.Array | None,
    head: Head,
) -> tuple[jax.Array, jax.Array | None]:
    """Loss sum of one chunk, hidden ``[rows, d_model]``, targets and weights ``[rows]``.

    And the hidden's gradient, where ``target_rows [rows, d_model]`` are given.
    """
    logits = dot(hidden, kernel, head.operand, dims=(1, 1) if head.transposed else (1, 0)) * head.scale
    if head.softcap:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exps = jnp.exp(logits - top)
    total = jnp.sum(exps, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    loss = jnp.sum(weights * (jnp.log(total) + top - picked)[:, 0])
    if target_rows is None:
        return loss, None
    # d loss / d logits = w (softmax - onehot). The one-hot part is one row of the kernel: no [rows, vocab] one-hot.
    wide = exps * ((weights * head.scale)[:, None] / total)
    narrow = weights * head.scale
    if head.softcap:
        wide = wide * (1 - jnp.square(logits / head.softcap))
        narrow = narrow * (1 - jnp.square(picked[:, 0] / head.softcap))
    back = dot(wide, kernel, head.operand, dims=(1, 0) if head.transposed else (1, 1))
    return loss, back - narrow[:, None] * unpack_leaf(target_rows).astype(jnp.float32)


def _compacted(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, head: Head, rows: int, grad: bool
) -> tuple[jax.Array, jax.Array]:
    """Chunks over the rows that have a target; as many iterations as those need."""
    shape, n = hidden.shape, targets.size
    rows = min(rows, n)
    flat, targets, weights = hidden.reshape(n, -1), targets.reshape(n), weights.reshape(n)
    # Rows with a target first; the last chunk is filled with rows of weight zero.
    order = jnp.argsort(weights == 0, stable=True)
    order = jnp.pad(order, (0, -n % rows), constant_values=n)
    chunks = (jnp.sum(weights != 0) + rows - 1) // rows
    wanted = _target_rows(kernel, targets, head.transposed) if grad else None

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        loss, gradient = carry
        index = lax.dynamic_slice(order, (i * rows,), (rows,))
        h, t, w = (jnp.take(x, index, axis=0, mode="clip") for x in (flat, targets, weights))
        r = None if wanted is None else jnp.take(wanted, index, axis=0, mode="clip")
        part, back = _chunk(h, kernel, t, jnp.where(index < n, w, 0.0), r, head)
        if back is not None:
            gradient = gradient.at[index].set(back.astype(gradient.dtype), mode="drop")
        return loss + part, gradient

    start = jnp.zeros_like(flat) if grad else jnp.zeros((0,), flat.dtype)
    loss, gradient = lax.fori_loop(0, chunks, body, (jnp.zeros((), jnp.float32), start))
    return loss, gradient.reshape(shape) if grad else gradient


def _along_sequence(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, head: Head, rows: int, grad: bool
) -> tuple[jax.Array, jax.Array]:
    """Chunks of whole columns of the batch, so that every shard of the batch works on its own rows."""
    batch, seq, d_model = hidden.shape
    step = max(1, min(seq, rows // max(batch, 1)))
    count = -(-seq // step)

    def split(x: jax.Array) -> jax.Array:
        # [batch, seq, ...] -> [count, batch, step, ...]
        padded = jnp.pad(x, ((0, 0), (0, count * step - seq)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, step, *x.shape[2:]), 1, 0)

    def body(loss: jax.Array, chunk: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        h, t, w, r = chunk
        wanted = None if r is None else r.reshape(-1, d_model)
        part, back = _chunk(h.reshape(-1, d_model), kernel, t.reshape(-1), w.reshape(-1), wanted, head)
        kept = jnp.zeros((0,)) if back is None else back.astype(h.dtype).reshape(h.shape)
        return loss + part, kept

    rows_of = split(_target_rows(kernel, targets, head.transposed)) if grad else None
    loss, parts = lax.scan(body, jnp.zeros((), jnp.float32), (split(hidden), split(targets), split(weights), rows_of))
    if not grad:
        return loss, parts
    whole = jnp.moveaxis(parts, 0, 1).reshape(batch, count * step, d_model)
    return loss, whole[:, :seq]
