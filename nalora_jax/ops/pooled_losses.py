"""Vectors of texts in packed rows, and losses of such vectors: classification, rewards, embeddings.

A head or an embedding reads one vector of each text: the hidden state of its first or last token,
or the mean over its tokens. Losses have one value per text or per group of texts, in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

POOLINGS = ("last", "mean", "first")
_SMALLEST = 1e-24  # of a squared norm, as in torch's `normalize`
_MASKED = -1e30  # logit of a text that is padding


def pool_segments(
    hidden: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    segments: int,
    pooling: str,
) -> jax.Array:
    """Returns one vector of each segment of packed rows, float32 ``[rows, segments, d_model]``.

    Args:
      hidden: ``[rows, seq, d_model]``.
      segment_ids: int ``[rows, seq]``: 1 for the first segment of a row, 0 for padding.
      positions: int ``[rows, seq]``, counted from 0 in each segment.
      segments: the largest number of segments in a row; absent ones have zeros.
      pooling: one of `POOLINGS`.
    """
    numbers = jnp.arange(1, segments + 1)[None, :, None]
    inside = segment_ids[:, None, :] == numbers  # [rows, segments, seq]
    lengths = jnp.sum(inside, axis=-1, keepdims=True)
    if pooling == "mean":
        weights = inside / jnp.maximum(lengths, 1)
    else:
        place = jnp.zeros_like(lengths) if pooling == "first" else lengths - 1
        weights = inside & (positions[:, None, :] == place)
    return jnp.einsum(
        "rns,rsd->rnd",
        weights.astype(jnp.float32),
        hidden.astype(jnp.float32),
        precision="highest",
    )


def apply_score(vectors: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the outputs of a head: vectors ``[..., d_model]`` times ``[d_model, outputs]``."""
    return jnp.matmul(vectors, kernel, precision="highest")


def label_losses(logits: jax.Array, labels: jax.Array, form: str) -> jax.Array:
    """Returns the loss of each text, ``[...]``, as transformers' heads compute it.

    Args:
      logits: ``[..., outputs]``.
      labels: of the same shape: 1 for labels that apply, or scores.
      form: "one" (softmax), "several" or "binary" (a sigmoid per label) or "score" (squared error).
    """
    if form == "one":
        return -jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1)
    if form in ("several", "binary"):
        log_one = jax.nn.log_sigmoid(logits)
        log_zero = jax.nn.log_sigmoid(-logits)
        return -jnp.mean(labels * log_one + (1 - labels) * log_zero, axis=-1)
    return jnp.mean(jnp.square(logits - labels), axis=-1)


def reward_losses(rewards: jax.Array, margins: Any, center: float) -> jax.Array:
    """Returns Bradley-Terry's loss of each pair of answers, ``[...]``.

    Args:
      rewards: ``[..., 2]``, of the chosen answer first.
      margins: ``[...]``, by which the chosen reward should be larger, or 0.
      center: weight of the squared sum of both rewards (arXiv 2312.09244), which keeps their mean
        near 0.
    """
    chosen = rewards[..., 0]
    rejected = rewards[..., 1]
    losses = -jax.nn.log_sigmoid(chosen - rejected - margins)
    return losses + center * jnp.square(chosen + rejected)


def unit_vectors(vectors: jax.Array) -> jax.Array:
    """Returns vectors ``[..., d]`` divided by their lengths; zeros stay zeros."""
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, _SMALLEST))


def contrastive_losses(
    vectors: jax.Array, real: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Returns InfoNCE of each anchor over the positives and negatives of all groups.

    Args:
      vectors: ``[groups, texts, d]`` of the global batch: an anchor, its positive, its negatives.
      real: float ``[groups]``, 0 for padding.
      scale: of the cosines, the inverse of a temperature.

    Returns:
      Losses ``[groups]``, and 1 for each anchor whose positive is the nearest text, else 0.
    """
    unit = unit_vectors(vectors)
    anchors = unit[:, 0]
    # [groups, d] by [groups, texts - 1, d]: cosines with the texts of every group.
    cosines = jnp.einsum("nd,mtd->nmt", anchors, unit[:, 1:], precision="highest")
    logits = jnp.where(real[None, :, None] > 0, scale * cosines, _MASKED)
    positive = jnp.diagonal(logits[..., 0])
    losses = jax.nn.logsumexp(logits, axis=(1, 2)) - positive
    return losses, (positive >= jnp.max(logits, axis=(1, 2))).astype(jnp.float32)


def cosent_loss(
    vectors: jax.Array, scores: jax.Array, real: jax.Array, scale: float
) -> jax.Array:
    """Returns CoSENT's loss of all pairs of texts: log(1 + sum of exp(scale * (c_i - c_j))) over
    pairs of cosines of which c_j has the larger score.

    Args:
      vectors: ``[groups, 2, d]`` of the global batch.
      scores: ``[groups]``, of which only the order matters.
      real: float ``[groups]``, 0 for padding.
      scale: of the cosines.
    """
    unit = unit_vectors(vectors)
    cosines = scale * jnp.sum(unit[:, 0] * unit[:, 1], axis=-1)
    differences = cosines[:, None] - cosines[None, :]  # [groups, groups]
    counted = (scores[:, None] < scores[None, :]) & (real[:, None] * real[None, :] > 0)
    logits = jnp.where(counted, differences, _MASKED).reshape(-1)
    return jax.nn.logsumexp(jnp.append(logits, 0.0))


def cosine_losses(vectors: jax.Array, scores: jax.Array) -> jax.Array:
    """Returns the squared error of the cosine of two texts, ``[groups]``.

    Args:
      vectors: ``[groups, 2, d]``.
      scores: ``[groups]``, the cosines that they should have.
    """
    unit = unit_vectors(vectors)
    cosines = jnp.sum(unit[:, 0] * unit[:, 1], axis=-1)
    return jnp.square(cosines - scores)
