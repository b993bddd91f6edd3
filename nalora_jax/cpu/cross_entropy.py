"""Cross-entropy on a CPU: natively in blocks of the vocabulary (`nalora_jax.cpu.native`), or by XLA.

A block of logits stays in the caches, and the head is packed for the matmuls only once per 512
rows. The gradient of the hidden states is an attention over the vocabulary, ``softmax(h E^T) E``,
whose blocks are summed with a running maximum, as in flash attention.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.cpu import native
from nalora_jax.cpu.storage import Bits, bits_of, from_bits, usable
from nalora_jax.ops import losses as ops
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.losses import PLAIN_HEAD, Head
from nalora_jax.ops.storage import Kernel, expand, rounded

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
        return _native(hidden, kernel, target_rows, weights, head, numerics)
    return ops.cross_entropy.plain(hidden, kernel, targets, weights, head, numerics, chunk=chunk or _ROWS)


def _target_rows(kernel: Kernel, targets: jax.Array, transposed: bool) -> jax.Array:
    """Returns the head's weights of every target, ``[..., d_model]`` of ``[...]``, bf16 as bits."""
    rows = jnp.take(bits_of(kernel), targets.reshape(-1), axis=int(not transposed))
    if not transposed:
        rows = rows.T
    return rows.reshape(*targets.shape, -1)


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
    h = rounded(h, numerics.operand, numerics)
    top, total, attended = native.over_vocabulary(
        h,
        kernel.bits if isinstance(kernel, Bits) else expand(kernel),
        jnp.sum(w != 0, dtype=jnp.int32),
        transposed=head.transposed,
        scale=head.scale,
        softcap=head.softcap,
        gradient=grad,
    )
    # The target's logit and its part of the gradient take one row of the head instead of a one-hot
    # [rows, vocab].
    columns = from_bits(rows).astype(jnp.float32)
    picked, slope = head.logits(jnp.sum(h.astype(jnp.float32) * columns, axis=-1))
    loss = jnp.sum(w * (jnp.log(total) + top - picked))
    if not grad:
        return loss, attended
    back = w[:, None] * (attended / total[:, None] - slope[:, None] * columns)
    return loss, jnp.zeros_like(flat).at[order].set(back.astype(flat.dtype)).reshape(hidden.shape)


def _bwd(
    head: Head, numerics: Numerics, gradient: jax.Array, g: jax.Array
) -> tuple[jax.Array, None, None, None]:
    return gradient * g.astype(gradient.dtype), None, None, None


_native.defvjp(partial(_native_sums, True), _bwd)
