"""Divergence of a student's next-token distribution from a teacher's, for distillation.

With p the student's probabilities, q the teacher's and m = (1 - beta) p + beta q, the divergence is
that of generalized knowledge distillation (arXiv 2306.13649), with the conventions of TRL's
``GKDTrainer``:

| beta | divergence | |
|---|---|---|
| 0 | KL(q, p) | forward |
| 1 | KL(p, q) | reverse |
| between | beta KL(q, m) + (1 - beta) KL(p, m) | generalized Jensen-Shannon |

Both models' logits exist for one chunk of positions at a time, and the gradient by the student's
logits is computed in the same pass from its formula. No array ``[tokens, vocab]`` is stored.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.losses import Head, measure_positions
from nalora_jax.ops.storage import Kernel, dot


def divergence(student: Array, teacher: Array, beta: float) -> tuple[Array, Array]:
    """Returns a divergence and its derivative by the student's logits.

    Args:
      student: log-probabilities ``[..., categories]``.
      teacher: of the same shape.
      beta: 0 for the forward divergence, 1 for the reverse one; see the table of this module.

    Returns:
      The divergence ``[...]`` in nats, and its derivative ``[..., categories]``.
    """
    p = jnp.exp(student)
    q = jnp.exp(teacher)
    if beta == 0:
        return jnp.sum(q * (teacher - student), axis=-1), p - q
    if beta == 1:
        ratio = student - teacher
        value = jnp.sum(p * ratio, axis=-1)
        return value, p * (ratio - value[..., None])
    mixture = jnp.logaddexp(student + jnp.log1p(-beta), teacher + jnp.log(beta))
    ratio = student - mixture
    of_student = jnp.sum(p * ratio, axis=-1)
    of_teacher = jnp.sum(q * (teacher - mixture), axis=-1)
    value = beta * of_teacher + (1 - beta) * of_student
    return value, (1 - beta) * p * (ratio - of_student[..., None])


class TeacherLogits(NamedTuple):
    """A teacher by its hidden states, in chunks with the student."""

    hidden: Array  # [batch, seq, d_model]
    kernel: Kernel  # of its head
    head: Head


class Divergences(NamedTuple):
    """Results of `token_divergences`, each times the weight of its position."""

    losses: Array  # float32 [batch, seq]
    # 1 where the most likely token of the student is the teacher's, float32 [batch, seq]
    agreements: Array
    # of the losses by the student's hidden states, [batch, seq, d_model]; d_model is 0 without
    gradient: Array


def token_divergences(
    hidden: Array,
    kernel: Kernel,
    teacher: TeacherLogits,
    weights: Array,
    beta: float,
    head: Head,
    numerics: Numerics,
    *,
    grad: bool = True,
    chunk: int = 0,
    compact: bool = True,
    shards: int = 1,
) -> Divergences:
    """Returns the divergence at every position, and its gradient by the student's hidden states.

    If the vocabularies differ in size, as tables that are padded do, only tokens of both count.

    Args:
      hidden: the student's, ``[batch, seq, d_model]`` after the final norm.
      kernel: of its head, as it is stored; see `nalora_jax.ops.losses.cross_entropy`.
      teacher: its hidden states at the same positions.
      weights: ``[batch, seq]``, 0 for positions that do not count.
      beta: see the table of this module.
      head: static options of the student's head, its scale divided by the temperature.
      numerics: dtype of the operands; logits are float32.
      grad: also compute the gradient.
      chunk, compact, shards: see `nalora_jax.ops.losses.cross_entropy`.
    """

    def measure(h: Array, kernel: Kernel, t: Array, w: Array) -> Divergences:
        """Returns the results of rows ``h`` of the student and ``t`` of the teacher, ``[rows,
        d_model]``."""
        logits, slope = head.logits(dot(h, kernel, numerics, dims=(1, 1 - head.axis)))
        axis = teacher.head.axis
        products = dot(t, teacher.kernel, numerics, dims=(1, 1 - axis))
        of_teacher, _ = teacher.head.logits(products)
        common = min(logits.shape[1], of_teacher.shape[1])
        log_p = jax.nn.log_softmax(logits[:, :common])
        log_q = jax.nn.log_softmax(of_teacher[:, :common])
        value, delta = divergence(log_p, log_q, beta)
        agrees = jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1)
        back = jnp.zeros((h.shape[0], 0), h.dtype)
        if grad:
            delta = jnp.pad(delta, ((0, 0), (0, logits.shape[1] - common)))
            by_products = w[:, None] * delta * slope
            back = dot(by_products, kernel, numerics, dims=(1, head.axis))
            back = back.astype(h.dtype)
        return Divergences(w * value, w * agrees, back)

    results: Divergences = measure_positions(
        measure,
        hidden,
        kernel,
        teacher.hidden,
        weights,
        head,
        chunk=chunk,
        compact=compact,
        shards=shards,
    )
    return results
