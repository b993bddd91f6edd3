"""Cross-entropy over a frozen output head, without ever holding the logits of all tokens.

Logits exist for one chunk of rows and one block of the vocabulary at a time. Because the head has no gradient, the
gradient of the hidden states is made in the same pass, while the block's probabilities are at hand: nothing is computed
twice and nothing of size ``[tokens, vocab]`` is kept for the backward pass. That gradient is ``softmax(h E^T) E``, an
attention over the vocabulary, and blocks of it add up as flash attention's do, under a running maximum.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.cpu import native
from nalora_jax.nn.matmul import block_of, dot, look_up, rounded, unpack_leaf

# Floats of one chunk of whole rows of logits on a device, where the vocabulary is not cut: 512 MB. Each chunk reads the
# whole head twice, so that it takes some thousand rows for an accelerator to be limited by its matrix unit.
_CHUNK_FLOATS = 1 << 27
# On CPU a block of logits (4 MB) stays in the caches, and the head is packed for the products only once per 512 rows:
# a fifth faster than whole rows. The rest of the rows goes in smaller chunks, so that few targets cost little.
_BLOCK = 2048
_ROWS = (512, 128)


class Head(NamedTuple):
    """How logits come from hidden states (static)."""

    transposed: bool = False  # the kernel is an embedding [vocab, d_model]
    operand: str = "float32"  # dtype of the operands; logits are float32
    softcap: float = 0.0  # c tanh(logits / c); 0: none
    scale: float = 1.0  # logits are multiplied by it, before the cap

    @property
    def axis(self) -> int:
        """The vocabulary's in the kernel; the other one is the model's."""
        return 0 if self.transposed else 1


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
    shards: int = 1,
) -> jax.Array:
    """Sum of ``weights * -log p(target)``.

    Args:
      hidden: ``[batch, seq, d_model]`` after the final norm.
      kernel: frozen ``[d_model, vocab]``, or ``[vocab, d_model]`` with ``head.transposed``; a view
        (`pack_views`) will do. No gradient.
      targets: int ``[batch, seq]``.
      weights: ``[batch, seq]``, 0 where a position has no target.
      head: static options.
      chunk: rows of logits at a time, on each device; 0 chooses by platform and vocabulary.
      compact: gather the rows that have a target and compute logits for those only. On a mesh that splits the batch
        this would move rows between devices; there, chunks run along the sequence instead.
      shards: parts that a mesh splits the batch into. What the mesh splits of the kernel should be gathered before the
        call, or every chunk gathers it anew.

    Returns:
      float32 scalar; differentiable with respect to ``hidden`` only.
    """
    chex.assert_rank(hidden, 3)
    chex.assert_equal_shape([targets, weights])
    chex.assert_shape(targets, hidden.shape[:2])
    weights = lax.stop_gradient(weights.astype(jnp.float32))
    tiles = _tiles(kernel.shape[head.axis], chunk, compact, shards)
    return _cross_entropy(hidden, lax.stop_gradient(kernel), targets, weights, head, tiles)


def _is_native(kernel: jax.Array, head: Head) -> bool:
    """Whether `nalora_jax.cpu.native` does the work, which reads bf16 and its views."""
    return head.operand == "bfloat16" and kernel.dtype in (jnp.bfloat16, jnp.uint16) and native.available()


class _Tiles(NamedTuple):
    """Sizes of what is computed at a time."""

    rows: tuple[int, ...]  # hidden states, from large to small: the smaller ones for what the larger ones leave
    block: int  # entries of the vocabulary
    compact: bool  # only rows that have a target
    shards: int  # parts of the batch, each of which has so many rows in a chunk


def _tiles(vocab: int, chunk: int, compact: bool, shards: int) -> _Tiles:
    # A mesh may split the vocabulary, which blocks would cut across.
    if compact and jax.default_backend() == "cpu":
        return _Tiles((chunk,) if chunk else _ROWS, min(_BLOCK, vocab), compact, shards)
    # A multiple of 128, the rows that a TPU's matrix unit takes at once.
    fitting = max(_CHUNK_FLOATS // vocab // 128 * 128, 128)
    return _Tiles((chunk or fitting,), vocab, compact, shards)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, head: Head, tiles: _Tiles
) -> jax.Array:
    return _in_chunks(False, hidden, kernel, targets, weights, head, tiles)[0]


def _in_chunks(grad: bool, *arguments: Any) -> tuple[jax.Array, jax.Array]:
    """The loss, and hidden's gradient where it is wanted."""
    *_, tiles = arguments
    run = _compacted if tiles.compact else _along_sequence
    return run(grad, *arguments)


def _bwd(head: Head, tiles: _Tiles, gradient: jax.Array, g: jax.Array) -> tuple[jax.Array, None, None, None]:
    return gradient * g.astype(gradient.dtype), None, None, None


_cross_entropy.defvjp(partial(_in_chunks, True), _bwd)


def _target_rows(kernel: jax.Array, targets: jax.Array, transposed: bool) -> jax.Array:
    """The head's weights of every target, ``[..., d_model]`` of ``[...]``, as `unpack_leaf` takes them.

    Looked up once, before the chunks: XLA:CPU would take the view of the table (`look_up`) out of the loop as a copy.
    """
    rows = look_up(kernel, targets.reshape(-1), axis=0 if transposed else 1)
    return (rows if transposed else rows.T).reshape(*targets.shape, -1)


def _wanted(kernel: jax.Array, targets: jax.Array, head: Head, block: int) -> jax.Array:
    """What `_chunk` asks of every target: its row of the head, or, where all logits are there, its number alone.

    Taking columns of an untied head would have TPUs and GPUs turn a copy of it: 1 GB at 128k entries of 4,096 numbers.
    """
    whole = block == kernel.shape[head.axis]
    return targets[..., None] if whole else _target_rows(kernel, targets, head.transposed)


def _chunk(
    hidden: jax.Array,
    kernel: jax.Array,
    wanted: jax.Array,
    weights: jax.Array,
    head: Head,
    block: int,
    grad: bool,
) -> tuple[jax.Array, jax.Array]:
    """Losses of one chunk, ``[rows]``, and hidden's gradient.

    Of hidden ``[rows, d_model]``, weights ``[rows]`` and what `_wanted` gives. The gradient is of shape ``[rows, 0]``
    where it is not wanted.
    """
    if block == kernel.shape[head.axis]:
        return _whole_rows(hidden, kernel, wanted, weights, head, grad)
    sums = _over_vocabulary(hidden, kernel, head, block, grad)
    return _joined(sums, hidden, wanted, weights, head, grad)


def _whole_rows(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, head: Head, grad: bool
) -> tuple[jax.Array, jax.Array]:
    """`_chunk` with the logits of all entries at once, targets ``[rows, 1]``."""
    part = unpack_leaf(kernel)
    logits, slope = _shaped(dot(hidden, part, head.operand, dims=(1, 1 - head.axis)), head)
    # A comparison within the passes that are made anyway; a gather would cross devices that split the vocabulary.
    hit = jnp.arange(logits.shape[1], dtype=targets.dtype)[None, :] == targets
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    exps = jnp.exp(shifted)
    total = jnp.sum(exps, axis=-1, keepdims=True)
    picked = jnp.sum(jnp.where(hit, shifted, 0.0), axis=-1)
    loss = weights * (jnp.log(total[:, 0]) - picked)
    if not grad:
        return loss, jnp.zeros((hidden.shape[0], 0), jnp.float32)
    probabilities = exps / total
    return loss, weights[:, None] * dot((probabilities - hit) * slope, part, head.operand, dims=(1, head.axis))


def _native_chunk(
    hidden: jax.Array, kernel: jax.Array, target_rows: jax.Array, weights: jax.Array, head: Head, grad: bool
) -> tuple[jax.Array, jax.Array]:
    """`_chunk` of all rows, those with a target first."""
    sums = native.over_vocabulary(
        rounded(hidden, head.operand),
        kernel,
        jnp.sum(weights != 0, dtype=jnp.int32),
        turned=head.transposed,
        scale=head.scale,
        softcap=head.softcap,
        gradient=grad,
    )
    return _joined(sums, hidden, target_rows, weights, head, grad)


def _joined(
    sums: tuple[jax.Array, jax.Array, jax.Array],
    hidden: jax.Array,
    target_rows: jax.Array,
    weights: jax.Array,
    head: Head,
    grad: bool,
) -> tuple[jax.Array, jax.Array]:
    """Loss and gradient from the sums over the vocabulary."""
    top, total, attended = sums
    # The target's own logit and its part of the gradient take one row of the head, no [rows, vocab] one-hot.
    wanted = unpack_leaf(target_rows).astype(jnp.float32)
    picked, slope = _shaped(jnp.sum(rounded(hidden, head.operand).astype(jnp.float32) * wanted, axis=-1), head)
    loss = weights * (jnp.log(total) + top - picked)
    if not grad:
        return loss, attended
    return loss, weights[:, None] * (attended / total[:, None] - slope[:, None] * wanted)


def _shaped(products: jax.Array, head: Head) -> tuple[jax.Array, jax.Array]:
    """Logits of hidden states' products with the head, and their derivative by these."""
    logits = products * head.scale
    slope = jnp.full_like(logits, head.scale)
    if head.softcap:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
        slope = slope * (1 - jnp.square(logits / head.softcap))
    return logits, slope


def _over_vocabulary(
    hidden: jax.Array, kernel: jax.Array, head: Head, block: int, grad: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``max l``, ``sum exp(l - max)`` of the logits ``l`` of hidden ``[rows, d_model]``, both ``[rows]``, and, where
    ``grad``, ``sum exp(l - max) l' E``, ``[rows, d_model]``, with ``l'`` the logits' derivative by their products.
    """
    rows, d_model = hidden.shape
    vocab = kernel.shape[head.axis]

    def add(
        i: jax.Array | int, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, attended = carry
        # The last block ends with the vocabulary, and leaves out what the one before it had.
        start = jnp.minimum(i * block, vocab - block)
        part = block_of(kernel, start, block, head.axis)
        logits, slope = _shaped(dot(hidden, part, head.operand, dims=(1, 1 - head.axis)), head)
        if vocab % block:
            logits = jnp.where(start + jnp.arange(block) >= i * block, logits, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(logits, axis=-1))
        fade, exps = jnp.exp(top - higher), jnp.exp(logits - higher[:, None])
        if grad:
            attended = fade[:, None] * attended + dot(exps * slope, part, head.operand, dims=(1, head.axis))
        return higher, fade * total + jnp.sum(exps, axis=-1), attended

    lowest = jnp.full((rows,), jnp.finfo(jnp.float32).min)
    carry = (lowest, jnp.zeros((rows,), jnp.float32), jnp.zeros((rows, d_model if grad else 0), jnp.float32))
    return lax.fori_loop(0, -(-vocab // block), add, carry)


def _compacted(
    grad: bool, hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, head: Head, tiles: _Tiles
) -> tuple[jax.Array, jax.Array]:
    """Chunks over the rows that have a target; as many iterations as those need."""
    shape, n = hidden.shape, targets.size
    flat, weights = hidden.reshape(n, -1), weights.reshape(n)
    # Rows with a target first; the last chunk is filled with rows of weight zero.
    order = jnp.argsort(weights == 0, stable=True)
    if _is_native(kernel, head):
        h, r = (jnp.take(x, order, axis=0) for x in (flat, _target_rows(kernel, targets.reshape(n), head.transposed)))
        loss, back = _native_chunk(h, kernel, r, weights[order], head, grad)
        return jnp.sum(loss), jnp.zeros_like(flat).at[order].set(back.astype(flat.dtype)).reshape(
            shape
        ) if grad else back
    sizes = sorted({min(rows, n) for rows in tiles.rows}, reverse=True)
    order = jnp.pad(order, (0, sizes[0]), constant_values=n)
    wanted = _wanted(kernel, targets.reshape(n), head, tiles.block)

    def chunks(rows: int, start: jax.Array, count: jax.Array, carry: Any) -> Any:
        def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            loss, gradient = carry
            index = lax.dynamic_slice(order, (start + i * rows,), (rows,))
            h, w, r = (jnp.take(x, index, axis=0, mode="clip") for x in (flat, weights, wanted))
            part, back = _chunk(h, kernel, r, jnp.where(index < n, w, 0.0), head, tiles.block, grad)
            if grad:
                gradient = gradient.at[index].set(back.astype(gradient.dtype), mode="drop")
            return loss + jnp.sum(part), gradient

        return lax.fori_loop(0, count, body, carry)

    carry = (jnp.zeros((), jnp.float32), jnp.zeros_like(flat) if grad else jnp.zeros((0,), flat.dtype))
    start, left = jnp.zeros((), jnp.int32), jnp.sum(weights != 0, dtype=jnp.int32)
    for rows in sizes:
        count = -(-left // rows)
        if rows > sizes[-1]:  # what a single one of the smallest chunks takes is left to it
            count = jnp.where(left - (count - 1) * rows > sizes[-1], count, count - 1)
        carry = chunks(rows, start, count, carry)
        start, left = start + count * rows, jnp.maximum(left - count * rows, 0)
    loss, gradient = carry
    return loss, gradient.reshape(shape) if grad else gradient


def _along_sequence(
    grad: bool, hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, head: Head, tiles: _Tiles
) -> tuple[jax.Array, jax.Array]:
    """Chunks of whole columns of the batch, so that every shard of the batch works on its own rows."""
    batch, seq, d_model = hidden.shape
    most = max(1, tiles.rows[0] * tiles.shards // max(batch, 1))  # positions of each example that a chunk may take
    count = -(-seq // most)
    step = -(-seq // count)

    def split(x: jax.Array) -> jax.Array:
        # [batch, seq, ...] -> [count, batch, step, ...]
        padded = jnp.pad(x, ((0, 0), (0, count * step - seq)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, step, *x.shape[2:]), 1, 0)

    def body(loss: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        h, w, r = chunk
        flat, wanted = h.reshape(-1, d_model), r.reshape(-1, r.shape[-1])
        part, back = _chunk(flat, kernel, wanted, w.reshape(-1), head, tiles.block, grad)
        return loss + jnp.sum(part.reshape(batch, step), axis=1), back.astype(h.dtype).reshape(*h.shape[:-1], -1)

    wanted = _wanted(kernel, targets, head, tiles.block)
    # Sums of each example, so that shards of the batch meet once, after the loop.
    losses, parts = lax.scan(body, jnp.zeros((batch,), jnp.float32), (split(hidden), split(weights), split(wanted)))
    loss = jnp.sum(losses)
    if not grad:
        return loss, parts
    whole = jnp.moveaxis(parts, 0, 1).reshape(batch, count * step, d_model)
    return loss, whole[:, :seq]
