"""Cross-entropy on a CPU in blocks of the vocabulary, natively (`nalora_jax.cpu.native`) or by XLA.

A block of logits stays in the caches, and the head is packed for the matmuls only once per 512
rows: a fifth faster than whole rows of logits. The gradient of the hidden states is an attention
over the vocabulary, ``softmax(h E^T) E``. Its blocks are summed with a running maximum, as in flash
attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.cpu import native
from nalora_jax.cpu.storage import Bits, bits_of, from_bits, slice_rows, usable
from nalora_jax.ops import losses as ops
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.losses import PLAIN_HEAD, Head, Tiles, in_chunks
from nalora_jax.ops.matmul import dot
from nalora_jax.ops.storage import Kernel, expand, rounded

# Logits of a block take 4 MB. The remainder of the larger chunks is processed in smaller ones, so
# that few targets cost little.
BLOCK = 2048
_ROWS = (512, 128)


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
    target_rows = _target_rows(lax.stop_gradient(kernel), targets, head.transposed)
    if numerics.operand == "bfloat16" and _is_bf16(kernel) and usable(numerics):
        weights = lax.stop_gradient(weights.astype(jnp.float32))
        return _native(hidden, kernel, target_rows, weights, head, numerics)
    tiles = Tiles((chunk,) if chunk else _ROWS)
    # All logits are computed at once, and the target's logit is selected.
    if kernel.shape[head.axis] <= BLOCK:
        rows_chunk: Any = partial(ops.chunk_of_rows, head=head, numerics=numerics)
        return in_chunks(hidden, kernel, targets, weights, tiles, rows_chunk)
    return in_chunks(
        hidden, kernel, target_rows, weights, tiles, partial(_blocks, head=head, numerics=numerics)
    )


def _is_bf16(kernel: Kernel) -> bool:
    return isinstance(kernel, Bits) or getattr(kernel, "dtype", None) == jnp.bfloat16


def _target_rows(kernel: Kernel, targets: jax.Array, transposed: bool) -> jax.Array:
    """Returns the head's weights of every target, ``[..., d_model]`` of ``[...]``, bf16 as bits.

    They are read once, before the chunks: in the loop XLA:CPU would copy the bits of the whole
    table.
    """
    rows = jnp.take(bits_of(kernel), targets.reshape(-1), axis=int(not transposed))
    if not transposed:
        rows = rows.T
    return rows.reshape(*targets.shape, -1)


# ---------------------------------------------------------------- natively


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _native(
    hidden: jax.Array,
    kernel: Kernel,
    target_rows: jax.Array,
    weights: jax.Array,
    head: Head,
    numerics: Numerics,
) -> jax.Array:
    return _native_sums(False, hidden, kernel, target_rows, weights, head, numerics)[0]


def _native_sums(
    grad: bool,
    hidden: jax.Array,
    kernel: Kernel,
    target_rows: jax.Array,
    weights: jax.Array,
    head: Head,
    numerics: Numerics,
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss of all rows, and the gradient of hidden if ``grad``."""
    flat, n = hidden.reshape(weights.size, -1), weights.size
    # Rows with a target first: the kernel stops after the last of them.
    order = jnp.argsort(weights.reshape(n) == 0, stable=True)
    h, rows, w = (
        jnp.take(x.reshape(n, *x.shape[2:]), order, axis=0) for x in (hidden, target_rows, weights)
    )
    sums = native.over_vocabulary(
        rounded(h, numerics.operand, numerics),
        kernel.bits if isinstance(kernel, Bits) else expand(kernel),
        jnp.sum(w != 0, dtype=jnp.int32),
        transposed=head.transposed,
        scale=head.scale,
        softcap=head.softcap,
        gradient=grad,
    )
    losses, back = _joined(sums, h, rows, w, head, numerics, grad)
    loss = jnp.sum(losses)
    if not grad:
        return loss, back
    return loss, jnp.zeros_like(flat).at[order].set(back.astype(flat.dtype)).reshape(hidden.shape)


def _bwd(
    head: Head, numerics: Numerics, gradient: jax.Array, g: jax.Array
) -> tuple[jax.Array, None, None, None]:
    return gradient * g.astype(gradient.dtype), None, None, None


_native.defvjp(partial(_native_sums, True), _bwd)


# ---------------------------------------------------------------- by XLA


def _blocks(
    hidden: jax.Array,
    kernel: Kernel,
    target_rows: jax.Array,
    weights: jax.Array,
    grad: bool,
    *,
    head: Head,
    numerics: Numerics,
) -> tuple[jax.Array, jax.Array]:
    """Computes one chunk of rows (`nalora_jax.ops.losses.Chunk`), block by block."""
    sums = over_vocabulary(hidden, kernel, head, numerics, grad)
    return _joined(sums, hidden, target_rows, weights, head, numerics, grad)


def _joined(
    sums: tuple[jax.Array, jax.Array, jax.Array],
    hidden: jax.Array,
    target_rows: jax.Array,
    weights: jax.Array,
    head: Head,
    numerics: Numerics,
    grad: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns every row's loss, and the gradient, from the sums over the vocabulary."""
    top, total, attended = sums
    # The target's logit and its part of the gradient take one row of the head instead of a one-hot
    # [rows, vocab].
    columns = from_bits(target_rows).astype(jnp.float32)
    picked, slope = head.logits(
        jnp.sum(rounded(hidden, numerics.operand, numerics).astype(jnp.float32) * columns, axis=-1)
    )
    losses = weights * (jnp.log(total) + top - picked)
    if not grad:
        return losses, attended
    return losses, weights[:, None] * (attended / total[:, None] - slope[:, None] * columns)


def over_vocabulary(
    hidden: jax.Array, kernel: Kernel, head: Head, numerics: Numerics, grad: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns sums over the vocabulary of the logits ``l`` of hidden ``[rows, d_model]``.

    Returns:
      ``max l`` and ``sum exp(l - max)``, both ``[rows]``; and if ``grad``,
      ``sum exp(l - max) l' E``, ``[rows, d_model]``, with ``l'`` the derivative of the logits by
      the products.
    """
    rows, d_model = hidden.shape
    vocab, block = kernel.shape[head.axis], BLOCK

    def add(
        i: jax.Array | int, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, attended = carry
        # The last block ends at the end of the vocabulary and masks the entries of the previous
        # block.
        start = jnp.minimum(i * block, vocab - block)
        block_kernel = slice_rows(kernel, start, block, head.axis)
        logits, slope = head.logits(dot(hidden, block_kernel, numerics, dims=(1, 1 - head.axis)))
        if vocab % block:
            logits = jnp.where(start + jnp.arange(block) >= i * block, logits, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(logits, axis=-1))
        fade, exps = jnp.exp(top - higher), jnp.exp(logits - higher[:, None])
        if grad:
            attended = fade[:, None] * attended + dot(
                exps * slope, block_kernel, numerics, dims=(1, head.axis)
            )
        return higher, fade * total + jnp.sum(exps, axis=-1), attended

    lowest = jnp.full((rows,), jnp.finfo(jnp.float32).min)
    carry = (
        lowest,
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, d_model if grad else 0), jnp.float32),
    )
    return lax.fori_loop(0, -(-vocab // block), add, carry)
