"""Cross-entropy over a trained output head, chunk by chunk as in `nalora_jax.ops.cross_entropy`.

The gradients of hidden states and head are computed in the same pass as the loss, so that logits
exist for one chunk at a time. The head's gradient is as large as its trained part.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nalora_jax.ops.cross_entropy import Columns, Head
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.matmul import dot
from nalora_jax.ops.storage import Kernel

_CHUNK_FLOATS = 1 << 25  # floats of one chunk of logits on a device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WholeHead:
    """A head that is trained entirely; also the type of its gradient.

    Attributes:
      kernel: float32 ``[d_model, vocab]``.
    """

    kernel: jax.Array

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary."""
        return self.kernel.shape[1]

    def zeros(self) -> WholeHead:
        """Returns a zero gradient."""
        return WholeHead(jnp.zeros(self.kernel.shape, jnp.float32))

    def products(self, hidden: jax.Array, numerics: Numerics) -> jax.Array:
        """Returns float32 ``[rows, vocab]`` of ``[rows, d_model]``."""
        return dot(hidden, self.kernel, numerics)

    def pull(self, hidden: jax.Array, delta: jax.Array, numerics: Numerics) -> tuple[jax.Array, WholeHead]:
        """Returns the gradients of hidden states and head.

        ``delta [rows, vocab]`` is the gradient of `products`.
        """
        back = dot(delta, self.kernel, numerics, dims=(1, 1))
        return back, WholeHead(dot(hidden, delta, numerics, dims=(0, 0)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadRows:
    """A frozen head with trained rows, one per token id.

    Its gradient has the same type, without a kernel.

    Attributes:
      rows: float32 ``[ids, d_model]``, which replace rows of the kernel.
      kernel: frozen, as it is stored; see ``transposed``.
      ids: token ids of the rows, all different.
      transposed: the kernel is an embedding ``[vocab, d_model]``; else ``[d_model, vocab]``.
    """

    rows: jax.Array
    kernel: Kernel | None
    ids: tuple[int, ...] = field(metadata={"static": True})
    transposed: bool = field(metadata={"static": True})

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

    def products(self, hidden: jax.Array, numerics: Numerics) -> jax.Array:
        """Returns float32 ``[rows, vocab]`` of ``[rows, d_model]``."""
        assert self.kernel is not None
        frozen = dot(hidden, self.kernel, numerics, dims=(1, 1 - self.axis))
        return frozen.at[:, np.array(self.ids)].set(dot(hidden, self.rows, numerics, dims=(1, 1)))

    def pull(self, hidden: jax.Array, delta: jax.Array, numerics: Numerics) -> tuple[jax.Array, HeadRows]:
        """Returns the gradients of hidden states and trained rows.

        ``delta [rows, vocab]`` is the gradient of `products`.
        """
        assert self.kernel is not None
        columns = np.array(self.ids)
        of_rows = delta[:, columns]
        of_others = delta.at[:, columns].set(0.0)  # the kernel's rows of these tokens are not used
        back = dot(of_others, self.kernel, numerics, dims=(1, self.axis))
        back = back + dot(of_rows, self.rows, numerics)
        return back, replace(self, rows=dot(of_rows, hidden, numerics, dims=(0, 0)), kernel=None)


def trained_cross_entropy(
    hidden: jax.Array,
    trained: WholeHead | HeadRows,
    targets: jax.Array,
    weights: jax.Array,
    head: Head,
    numerics: Numerics,
    *,
    chunk: int = 0,
    shards: int = 1,
) -> jax.Array:
    """Returns the sum of ``weights * -log p(target)``.

    It is differentiable with respect to ``hidden`` and the trained part of the head.

    Args:
      hidden: ``[batch, seq, d_model]`` after the final norm.
      trained: the head, trained entirely or by rows.
      targets: int ``[batch, seq]``.
      weights: ``[batch, seq]``, 0 for positions without a target.
      head: soft cap and scale.
      numerics: dtype of the operands; logits and gradients are float32.
      chunk: rows of logits at a time, on each device; 0 derives it from the size of the vocabulary.
      shards: parts that a mesh splits the batch into.
    """
    rows = (chunk or max(_CHUNK_FLOATS // trained.vocab_size // 128 * 128, 128)) * shards
    weights = lax.stop_gradient(weights.astype(jnp.float32))
    return _loss(hidden, trained, targets, weights, head, numerics, rows)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss(
    hidden: jax.Array,
    trained: WholeHead | HeadRows,
    targets: jax.Array,
    weights: jax.Array,
    head: Head,
    numerics: Numerics,
    rows: int,
) -> jax.Array:
    return _forward(hidden, trained, targets, weights, head, numerics, rows)[0]


def _forward(
    hidden: Any, trained: Any, targets: Any, weights: Any, head: Head, numerics: Numerics, rows: int
) -> Any:
    """Returns the loss, and the gradients of hidden states and head.

    Chunks are whole columns of the batch.
    """
    batch, seq, _ = hidden.shape
    columns = Columns.of(batch, seq, rows)

    def body(carry: tuple[jax.Array, Any], columns_of: Any) -> Any:
        h, t, w = (x.reshape(-1, *x.shape[2:]) for x in columns_of)
        logits, slope = head.logits(trained.products(h, numerics))
        log_total = jax.nn.logsumexp(logits, axis=-1)
        hit = jnp.arange(logits.shape[1], dtype=t.dtype)[None, :] == t[:, None]
        losses = w * (log_total - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1))
        delta = w[:, None] * (jnp.exp(logits - log_total[:, None]) - hit) * slope
        back, of_head = trained.pull(h, delta, numerics)
        loss, gradient = carry
        sums = loss + jnp.sum(losses), jax.tree.map(jnp.add, gradient, of_head)
        return sums, back.astype(h.dtype).reshape(batch, columns.step, -1)

    start = (jnp.zeros((), jnp.float32), trained.zeros())
    (loss, gradient), parts = lax.scan(body, start, columns.split((hidden, targets, weights)))
    return loss, (columns.join(parts), gradient)


def _backward(head: Head, numerics: Numerics, rows: int, gradients: Any, g: jax.Array) -> Any:
    del head, numerics, rows
    hidden, trained = gradients
    return hidden * g.astype(hidden.dtype), jax.tree.map(lambda x: x * g, trained), None, None


_loss.defvjp(_forward, _backward)
