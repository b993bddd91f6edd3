"""The choice of experts by a router's logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

_GROUP_TOP = 2  # a group's score is the sum of its highest expert scores (DeepSeek-V3, arXiv 2412.19437)


@dataclass(frozen=True)
class RouterSpec:
    """Scores of a router and its choice of experts."""

    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True  # scale the chosen experts' scores to sum to 1
    correction: bool = False  # the model has a bias per expert that is added to scores for the choice only
    groups: int = 1  # groups of consecutive experts
    groups_kept: int = 1  # experts are chosen from the groups with the highest scores
    scale: float = 1.0  # multiplies the weights
    expert_scale: bool = False  # the model has a factor of each expert's weights


def choose(
    logits: jax.Array,
    top_k: int,
    spec: RouterSpec,
    correction: jax.Array | None = None,
    expert_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns weights and indices of every token's experts, ``[tokens, top_k]``.

    Args:
      logits: float32 ``[tokens, experts]``.
      top_k: experts per token.
      spec: scores, groups and scale.
      correction: float32 ``[experts]``, if ``spec.correction``.
      expert_scale: float32 ``[experts]``, if ``spec.expert_scale``.
    """
    scores = jax.nn.softmax(logits, axis=-1) if spec.scores == "softmax" else jax.nn.sigmoid(logits)
    if correction is None and spec.groups == spec.groups_kept:
        weights, chosen = lax.top_k(scores, top_k)
    else:
        ranked = lax.stop_gradient(scores if correction is None else scores + correction[None])
        chosen = lax.top_k(_within_groups(ranked, spec), top_k)[1]
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if spec.normalize:  # sigmoids may underflow
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    if expert_scale is not None:
        weights = weights * expert_scale[chosen]
    return weights if spec.scale == 1.0 else weights * spec.scale, chosen


def _within_groups(ranked: jax.Array, spec: RouterSpec) -> jax.Array:
    """Returns ``ranked [tokens, experts]`` with -inf outside of each token's kept groups."""
    if spec.groups == spec.groups_kept:
        return ranked
    grouped = ranked.reshape(ranked.shape[0], spec.groups, -1)
    of_groups = jnp.sum(lax.top_k(grouped, _GROUP_TOP)[0], axis=-1)
    inside = jax.nn.one_hot(lax.top_k(of_groups, spec.groups_kept)[1], spec.groups, dtype=bool)
    return jnp.where(jnp.any(inside, axis=1)[..., None], grouped, -jnp.inf).reshape(ranked.shape)
