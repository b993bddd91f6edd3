"""Losses of policy gradients with verifiable rewards, as pure functions of log-probabilities.

A prompt has a group of samples. Its rewards become advantages (`advantages`); a loss weighs each
token's probability ratio ``exp(log p - log p_old)`` with the advantage of its sample, clipped so
that one update does not move far from the policy that sampled (`policy_loss`):

| name | advantage | ratio | clipped at | mean over |
|---|---|---|---|---|
| grpo (arXiv 2402.03300) | (r - mean) / std of the group | token | 0.8, 1.2 | tokens of a sample,
then samples | | dr_grpo (2503.20783) | r - mean | token | 0.8, 1.2 | samples, tokens / limit of
tokens | | dapo (2503.14476) | (r - mean) / std | token | 0.8, 1.28 | all tokens |
| gspo (2507.18071) | (r - mean) / std | exp of the mean log-ratio of a sample | 0.9997, 1.0004 |
samples | | rloo (2402.14740) | r - mean of the others | product over a sample | 0.8, 1.2 | samples
|
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

Name = Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo"]
# Distances of the clipped ratio below and above 1, from the papers.
CLIPS = {
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "rloo": (0.2, 0.2),
}
_SMALLEST = 1e-4  # added to a group's standard deviation, as TRL does


class PolicyLoss(NamedTuple):
    """The static settings of a loss."""

    name: Name
    low: float  # the ratio is clipped at 1 - low
    high: float  # and at 1 + high
    length: int  # limit of the tokens of a sample, which "dr_grpo" divides by
    beta: float = 0.0  # weight of the divergence from the base


class Correction(NamedTuple):
    """The static settings of the correction for samples of another policy, see
    `importance_weights`."""

    clip: float = 2.0  # largest weight of a token; 0: all weights are 1
    tokens: tuple[
        float, ...
    ] = ()  # weights of tokens in the loss, (low, high); (): any
    # geometric means of the weights of samples in the loss, (low, high); (): any
    samples: tuple[float, ...] = ()


class ImportanceWeights(NamedTuple):
    """Importance weights, float32 ``[samples, tokens]``; ``[samples, 1]`` for whole samples."""

    ratio: Array  # before clip and masks
    weights: Array  # 0 for what a mask leaves out
    in_tokens: Array  # bool, inside of `Correction.tokens`
    in_samples: Array  # bool [samples, 1], inside of `Correction.samples`


class Losses(NamedTuple):
    """Results for a batch, float32."""

    loss: Array  # [], summed
    divergence: (
        Array  # [samples, tokens], from the base; 0 without its log-probabilities
    )
    clipped: (
        Array  # [samples, tokens], 1 for tokens without a gradient because of the clip
    )


def advantages(rewards: np.ndarray, name: Name) -> np.ndarray:
    """Returns the advantage of each sample over its group, ``[prompts, samples]``.

    A NaN is a sample without a reward: it is in no mean and its advantage is 0. A group with fewer
    than two rewards has no advantages.
    """
    known = ~np.isnan(rewards)
    count = known.sum(1, keepdims=True)
    values = np.where(known, rewards, 0.0)
    mean = values.sum(1, keepdims=True) / np.maximum(count, 1)
    centered = np.where(known & (count > 1), values - mean, 0.0)
    others = np.maximum(count - 1, 1)  # the other samples of a group
    if name == "rloo":  # r - (sum - r) / (n - 1)
        return centered * count / others
    if name == "dr_grpo":
        return centered
    squares = (centered**2).sum(1, keepdims=True)
    deviation = np.sqrt(squares / others)
    return centered / (deviation + _SMALLEST)


def denominator(mask: Array, real: Array, settings: PolicyLoss) -> Array:
    """Returns the number that a batch's sum of losses is divided by, float32 ``[]``: its tokens
    with "dapo", otherwise its samples.

    ``mask [samples, tokens]`` is 1 for tokens in the loss, ``real [samples]`` is 0 for samples of
    padding only.
    """
    if settings.name == "dapo":
        return jnp.sum(mask, dtype=jnp.float32)
    return jnp.sum(real, dtype=jnp.float32)


def importance_weights(
    old: Array, sampled: Array, mask: Array, correction: Correction, name: Name
) -> ImportanceWeights:
    """Returns the weights ``p_old / p_sampled`` that correct for samples of another policy.

    The policy that sampled differs from the one before the update if an engine computes otherwise
    or serves an earlier adapter. Weights are truncated, as in TRL and SkyRL; masks leave out
    tokens and whole samples, these by the geometric mean over their tokens. "rloo" has one weight
    per sample, the product.

    Args:
      old: log-probabilities by the training program before the update, ``[samples, tokens]``.
      sampled: by the engine that sampled, at the temperature of ``old``.
      mask: 0 for padding.
      correction: clip and masks.
      name: of the loss.
    """
    log_ratio = (old - sampled) * mask
    tokens = jnp.sum(mask, axis=1, keepdims=True)
    total = jnp.sum(log_ratio, axis=1, keepdims=True)
    mean = total / jnp.maximum(tokens, 1.0)
    if name == "rloo":
        log_ratio = total
    ratio = jnp.exp(log_ratio)
    weights = jnp.ones_like(ratio)
    if correction.clip:
        weights = jnp.minimum(ratio, correction.clip)
    in_tokens = _inside(ratio, correction.tokens)
    in_samples = _inside(jnp.exp(mean), correction.samples)
    return ImportanceWeights(
        ratio, weights * in_tokens * in_samples, in_tokens, in_samples
    )


def _inside(values: Array, bounds: tuple[float, ...]) -> Array:
    """Returns True for values within ``bounds``, (low, high), or for all without bounds."""
    if not bounds:
        return jnp.ones_like(values, bool)
    low, high = bounds
    return (values >= low) & (values <= high)


def policy_loss(
    log_probs: Array,
    old: Array,
    base: Array | None,
    mask: Array,
    advantage: Array,
    settings: PolicyLoss,
    weights: Array | None = None,
) -> Losses:
    """Returns the sum of the losses of samples.

    The divergence is ``p_base / p - log(p_base / p) - 1``, an unbiased estimate that is never
    negative (http://joschu.net/blog/kl-approx.html); times beta it is added to each token's loss.
    With "rloo" it has its place in the rewards, see `divergence_penalty`.

    Log-probabilities are ``[samples, tokens]``: of the policy, by which the loss is differentiable,
    of the ``old`` policy that sampled, and of the ``base`` without adapters (None, with a beta of
    0, leaves out the divergence). The mask is 0 for padding; the advantage is ``[samples]``. The
    ``weights`` (`importance_weights`) multiply each token's loss, but not its divergence.
    """
    tokens = jnp.sum(mask, axis=1, keepdims=True)
    # By token; "gspo" and "rloo" have one ratio per sample, its mean or its sum.
    log_ratio = (log_probs - old) * mask
    if settings.name == "gspo":
        total = jnp.sum(log_ratio, axis=1, keepdims=True)
        log_ratio = total / jnp.maximum(tokens, 1.0)
    elif settings.name == "rloo":
        log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True)
    ratio = jnp.exp(log_ratio)
    gain = advantage[:, None]
    bounded = jnp.clip(ratio, 1 - settings.low, 1 + settings.high)
    # [samples, tokens], or [samples, 1] if all tokens of a sample have one ratio.
    loss = -jnp.minimum(ratio * gain, bounded * gain)
    if weights is not None:
        loss = loss * weights
    # Tokens without gradient: past the bound in the direction that the advantage favours.
    below = (ratio < 1 - settings.low) & (gain < 0)
    above = (ratio > 1 + settings.high) & (gain > 0)
    clipped = mask * (below | above)
    divergence = jnp.zeros_like(mask)
    if base is not None:
        base_ratio = base - log_probs  # log(p_base / p)
        divergence = mask * (jnp.exp(base_ratio) - base_ratio - 1)
    if settings.beta and settings.name != "rloo":
        loss = loss + settings.beta * divergence
    if settings.name == "rloo":
        per_sample = loss[:, 0]
    elif settings.name == "dapo":
        per_sample = jnp.sum(loss * mask, axis=1)
    elif settings.name == "dr_grpo":
        per_sample = jnp.sum(loss * mask, axis=1) / settings.length
    else:
        per_sample = jnp.sum(loss * mask, axis=1) / jnp.maximum(tokens[:, 0], 1.0)
    return Losses(jnp.sum(per_sample), divergence, clipped)


def divergence_penalty(
    old: np.ndarray, base: np.ndarray, mask: np.ndarray, beta: float
) -> np.ndarray:
    """Returns the part that "rloo" subtracts from the rewards, ``[samples]``: beta times each
    sample's log-ratio."""
    return beta * ((old - base) * mask).sum(1)
