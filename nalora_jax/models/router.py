"""The choice of experts by a router's logits, and the rows sorted by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.models.expert_products import Groups

_GROUP_TOP = 2  # a group's score is the sum of its highest expert scores (DeepSeek-V3, arXiv 2412.19437)


@dataclass(frozen=True)
class RouterSpec:
    """Scores of a router and its choice of experts."""

    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True  # scale the chosen experts' scores to sum to 1
    correction: bool = False  # a bias per expert is added to scores for the choice only
    groups: int = 1  # groups of consecutive experts
    groups_kept: int = 1  # experts are chosen from the groups with the highest scores
    scale: float = 1.0  # multiplies the weights
    expert_scale: bool = False  # the model has a factor of each expert's weights


class Routing(NamedTuple):
    """Rows sorted by expert: row i is token ``token[i]`` in expert ``expert[i]``."""

    # int [tokens * top_k], sorts the rows (top_k of token 0, of token 1, ...) by expert
    order: jax.Array
    token: jax.Array  # int [tokens * top_k]
    expert: jax.Array  # int [tokens * top_k], ascending
    sizes: jax.Array  # int [experts], rows of each expert
    weight: jax.Array  # float32 [tokens * top_k]
    back: jax.Array  # int [tokens * top_k], inverse of ``order``

    @property
    def groups(self) -> Groups:
        """The rows' experts, without tokens and weights."""
        return Groups(self.sizes, self.expert)


def route(logits: jax.Array, top_k: int, spec: RouterSpec, *of_experts: jax.Array | None) -> Routing:
    """Returns the ``top_k`` experts of every token and their weights.

    Args:
      logits: float32 ``[tokens, experts]``.
      top_k: experts per token.
      spec: the choice of experts and their weights.
      of_experts: correction and scale, float32 ``[experts]`` or None, see `RouterSpec`.
    """
    n_experts = logits.shape[-1]
    weights, chosen = choose(logits, top_k, spec, *of_experts)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    return Routing(
        order=order,
        token=order // top_k,
        expert=flat[order],
        sizes=jnp.bincount(flat, length=n_experts).astype(jnp.int32),
        weight=weights.reshape(-1)[order],
        back=jnp.argsort(order),
    )


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
        ranked = scores
        if correction is not None:
            ranked = ranked + correction[None]
        chosen = lax.top_k(_within_groups(lax.stop_gradient(ranked), spec), top_k)[1]
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if spec.normalize:  # sigmoids may underflow
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    if expert_scale is not None:
        weights = weights * expert_scale[chosen]
    if spec.scale != 1.0:
        weights = weights * spec.scale
    return weights, chosen


def _within_groups(ranked: jax.Array, spec: RouterSpec) -> jax.Array:
    """Returns ``ranked [tokens, experts]`` with -inf outside of each token's kept groups."""
    if spec.groups == spec.groups_kept:
        return ranked
    grouped = ranked.reshape(ranked.shape[0], spec.groups, -1)
    of_groups = jnp.sum(lax.top_k(grouped, _GROUP_TOP)[0], axis=-1)
    inside = jax.nn.one_hot(lax.top_k(of_groups, spec.groups_kept)[1], spec.groups, dtype=bool)
    return jnp.where(jnp.any(inside, axis=1)[..., None], grouped, -jnp.inf).reshape(ranked.shape)
