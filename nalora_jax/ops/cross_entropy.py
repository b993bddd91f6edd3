"""Cross-entropy over a frozen output head without the logits of all tokens in memory.

    loss = sum over tokens of  weight * (log sum exp l - l[target])
    l = cap tanh(scale h E^T / cap)

Logits exist for one chunk of rows at a time. Because the head has no gradient, the gradient of the
hidden states is computed in the same pass from the chunk's probabilities. Every value is computed
once, and no array of size ``[tokens, vocab]`` is saved for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.ops.dispatch import Numerics, operation
from nalora_jax.ops.matmul import dot
from nalora_jax.ops.storage import Kernel

# Floats of one chunk of logits on a device: 512 MB. Each chunk reads the whole head twice, so an
# accelerator needs some thousand rows per chunk to be limited by its matrix unit.
_CHUNK_FLOATS, _LEAST_ROWS = 1 << 27, 1024

# ``(hidden [rows, d_model], kernel, targets [rows], weights [rows], with_gradient)`` -> each row's
# loss ``[rows]`` and the gradient of hidden, of shape ``[rows, 0]`` if it is not requested.
Chunk = Callable[[jax.Array, Kernel, Any, jax.Array, bool], tuple[jax.Array, jax.Array]]


class Head(NamedTuple):
    """The static options of the map from hidden states to logits."""

    transposed: bool = False  # the kernel is an embedding [vocab, d_model]
    softcap: float = 0.0  # c tanh(logits / c); 0: none
    scale: float = 1.0  # factor of the logits, before the cap

    @property
    def axis(self) -> int:
        """The vocabulary's axis in the kernel; the other axis is the model's."""
        return int(not self.transposed)

    def logits(self, products: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns logits of products ``h E^T``, and their derivative by the products."""
        logits = products * self.scale
        slope = jnp.full_like(logits, self.scale)
        if self.softcap:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
            slope = slope * (1 - jnp.square(logits / self.softcap))
        return logits, slope


PLAIN_HEAD = Head()


@operation
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
    """Returns the sum of ``weights * -log p(target)``.

    Args:
      hidden: ``[batch, seq, d_model]`` after the final norm.
      kernel: frozen ``[d_model, vocab]``, or ``[vocab, d_model]`` with ``head.transposed``, as it
        is stored. It receives no gradient.
      targets: int ``[batch, seq]``.
      weights: ``[batch, seq]``, 0 for positions without a target.
      head: static options.
      numerics: dtype of the operands; logits are float32.
      chunk: rows of logits at a time, on each device; 0 derives it from the size of the vocabulary.
      compact: gather the rows that have a target and compute logits for those only. On a mesh that
        splits the batch this would move rows between devices; there, chunks run along the sequence
        instead.
      shards: parts that a mesh splits the batch into. If the mesh also splits the kernel, gather it
        before the call, because otherwise every chunk gathers it again.

    Returns:
      float32 scalar; differentiable with respect to ``hidden`` only.
    """
    rows = chunk or rows_of_chunk(kernel.shape[head.axis])
    rows_chunk = partial(chunk_of_rows, head=head, numerics=numerics)
    return in_chunks(hidden, kernel, targets, weights, Tiles((rows,), compact, shards), rows_chunk)


def rows_of_chunk(vocab: int) -> int:
    """Returns the default number of rows in a chunk of logits on each device."""
    # A multiple of 128, the rows that a TPU's matrix unit processes at once.
    return max(_CHUNK_FLOATS // vocab // 128 * 128, _LEAST_ROWS)


def chunk_of_rows(
    hidden: jax.Array,
    kernel: Kernel,
    targets: jax.Array,
    weights: jax.Array,
    grad: bool,
    *,
    head: Head,
    numerics: Numerics,
) -> tuple[jax.Array, jax.Array]:
    """Computes the formula for one chunk of rows; see `Chunk`."""
    logits, slope = head.logits(dot(hidden, kernel, numerics, dims=(1, 1 - head.axis)))
    # The comparison is fused into existing passes. A gather would cross devices that split the
    # vocabulary, and taking columns of an untied head would create a transposed copy of it: 1 GB
    # for 128k entries of 4,096 values.
    hit = jnp.arange(logits.shape[1], dtype=targets.dtype)[None, :] == targets[:, None]
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    exps = jnp.exp(shifted)
    total = jnp.sum(exps, axis=-1, keepdims=True)
    picked = jnp.sum(jnp.where(hit, shifted, 0.0), axis=-1)
    loss = weights * (jnp.log(total[:, 0]) - picked)
    if not grad:
        return loss, jnp.zeros((hidden.shape[0], 0), jnp.float32)
    probabilities = exps / total
    return loss, weights[:, None] * dot(
        (probabilities - hit) * slope, kernel, numerics, dims=(1, head.axis)
    )


# ---------------------------------------------------------------- chunk by chunk


class Tiles(NamedTuple):
    """The static chunk sizes."""

    # Rows per chunk, from large to small; smaller chunks process the remainder of larger ones.
    rows: tuple[int, ...]
    compact: bool = True  # only rows that have a target
    shards: int = 1  # parts of the batch, each of which has ``rows`` rows in a chunk


def in_chunks(
    hidden: jax.Array, kernel: Kernel, targets: Any, weights: jax.Array, tiles: Tiles, chunk: Chunk
) -> jax.Array:
    """Returns the sum of ``chunk`` over all rows, one chunk at a time.

    Args:
      hidden: ``[batch, seq, d_model]``.
      kernel: as ``chunk`` takes it; no gradient.
      targets: arrays ``[batch, seq, ...]`` with the facts about every row's target that ``chunk``
        needs.
      weights: ``[batch, seq]``.
      tiles: sizes.
      chunk: a hashable function of some rows.
    """
    chex.assert_rank(hidden, 3)
    for leaf in (*jax.tree.leaves(targets), weights):
        chex.assert_equal_shape_prefix([hidden, leaf], 2)
    weights = lax.stop_gradient(weights.astype(jnp.float32))
    return _in_chunks(hidden, lax.stop_gradient(kernel), targets, weights, tiles, chunk)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _in_chunks(
    hidden: jax.Array, kernel: Kernel, targets: Any, weights: jax.Array, tiles: Tiles, chunk: Chunk
) -> jax.Array:
    return _sums(False, hidden, kernel, targets, weights, tiles, chunk)[0]


def _sums(grad: bool, *arguments: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the loss, and the gradient of hidden if ``grad``."""
    *_, tiles, _ = arguments
    if tiles.compact:
        return _compacted(grad, *arguments)
    return _along_sequence(grad, *arguments)


def _bwd(
    tiles: Tiles, chunk: Chunk, gradient: jax.Array, g: jax.Array
) -> tuple[jax.Array, None, None, None]:
    return gradient * g.astype(gradient.dtype), None, None, None


_in_chunks.defvjp(partial(_sums, True), _bwd)


def loop(count: jax.Array, most: int, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """Runs ``body(i, carry)`` ``count`` times.

    The compiled condition contains ``most``, the largest count, so that `nalora_jax.layout` can count
    the iterations of a full batch.
    """

    def more(state: tuple[jax.Array, Any]) -> jax.Array:
        return (state[0] < most) & (state[0] < count)

    def step(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return state[0] + 1, body(*state)

    return lax.while_loop(more, step, (jnp.zeros((), jnp.int32), carry))[1]


def _compacted(
    grad: bool,
    hidden: jax.Array,
    kernel: Kernel,
    targets: Any,
    weights: jax.Array,
    tiles: Tiles,
    chunk: Chunk,
) -> tuple[jax.Array, jax.Array]:
    """Runs chunks over the rows that have a target, in as many iterations as those need."""
    shape, n = hidden.shape, weights.size
    flat, weights = hidden.reshape(n, -1), weights.reshape(n)
    targets = jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), targets)
    # Rows with a target first; the last chunk is padded with rows of weight zero.
    order = jnp.argsort(weights == 0, stable=True)
    sizes = sorted({min(rows, n) for rows in tiles.rows}, reverse=True)
    order = jnp.pad(order, (0, sizes[0]), constant_values=n)

    def chunks(rows: int, most: int, start: jax.Array, count: jax.Array, carry: Any) -> Any:
        def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            loss, gradient = carry
            index = lax.dynamic_slice(order, (start + i * rows,), (rows,))
            take = partial(jnp.take, indices=index, axis=0, mode="clip")
            h, w, t = take(flat), take(weights), jax.tree.map(take, targets)
            losses, back = chunk(h, kernel, t, jnp.where(index < n, w, 0.0), grad)
            if grad:
                gradient = gradient.at[index].set(back.astype(gradient.dtype), mode="drop")
            return loss + jnp.sum(losses), gradient

        return loop(count, most, body, carry)

    carry = (
        jnp.zeros((), jnp.float32),
        jnp.zeros_like(flat) if grad else jnp.zeros((0,), flat.dtype),
    )
    start, left, most = jnp.zeros((), jnp.int32), jnp.sum(weights != 0, dtype=jnp.int32), n
    for rows in sizes:
        count = -(-left // rows)
        # Leave a remainder that fits in one of the smallest chunks to that chunk.
        if rows > sizes[-1]:
            count = jnp.where(left - (count - 1) * rows > sizes[-1], count, count - 1)
        carry = chunks(rows, -(-most // rows), start, count, carry)
        start, left, most = start + count * rows, jnp.maximum(left - count * rows, 0), rows
    loss, gradient = carry
    if grad:
        gradient = gradient.reshape(shape)
    return loss, gradient


@dataclass(frozen=True)
class Columns:
    """Chunks of whole columns of a batch ``[batch, seq, ...]``, the last padded with zeros."""

    seq: int
    chunks: int
    step: int  # positions of each example in a chunk

    @classmethod
    def of(cls, batch: int, seq: int, rows: int) -> Columns:
        """Returns chunks of at most ``rows`` rows each, or of one column."""
        chunks = -(-seq // max(1, rows // max(batch, 1)))
        return cls(seq, chunks, -(-seq // chunks))

    def split(self, arrays: Any) -> Any:
        """Returns ``[chunks, batch, step, ...]`` of arrays ``[batch, seq, ...]``."""

        def one(x: jax.Array) -> jax.Array:
            padded = jnp.pad(
                x, ((0, 0), (0, self.chunks * self.step - self.seq)) + ((0, 0),) * (x.ndim - 2)
            )
            return jnp.moveaxis(padded.reshape(x.shape[0], self.chunks, self.step, *x.shape[2:]), 1, 0)

        return jax.tree.map(one, arrays)

    def join(self, parts: jax.Array) -> jax.Array:
        """Returns ``[batch, seq, ...]`` of ``[chunks, batch, step, ...]``."""
        joined = jnp.moveaxis(parts, 0, 1)
        return joined.reshape(joined.shape[0], self.chunks * self.step, *joined.shape[3:])[:, : self.seq]


def _along_sequence(
    grad: bool,
    hidden: jax.Array,
    kernel: Kernel,
    targets: Any,
    weights: jax.Array,
    tiles: Tiles,
    chunk: Chunk,
) -> tuple[jax.Array, jax.Array]:
    """Runs chunks of whole columns of the batch, so that every shard processes its own rows."""
    batch, seq, _ = hidden.shape
    columns = Columns.of(batch, seq, tiles.rows[0] * tiles.shards)

    def body(loss: jax.Array, columns_of: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
        h, w, t = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), columns_of)
        losses, back = chunk(h, kernel, t, w, grad)
        gradient = back.astype(h.dtype).reshape(batch, columns.step, -1)
        return loss + jnp.sum(losses.reshape(batch, columns.step), axis=1), gradient

    # Sums per example, so that shards of the batch are reduced once, after the loop.
    losses, parts = lax.scan(
        body, jnp.zeros((batch,), jnp.float32), columns.split((hidden, weights, targets))
    )
    loss = jnp.sum(losses)
    if grad:
        parts = columns.join(parts)
    return loss, parts
