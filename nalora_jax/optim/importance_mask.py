"""Mechanism 1: the temporal-importance mask, from the averaged |phi'(z)| of each gate channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array, lax

from nalora_jax import trees
from nalora_jax.config import MaskConfig
from nalora_jax.optim.columns import multiply_columns, require_gates
from nalora_jax.optim.gate_state import GateState


def hard_mask(importance: Array, keep: float) -> Array:
    """1 for the ``round(keep * d_ff)`` most important channels of each layer, at least one; ties go to the lower index.

    Args:
      importance: [..., d_ff], not negative.
      keep: share of channels kept, in (0, 1].
    """
    channels = importance.shape[-1]
    kept = max(1, round(keep * channels))
    threshold = lax.top_k(importance, kept)[0][..., -1:]
    above, tied = importance > threshold, importance == threshold
    vacancies = kept - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    chosen = tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= vacancies)
    return (above | chosen).astype(importance.dtype)


def soft_mask(importance: Array, power: float, low: float, high: float) -> Array:
    """``clip((I / mean(I))^power, low, high)`` over each layer's channels; all ones where I is all 0.

    Args:
      importance: [..., d_ff], not negative.
    """
    mean = jnp.mean(importance, axis=-1, keepdims=True)
    ratio = jnp.where(mean > 0, importance / jnp.where(mean > 0, mean, 1), 1)
    return jnp.clip(ratio**power, low, high)


def gate_masks(state: GateState, config: MaskConfig) -> dict[str, Array]:
    """The mask of the coming step, by block: [..., d_ff] float32.

    All ones if the mechanism is off, during the first ``config.warmup`` steps, and for layers that saw no token yet.
    """
    if config.kind == "off":
        return {path: jnp.ones_like(importance) for path, importance in state.importance.items()}
    masks = {}
    for path, importance in state.importance.items():
        active = (state.count >= config.warmup) & (state.updates[path] > 0)
        masks[path] = jnp.where(active[..., None], _rule(importance, config), 1)
    return masks


def mask_collection(masks: Mapping[str, Array]) -> dict[str, Any]:
    """Masks by block as the ``gate_mask`` collection of ``model.apply``.

    Example:
      >>> mask_collection({"layers/ffn": mask})
      {'layers': {'ffn': {'mask': mask}}}
    """
    return trees.unflatten({f"{path}/mask".removeprefix("/"): mask for path, mask in masks.items()})


def scale_by_channel_mask(gates: Mapping[str, str], *, leaf: str = "b") -> optax.GradientTransformationExtraArgs:
    """Multiply the columns of every gate's B by the ``gate_mask`` given at each update.

    Place it after the preconditioner and the weight decay: Adam undoes any factor that stays constant before it.

    Args:
      gates: block of each gate, e.g. ``{"layers/ffn/gate_proj": "layers/ffn"}`` (`find_gates`).
      leaf: name of B under a gate's path; its shape is [..., r, d_ff], that of the mask [..., d_ff].

    Returns:
      A stateless transform; ``update(..., gate_mask={"layers/ffn": mask})``.
    """

    def init_fn(params: Any) -> optax.EmptyState:
        require_gates(params, gates, leaf)
        return optax.EmptyState()

    def update_fn(
        updates: Any,
        state: optax.EmptyState,
        params: Any = None,
        *,
        gate_mask: Mapping[str, Array] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, optax.EmptyState]:
        del params, extra_args
        return multiply_columns(updates, gate_mask, gates, argument="gate_mask", leaf=leaf), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rule(importance: Array, config: MaskConfig) -> Array:
    if config.kind == "hard":
        return hard_mask(importance, config.keep)
    return soft_mask(importance, config.power, config.low, config.high)
