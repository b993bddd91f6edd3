"""Cross-entropy on a CPU in blocks of the vocabulary, natively (`nalora_jax.cpu.native`) or by XLA.

A block of logits stays in the caches. The gradient of the hidden states is an attention over the
vocabulary, ``softmax(h E^T) E``, whose blocks are summed with a running maximum, as in flash attention.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.cpu import native
from nalora_jax.cpu.native import from_bits
from nalora_jax.cpu.storage import Bits, bits_of, usable
from nalora_jax.ops import losses as ops
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.losses import PLAIN_HEAD, Head
from nalora_jax.ops.storage import Kernel, dot, expand, rounded

# Logits of a block take 1 MB.
BLOCK = 2048
_ROWS = 128  # of XLA's chunks: few targets cost little, and logits little memory


@ops.cross_entropy.implements("cpu")
def cross_entropy(
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
    """Computes the loss of the rows that have a target.

    On a mesh that splits the batch it returns NotImplemented: such a mesh may split the vocabulary,
    too.
    """
    if not compact:
        return NotImplemented
    bf16 = isinstance(kernel, Bits) or getattr(kernel, "dtype", None) == jnp.bfloat16
    if bf16 and numerics.operand == "bfloat16" and usable(numerics):
        target_rows = _target_rows(lax.stop_gradient(kernel), targets, head.transposed)
        weights = lax.stop_gradient(weights.astype(jnp.float32))
        sums = partial(_native_sums, head, numerics)
        return ops.loss_of_sums(sums, hidden, (kernel, target_rows, weights))
    return ops.cross_entropy.plain(hidden, kernel, targets, weights, head, numerics, chunk=chunk or _ROWS)


@ops.chunk_of_rows.implements("cpu")
def blocks(
    hidden: jax.Array,
    kernel: Kernel,
    targets: jax.Array,
    weights: jax.Array,
    grad: bool,
    *,
    head: Head,
    numerics: Numerics,
) -> tuple[jax.Array, jax.Array]:
    """Computes the losses of rows block by block; whole rows take twice as long for 49,152 entries.

    bf16 is read as its bits, because XLA would copy the table. A mesh may split floats by the vocabulary.
    """
    vocab, whole = kernel.shape[head.axis], isinstance(kernel, jax.Array) and numerics.platform.devices == 1
    if vocab <= BLOCK or not (whole or isinstance(kernel, Bits)):
        return NotImplemented
    hidden, table = rounded(hidden, numerics.operand, numerics), bits_of(kernel)

    def add(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, attended = carry
        # The last block ends at the end of the vocabulary, without the entries of the one before.
        start = jnp.minimum(i * BLOCK, vocab - BLOCK)
        rows = from_bits(lax.dynamic_slice_in_dim(table, start, BLOCK, axis=head.axis))
        logits, slope = head.logits(dot(hidden, rows, numerics, dims=(1, 1 - head.axis)))
        if vocab % BLOCK:
            logits = jnp.where(start + jnp.arange(BLOCK) >= i * BLOCK, logits, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(logits, axis=-1))
        fade, exps = jnp.exp(top - higher), jnp.exp(logits - higher[:, None])
        if grad:
            attended = fade[:, None] * attended + dot(exps * slope, rows, numerics, dims=(1, head.axis))
        return higher, fade * total + jnp.sum(exps, axis=-1), attended

    n, d_model = hidden.shape
    lowest = jnp.full((n,), jnp.finfo(jnp.float32).min)
    start = lowest, jnp.zeros((n,), jnp.float32), jnp.zeros((n, d_model if grad else 0), jnp.float32)
    sums = lax.fori_loop(0, -(-vocab // BLOCK), add, start)
    return _joined(sums, hidden, _target_rows(kernel, targets, head.transposed), weights, head, grad)


def _joined(
    sums: tuple[jax.Array, jax.Array, jax.Array],
    hidden: jax.Array,
    target_rows: jax.Array,
    weights: jax.Array,
    head: Head,
    grad: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns each row's loss, and the gradient of hidden if ``grad``, from sums over the vocabulary.

    The sums of logits ``l`` are ``max l`` and ``sum exp(l - max)``, both ``[rows]``, and ``sum exp(l - max) l' E``
    ``[rows, d_model]``, with ``l'`` the derivative of the logits by the products.
    """
    top, total, attended = sums
    # The target's logit and its part of the gradient take one row of the head instead of a one-hot
    # [rows, vocab].
    columns = from_bits(target_rows).astype(jnp.float32)
    picked, slope = head.logits(jnp.sum(hidden.astype(jnp.float32) * columns, axis=-1))
    losses = weights * (jnp.log(total) + top - picked)
    if not grad:
        return losses, attended
    return losses, weights[:, None] * (attended / total[:, None] - slope[:, None] * columns)


def _target_rows(kernel: Kernel, targets: jax.Array, transposed: bool) -> jax.Array:
    """Returns the head's weights of every target, ``[..., d_model]`` of ``[...]``, bf16 as bits."""
    rows = jnp.take(bits_of(kernel), targets.reshape(-1), axis=int(not transposed))
    if not transposed:
        rows = rows.T
    return rows.reshape(*targets.shape, -1)


def _native_sums(
    head: Head,
    numerics: Numerics,
    hidden: jax.Array,
    constants: tuple[Kernel, jax.Array, jax.Array],
    grad: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss of all rows, and the gradient of hidden if ``grad``.

    ``constants`` are the head's kernel, its row for every target, and the weights.
    """
    kernel, target_rows, weights = constants
    flat, n = hidden.reshape(weights.size, -1), weights.size
    # Rows with a target first: the kernel stops after the last of them.
    order = jnp.argsort(weights.reshape(n) == 0, stable=True)
    h, rows, w = (
        jnp.take(x.reshape(n, *x.shape[2:]), order, axis=0) for x in (hidden, target_rows, weights)
    )
    h = rounded(h, numerics.operand, numerics)
    sums = native.over_vocabulary(
        h,
        kernel.bits if isinstance(kernel, Bits) else expand(kernel),
        jnp.sum(w != 0, dtype=jnp.int32),
        transposed=head.transposed,
        scale=head.scale,
        softcap=head.softcap,
        gradient=grad,
    )
    losses, back = _joined(sums, h, rows, w, head, grad)
    loss = jnp.sum(losses)
    if not grad:
        return loss, back
    return loss, jnp.zeros_like(flat).at[order].set(back.astype(flat.dtype)).reshape(hidden.shape)
