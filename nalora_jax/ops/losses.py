"""Losses over the vocabulary without the logits of all tokens in memory.

    loss = sum over tokens of  weight * (log sum exp l - l[target])
    l = cap tanh(scale h E^T / cap)

Logits exist for one chunk of rows at a time. The gradients of the hidden states, and of a head that
is trained (`trained_cross_entropy`), are computed in the same pass from the chunk's probabilities.
Every value is computed once, and no array of size ``[tokens, vocab]`` is saved for the backward
pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nalora_jax.ops.dispatch import Numerics, operation
from nalora_jax.ops.reductions import join_tiles, split_tiles
from nalora_jax.ops.storage import Kernel, dot

# Floats of one chunk of logits on a device: 512 MB. Each chunk reads the whole head twice, so an
# accelerator needs some thousand rows per chunk to be limited by its matrix unit.
_CHUNK_FLOATS = 1 << 27
_LEAST_ROWS = 1024
# Floats of a chunk and its least number of rows without a backward pass, and with a trained head,
# whose gradient each chunk adds to.
_SMALL = 1 << 25, 128


class Head(NamedTuple):
    """The static options of the map from hidden states to logits."""

    transposed: bool = False  # the kernel is an embedding [vocab, d_model]
    softcap: float = 0.0  # c tanh(logits / c); 0: none
    scale: float = 1.0  # factor of the logits, before the cap

    @property
    def axis(self) -> int:
        """The vocabulary's axis in the kernel; the other axis is the model's."""
        return int(not self.transposed)

    def logits(self, products: Array) -> tuple[Array, Array]:
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
    """Returns the sum of ``weights * -log p(target)``, float32, differentiable by ``hidden`` only.

    Args:
      hidden: ``[batch, seq, d_model]`` after the final norm.
      kernel: frozen ``[d_model, vocab]``, or ``[vocab, d_model]`` with ``head.transposed``, as it
        is stored.
      targets: int ``[batch, seq]``.
      weights: ``[batch, seq]``, 0 for positions without a target.
      head: static options.
      numerics: dtype of the operands; logits are float32.
      chunk: rows of logits at a time, on each device; 0 derives it from the size of the vocabulary.
      compact: compute logits of rows that have a target only. On a mesh that splits the batch this
        would move rows between devices; there, chunks run along the sequence instead.
      shards: parts that a mesh splits the batch into. If the mesh also splits the kernel, gather it
        before the call, because otherwise every chunk gathers it again.
    """
    chex.assert_rank(hidden, 3)
    chex.assert_shape([targets, weights], hidden.shape[:2])
    weights = lax.stop_gradient(weights.astype(jnp.float32))
    rows = chunk or rows_of_chunk(kernel.shape[head.axis])

    def sums(hidden: Array, constants: Any, grad: bool) -> tuple[Array, Array | None]:
        """Returns the loss, and its gradient by ``hidden`` if ``grad``, otherwise None."""
        kernel, targets, weights = constants

        def summed(
            total: Callable[[Array], Array], h: Array, t: Array, w: Array
        ) -> Any:
            """Returns ``total`` of the losses of some rows ``h [rows, d_model]``, and their
            gradient, None unless ``grad``."""
            losses, back = chunk_of_rows(
                h, kernel, t, w, grad, head=head, numerics=numerics
            )
            if not grad:
                return total(losses), None
            return total(losses), back.astype(h.dtype)

        if compact:
            gradient = jnp.zeros_like(hidden) if grad else None
            start = jnp.zeros((), jnp.float32), gradient
            return _of_targets(
                partial(summed, jnp.sum), hidden, targets, weights, rows, start
            )
        # Sums per example, so that shards of the batch are reduced once, after the loop.
        by_example = partial(
            summed, lambda losses: jnp.sum(losses.reshape(hidden.shape[0], -1), axis=1)
        )
        zeros = jnp.zeros(hidden.shape[:1], jnp.float32)
        losses, gradient = _along_sequence(
            by_example, hidden, targets, weights, rows * shards, zeros
        )
        return jnp.sum(losses), gradient

    return loss_of_sums(sums, hidden, (lax.stop_gradient(kernel), targets, weights))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def loss_of_sums(
    sums: Callable[..., tuple[Array, Any]], inputs: Any, constants: Any
) -> Array:
    """Returns a loss whose gradient is computed in the forward pass.

    ``sums(inputs, constants, grad)`` returns the loss and the gradient of ``inputs``. It is called
    with ``grad`` False, and its gradient is not used, if the loss is not differentiated.
    ``constants`` have no gradient.
    """
    return sums(inputs, constants, False)[0]


def _loss_of_sums_bwd(_: Any, gradients: Any, g: Array) -> tuple[Any, None]:
    """Returns the gradients of the inputs times the loss's gradient ``g``; constants have none."""
    return jax.tree.map(lambda x: x * g.astype(x.dtype), gradients), None


loss_of_sums.defvjp(
    lambda sums, inputs, constants: sums(inputs, constants, True), _loss_of_sums_bwd
)


def rows_of_chunk(
    vocab: int, floats: int = _CHUNK_FLOATS, least: int = _LEAST_ROWS
) -> int:
    """Returns how many rows of logits fit into ``floats`` numbers, but at least ``least``, in
    multiples of 128."""
    # A multiple of 128, the rows that a TPU's matrix unit processes at once.
    return max(floats // vocab // 128 * 128, least)


@operation
def chunk_of_rows(
    hidden: Array,
    kernel: Kernel,
    targets: Array,
    weights: Array,
    grad: bool,
    *,
    head: Head,
    numerics: Numerics,
) -> tuple[Array, Array]:
    """Returns each row's loss ``[rows]`` and the gradient of hidden, ``[rows, 0]`` unless
    ``grad``."""
    logits, slope = head.logits(dot(hidden, kernel, numerics, dims=(1, 1 - head.axis)))
    hit = _hits(targets, logits.shape[1])
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    exps = jnp.exp(shifted)
    total = jnp.sum(exps, axis=-1, keepdims=True)
    picked = jnp.sum(jnp.where(hit, shifted, 0.0), axis=-1)
    loss = weights * (jnp.log(total[:, 0]) - picked)
    if not grad:
        return loss, jnp.zeros((hidden.shape[0], 0), jnp.float32)
    probabilities = exps / total
    by_products = (probabilities - hit) * slope  # gradient, [rows, vocab]
    back = dot(by_products, kernel, numerics, dims=(1, head.axis))
    return loss, weights[:, None] * back


def _hits(targets: Array, vocabulary: int) -> Array:
    """Returns True at each row's target, bool ``[rows, vocabulary]``.

    The comparison is fused into existing passes. A gather would cross devices that split the
    vocabulary, and taking columns of an untied head would create a transposed copy of it: 1 GB for
    128k entries of 4,096 values.
    """
    tokens = jnp.arange(vocabulary, dtype=targets.dtype)
    return tokens[None, :] == targets[:, None]


# ``(hidden [rows, d_model], targets [rows, ...], weights [rows])`` -> sums over rows, arrays
# ``[rows, ...]``
RowsChunk = Callable[[Array, Any, Array], tuple[Any, Any]]


def _of_targets(
    chunk: RowsChunk,
    hidden: Array,
    targets: Array,
    weights: Array,
    rows: int,
    start: Any,
) -> Any:
    """Runs ``chunk`` on ``rows`` positions at a time, until all positions that have a target are
    done.

    ``start`` are sums, which every chunk adds to, and arrays ``[batch, seq, ...]``, into which it
    writes the results of its positions. Returns both.
    """
    n = weights.size
    flat = hidden.reshape(n, -1)  # [batch * seq, d_model]
    weights = weights.reshape(n)
    targets = targets.reshape(n, *targets.shape[2:])
    rows = min(rows, n)
    # Rows with a target first; the last chunk is padded with rows of weight zero.
    order = jnp.pad(
        jnp.argsort(weights == 0, stable=True), (0, rows), constant_values=n
    )

    def body(i: Array, carry: Any) -> Any:
        """Adds the sums of chunk ``i``, and writes its results into the outputs."""
        sums, outputs = carry
        # Positions of the chunk in the flat batch; n for padding.
        index = lax.dynamic_slice(order, (i * rows,), (rows,))
        take = partial(jnp.take, indices=index, axis=0, mode="clip")
        h = take(flat)
        w = take(weights)
        t = take(targets)
        more, parts = chunk(h, t, jnp.where(index < n, w, 0.0))
        write = lambda whole, part: whole.at[index].set(part, mode="drop")  # noqa: E731
        return jax.tree.map(jnp.add, sums, more), jax.tree.map(write, outputs, parts)

    # [batch, seq, ...] -> [batch * seq, ...]
    outputs = jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), start[1])
    with_target = jnp.sum(weights != 0, dtype=jnp.int32)
    chunks = -(-with_target // rows)
    most_chunks = -(-n // rows)
    sums, outputs = _loop(chunks, most_chunks, body, (start[0], outputs))
    return sums, jax.tree.map(
        lambda x: x.reshape(*hidden.shape[:2], *x.shape[1:]), outputs
    )


def _loop(
    count: Array, most: int, body: Callable[[Array, Any], Any], carry: Any
) -> Any:
    """Runs ``body(i, carry)`` ``count`` times.

    The compiled condition contains ``most``, the largest count, so that `nalora_jax.planner` can
    count the iterations of a full batch.
    """
    more = lambda state: (state[0] < most) & (state[0] < count)  # noqa: E731
    step = lambda state: (state[0] + 1, body(*state))  # noqa: E731
    return lax.while_loop(more, step, (jnp.zeros((), jnp.int32), carry))[1]


def _along_sequence(
    chunk: RowsChunk, hidden: Array, targets: Any, weights: Array, rows: int, start: Any
) -> Any:
    """Runs ``chunk`` on some positions of every row at a time, so that every shard of the batch has
    its part of each chunk.

    A chunk has at most ``rows`` positions in total, or one position of every row. Returns ``start``
    plus the chunks' sums, and their results as ``[batch, seq, ...]``.
    """
    batch, seq = weights.shape
    columns = max(1, rows // max(batch, 1))  # positions of every row in a chunk
    chunks = -(-seq // columns)

    def body(sums: Any, columns_of: Any) -> tuple[Any, Any]:
        """Adds a chunk's sums, and returns its results by row as ``[batch, positions, ...]``."""
        # [batch, positions, ...] -> [batch * positions, ...]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), columns_of)
        h, w, t = flat
        more, parts = chunk(h, t, w)
        of_columns = columns_of[1].shape  # [batch, positions]
        parts = jax.tree.map(lambda x: x.reshape(*of_columns, *x.shape[1:]), parts)
        return jax.tree.map(jnp.add, sums, more), parts

    tiled = jax.tree.map(partial(split_tiles, tiles=chunks), (hidden, weights, targets))
    sums, parts = lax.scan(body, start, tiled)
    return sums, jax.tree.map(partial(join_tiles, seq=seq), parts)


def target_losses(
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
    """Returns ``weights * -log p(target)`` of every position, float32 ``[batch, seq]``, without a
    gradient.

    The arguments are those of `cross_entropy`.
    """

    def losses(h: Array, kernel: Kernel, t: Array, w: Array) -> Array:
        """Returns the losses of some rows."""
        return chunk_of_rows(h, kernel, t, w, False, head=head, numerics=numerics)[0]

    return measure_positions(
        losses,
        hidden,
        kernel,
        targets,
        weights,
        head,
        chunk=chunk,
        compact=compact,
        shards=shards,
    )


class TargetScores(NamedTuple):
    """What `target_scores` measures of every position, times its weight."""

    losses: Array  # -log p(target)
    # log p(target) - log sum p^2: how much more likely the target is than a token that is drawn
    # from p would be on average
    alignments: Array


def target_scores(
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
) -> TargetScores:
    """Returns losses and alignments of every position, float32 ``[batch, seq]``, without a
    gradient.

    The arguments are those of `cross_entropy`.
    """

    def scores(h: Array, kernel: Kernel, t: Array, w: Array) -> TargetScores:
        """Returns the scores of some rows."""
        logits, _ = head.logits(dot(h, kernel, numerics, dims=(1, 1 - head.axis)))
        hit = _hits(t, logits.shape[1])
        shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
        exps = jnp.exp(shifted)
        log_total = jnp.log(jnp.sum(exps, axis=-1))
        log_squares = jnp.log(jnp.sum(jnp.square(exps), axis=-1))
        log_prob = jnp.sum(jnp.where(hit, shifted, 0.0), axis=-1) - log_total
        return TargetScores(
            losses=-w * log_prob,
            alignments=w * (log_prob - (log_squares - 2 * log_total)),
        )

    return measure_positions(
        scores,
        hidden,
        kernel,
        targets,
        weights,
        head,
        chunk=chunk,
        compact=compact,
        shards=shards,
    )


def measure_positions(
    measure: Callable[[Array, Kernel, Any, Array], Any],
    hidden: Array,
    kernel: Kernel,
    targets: Array,
    weights: Array,
    head: Head,
    *,
    chunk: int,
    compact: bool,
    shards: int,
) -> Any:
    """Returns ``measure(hidden, kernel, targets, weights)`` of every position, arrays ``[batch,
    seq, ...]``.

    ``measure`` is called on some positions at a time, and has no gradient. ``targets`` are
    ``[batch, seq, ...]``. A position of weight 0 may have zeros as results. The other arguments are
    those of `cross_entropy`.
    """
    rows = chunk or rows_of_chunk(kernel.shape[head.axis], *_SMALL)
    hidden, kernel, targets, weights = lax.stop_gradient(
        (hidden, kernel, targets, weights.astype(jnp.float32))
    )

    def of_rows(h: Array, t: Array, w: Array) -> tuple[None, Any]:
        """Returns no sums, and the results by row."""
        return None, measure(h, kernel, t, w)

    if compact and shards == 1:
        # [batch, seq, ...] -> [batch * seq, ...]
        flat = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (hidden, targets, weights)
        )
        measured = jax.eval_shape(of_rows, *flat)[1]
        zeros = jax.tree.map(
            lambda x: jnp.zeros((*weights.shape, *x.shape[1:]), x.dtype), measured
        )
        return _of_targets(of_rows, hidden, targets, weights, rows, (None, zeros))[1]
    return _along_sequence(of_rows, hidden, targets, weights, rows * shards, None)[1]


# ---------------------------------------------------------------- a trained head


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WholeHead:
    """A head that is trained entirely; also the type of its gradient."""

    kernel: Array  # float32 [d_model, vocab]; of tied embeddings [vocab, d_model]
    transposed: bool = field(
        default=False, metadata={"static": True}
    )  # [vocab, d_model]

    @property
    def axis(self) -> int:
        """The vocabulary's axis in the kernel; the other axis is the model's."""
        return int(not self.transposed)

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary."""
        return self.kernel.shape[self.axis]

    def zeros(self) -> WholeHead:
        """Returns a zero gradient."""
        return replace(self, kernel=jnp.zeros(self.kernel.shape, jnp.float32))

    def products(self, hidden: Array, numerics: Numerics) -> Array:
        """Returns float32 ``[rows, vocab]`` of ``[rows, d_model]``."""
        return dot(hidden, self.kernel, numerics, dims=(1, 1 - self.axis))

    def pull(
        self, hidden: Array, delta: Array, numerics: Numerics
    ) -> tuple[Array, WholeHead]:
        """Returns the gradients of hidden states and head for ``delta [rows, vocab]``, the gradient
        of `products`."""
        back = dot(delta, self.kernel, numerics, dims=(1, self.axis))
        if self.transposed:
            gradient = dot(delta, hidden, numerics, dims=(0, 0))
        else:
            gradient = dot(hidden, delta, numerics, dims=(0, 0))
        return back, replace(self, kernel=gradient)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadRows:
    """A frozen head with trained rows; its gradient has the same type, without a kernel."""

    rows: Array  # float32 [ids, d_model], which replace rows of the kernel
    # frozen, as it is stored: an embedding [vocab, d_model], or [d_model, vocab]
    kernel: Kernel | None
    # token ids of the rows, all different
    ids: tuple[int, ...] = field(metadata={"static": True})
    transposed: bool = field(metadata={"static": True})  # the kernel is an embedding

    @property
    def axis(self) -> int:
        """The vocabulary's axis in the kernel; the other axis is the model's."""
        return int(not self.transposed)

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary."""
        assert self.kernel is not None
        return self.kernel.shape[self.axis]

    def zeros(self) -> HeadRows:
        """Returns a zero gradient."""
        return replace(self, rows=jnp.zeros(self.rows.shape, jnp.float32), kernel=None)

    def products(self, hidden: Array, numerics: Numerics) -> Array:
        """Returns float32 ``[rows, vocab]`` of ``[rows, d_model]``."""
        assert self.kernel is not None
        frozen = dot(hidden, self.kernel, numerics, dims=(1, 1 - self.axis))
        return frozen.at[:, np.array(self.ids)].set(
            dot(hidden, self.rows, numerics, dims=(1, 1))
        )

    def pull(
        self, hidden: Array, delta: Array, numerics: Numerics
    ) -> tuple[Array, HeadRows]:
        """Returns the gradients of hidden states and trained rows for the gradient of
        `products`."""
        assert self.kernel is not None
        columns = np.array(self.ids)
        of_rows = delta[:, columns]  # [rows, ids]
        # The kernel's own rows of these tokens are replaced, so that they give no gradient.
        of_others = delta.at[:, columns].set(0.0)
        back = dot(of_others, self.kernel, numerics, dims=(1, self.axis))
        back = back + dot(of_rows, self.rows, numerics)
        return back, replace(
            self, rows=dot(of_rows, hidden, numerics, dims=(0, 0)), kernel=None
        )


def trained_cross_entropy(
    hidden: Array,
    trained: WholeHead | HeadRows,
    targets: Array,
    weights: Array,
    head: Head,
    numerics: Numerics,
    *,
    chunk: int = 0,
    shards: int = 1,
) -> Array:
    """Returns the loss of `cross_entropy`, differentiable by ``hidden`` and the trained part of the
    head."""
    rows = (chunk or rows_of_chunk(trained.vocab_size, *_SMALL)) * shards
    weights = lax.stop_gradient(weights.astype(jnp.float32))

    def sums(inputs: Any, constants: Any, grad: bool) -> Any:
        """Returns the loss, and the gradients of hidden states and head; chunks are whole columns
        of the batch."""
        hidden, trained = inputs
        targets, weights = constants

        def chunk(h: Array, t: Array, w: Array) -> tuple[tuple[Array, Any], Array]:
            """Returns the loss and head gradient of ``h [rows, d_model]``, and the gradient of
            ``h``."""
            logits, slope = head.logits(trained.products(h, numerics))
            log_total = jax.nn.logsumexp(logits, axis=-1)
            hit = _hits(t, logits.shape[1])
            of_target = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
            losses = w * (log_total - of_target)
            # The gradient by the products [rows, vocab]: that of the logits, times their slope.
            probabilities = jnp.exp(logits - log_total[:, None])
            delta = w[:, None] * (probabilities - hit) * slope
            back, of_head = trained.pull(h, delta, numerics)
            return (jnp.sum(losses), of_head), back.astype(h.dtype)

        start = jnp.zeros((), jnp.float32), trained.zeros()
        (loss, gradient), back = _along_sequence(
            chunk, hidden, targets, weights, rows, start
        )
        return loss, (back, gradient)

    return loss_of_sums(sums, (hidden, trained), (targets, weights))
