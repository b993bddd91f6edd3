"""Cross-entropy on a CPU in blocks of the vocabulary, natively (`nalora_jax.cpu.native`) or by XLA.

A block of logits stays in the caches. The gradient of the hidden states is an attention over the
vocabulary, ``softmax(h E^T) E``, whose blocks are summed with a running maximum, as in flash
attention.
"""

from __future__ import annotations

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nalora_jax.cpu.native.library import call
from nalora_jax.ops import losses as ops
from nalora_jax.ops.dispatch import Numerics, native_kind
from nalora_jax.ops.losses import PLAIN_HEAD, Head
from nalora_jax.ops.storage import (
    Bits,
    Kernel,
    bf16_bits,
    bf16_from_bits,
    bits_of,
    dot,
    round_to,
)

# Logits of a block take 1 MB.
_BLOCK = 2048
_ROWS = 128  # of XLA's chunks: few targets cost little, and logits little memory


@ops.cross_entropy.implements("cpu")
def cross_entropy(
    hidden: Array,
    kernel: Kernel,
    targets: Array,
    weights: Array,
    head: Head = PLAIN_HEAD,
    numerics: Numerics = Numerics(),  # noqa: B008
    *,
    chunk: int = 0,
    compact: bool = True,
    shards: int = 1,
) -> Array:
    """Computes the loss of the rows that have a target; a mesh that splits the batch may split the
    vocabulary as well."""
    if not compact:
        return NotImplemented
    dtype = getattr(kernel, "dtype", None)
    is_bf16 = isinstance(kernel, Bits) or dtype == jnp.bfloat16
    if is_bf16 and native_kind(numerics):
        target_rows = _target_rows(lax.stop_gradient(kernel), targets, head.transposed)
        weights = lax.stop_gradient(weights.astype(jnp.float32))
        sums = partial(_native_sums, head, numerics)
        return ops.loss_of_sums(sums, hidden, (kernel, target_rows, weights))
    return ops.cross_entropy.plain(
        hidden, kernel, targets, weights, head, numerics, chunk=chunk or _ROWS
    )


@ops.chunk_of_rows.implements("cpu")
def blocks(
    hidden: Array,
    kernel: Kernel,
    targets: Array,
    weights: Array,
    grad: bool,
    *,
    head: Head,
    numerics: Numerics,
) -> tuple[Array, Array]:
    """Computes the losses of rows by an online softmax over blocks of the vocabulary.

    Logits of the whole vocabulary at once take twice as long for 49,152 entries. bf16 is read as
    its bits, because XLA would copy the table.
    """
    vocab = kernel.shape[head.axis]
    # A mesh may split floats by the vocabulary, bits never.
    is_whole = isinstance(kernel, Bits) or numerics.platform.devices == 1
    if vocab <= _BLOCK or not isinstance(kernel, (Array, Bits)) or not is_whole:
        return NotImplemented
    hidden = round_to(hidden, numerics.operand, numerics)
    table = bits_of(kernel)

    def add(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        """Adds block ``i`` of the vocabulary to the running maximum of the logits, the sum of
        their exponentials, and the gradient of that sum by ``hidden``."""
        top, total, gradient = carry
        # The last block ends at the end of the vocabulary; it overlaps the block before, whose
        # entries are masked.
        start = jnp.minimum(i * _BLOCK, vocab - _BLOCK)
        rows = bf16_from_bits(
            lax.dynamic_slice_in_dim(table, start, _BLOCK, axis=head.axis)
        )
        products = dot(hidden, rows, numerics, dims=(1, 1 - head.axis))
        logits, slope = head.logits(products)
        if vocab % _BLOCK:
            entries = start + jnp.arange(_BLOCK)
            logits = jnp.where(entries >= i * _BLOCK, logits, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(logits, axis=-1))
        fade = jnp.exp(top - higher)
        exps = jnp.exp(logits - higher[:, None])
        if grad:
            # slope: derivative of the logits by the products, below 1 where they are capped
            of_block = dot(exps * slope, rows, numerics, dims=(1, head.axis))
            gradient = fade[:, None] * gradient + of_block
        return higher, fade * total + jnp.sum(exps, axis=-1), gradient

    n = len(hidden)
    lowest = jnp.full((n,), jnp.finfo(jnp.float32).min)
    zeros = jnp.zeros((n,), jnp.float32)
    gradient = jnp.zeros((n, _gradient_width(hidden, grad)), jnp.float32)
    count = -(-vocab // _BLOCK)
    sums = lax.fori_loop(0, count, add, (lowest, zeros, gradient))
    target_rows = _target_rows(kernel, targets, head.transposed)
    return _losses(sums, hidden, target_rows, weights, head, grad)


def _gradient_width(hidden: Array, grad: bool) -> int:
    """Returns the columns of the sums for the gradient of ``hidden``: 0 without ``grad``."""
    if grad:
        return hidden.shape[-1]
    return 0


def _losses(
    sums: tuple[Array, ...],
    hidden: Array,
    target_rows: Array,
    weights: Array,
    head: Head,
    grad: bool,
) -> tuple[Array, Array]:
    """Returns each row's loss, and the gradient of hidden if ``grad``, from the sums of
    `over_vocabulary`."""
    top, total, attended = sums
    # The target's logit and its part of the gradient take one row of the head instead of a one-hot
    # [rows, vocab].
    columns = bf16_from_bits(target_rows).astype(jnp.float32)
    picked, slope = head.logits(jnp.sum(hidden.astype(jnp.float32) * columns, axis=-1))
    losses = weights * (jnp.log(total) + top - picked)
    if not grad:
        return losses, attended
    expected = attended / total[:, None]  # the gradient by the log of the sum
    return losses, weights[:, None] * (expected - slope[:, None] * columns)


def _target_rows(kernel: Kernel, targets: Array, transposed: bool) -> Array:
    """Returns the head's weights of every target, ``[..., d_model]`` of ``[...]``, bf16 as bits."""
    rows = jnp.take(bits_of(kernel), targets.reshape(-1), axis=int(not transposed))
    if not transposed:
        rows = rows.T
    return rows.reshape(*targets.shape, -1)


def _native_sums(
    head: Head,
    numerics: Numerics,
    hidden: Array,
    constants: tuple[Kernel, Array, Array],
    grad: bool,
) -> tuple[Array, Array]:
    """Returns the loss of all rows, and the gradient of hidden if ``grad``.

    ``constants`` are the head's kernel, its row for every target, and the weights.
    """
    kernel, target_rows, weights = constants
    n = weights.size
    flat = hidden.reshape(n, -1)
    # Rows with a target first: the kernel stops after the last of them.
    order = jnp.argsort(weights.reshape(n) == 0, stable=True)
    # [batch, seq, ...] -> [batch * seq, ...], in this order
    h, rows, w = (
        jnp.take(x.reshape(n, *x.shape[2:]), order, axis=0)
        for x in (hidden, target_rows, weights)
    )
    h = round_to(h, numerics.operand, numerics)
    count = jnp.sum(w != 0, dtype=jnp.int32)
    sums = over_vocabulary(h, bits_of(kernel), count, head, grad)
    losses, back = _losses(sums, h, rows, w, head, grad)
    loss = jnp.sum(losses)
    if not grad:
        return loss, back
    gradient = jnp.zeros_like(flat).at[order].set(back.astype(flat.dtype))
    return loss, gradient.reshape(hidden.shape)


def over_vocabulary(
    hidden: Array, table: Array, count: Array | int, head: Head, grad: bool = True
) -> tuple[Array, ...]:
    """Computes ``max l``, ``sum exp(l - max)`` and, with ``grad``, ``sum exp(l - max) l' E`` of the
    logits ``l``.

    ``l'`` is the derivative of the logits by the products of ``hidden`` ``[rows, d_model]`` and the
    table E, both bf16 or views of it. Results are float32 ``[rows]``, ``[rows]`` and ``[rows,
    d_model]`` (``[rows, 0]`` without ``grad``). Rows after the first ``count`` are not computed:
    they get 0, 1 and zeros.
    """
    rows, d_model = hidden.shape
    chex.assert_axis_dimension(table, 1 - head.axis, d_model)
    by_row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    attended = jax.ShapeDtypeStruct((rows, _gradient_width(hidden, grad)), jnp.float32)
    attributes = {
        "transposed": head.transposed,
        "scale": np.float32(head.scale),
        "cap": np.float32(head.softcap),
    }
    sums = call("over_vocabulary", [by_row, by_row, attended], **attributes)
    operands = (bf16_bits(hidden), bf16_bits(table), jnp.asarray(count, jnp.int32))
    return tuple(sums(*operands))
