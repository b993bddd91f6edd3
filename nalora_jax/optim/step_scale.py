"""Mechanism 2: the step scale, from the regions of effective homogeneity that each gate channel occupies."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax.numpy as jnp
import optax
from jax import Array

from nalora_jax.activations import Partition
from nalora_jax.config import StepScaleConfig
from nalora_jax.optim.columns import multiply_columns, require_gates
from nalora_jax.optim.gate_state import GateState
from nalora_jax.selection import meaningful

_log = logging.getLogger(__name__)


def homogeneity_scale(occupancy: Array, gains: Sequence[float]) -> Array:
    """``gamma_c = sum_k p_ck g_k``, divided by its mean over each layer's channels; all ones where it is all 0.

    Args:
      occupancy: [..., 4, d_ff] shares of tokens per region (inverted, contracting, expanding, linear).
      gains: g_k, which should fall where the region's degree is low: steps that grow there measured worse.

    Returns:
      [..., d_ff] with mean 1 over the last axis: a re-allocation, never another learning rate.
    """
    chex.assert_axis_dimension(occupancy, -2, len(gains))
    gamma = sum(gain * occupancy[..., region, :] for region, gain in enumerate(gains))
    mean = jnp.mean(gamma, axis=-1, keepdims=True)
    return jnp.where(mean > 0, gamma / jnp.where(mean > 0, mean, 1), 1)


def step_scales(state: GateState, config: StepScaleConfig, partition: Partition) -> dict[str, Array]:
    """The step scale of the coming step, by block: [..., d_ff] float32.

    All ones if the mechanism is off, during the first ``config.warmup`` steps, for an activation without a meaningful
    partition (said once in the log), and for layers whose tokens do not occupy two regions of different degree.
    """
    ones = {path: jnp.ones_like(importance) for path, importance in state.importance.items()}
    if config.kind == "off":
        return ones
    if not partition.meaningful:
        _say_that_it_is_constant(partition.activation)
        return ones
    scales = {}
    for path, occupancy in state.occupancy.items():
        active = (state.count >= config.warmup) & (state.updates[path] > 0)
        active &= meaningful(occupancy, partition, config.min_occupancy)
        scales[path] = jnp.where(active[..., None], homogeneity_scale(occupancy, config.gains), 1)
    return scales


def scale_by_channel_step(gates: Mapping[str, str], *, leaf: str = "b") -> optax.GradientTransformationExtraArgs:
    """Multiply the columns of every gate's B by the ``gate_step`` given at each update.

    Place it after the preconditioner and the weight decay: Adam undoes any factor that stays constant before it.

    Args:
      gates: block of each gate, e.g. ``{"layers/ffn/gate_proj": "layers/ffn"}`` (`find_gates`).
      leaf: name of B under a gate's path; its shape is [..., r, d_ff], that of the scale [..., d_ff].

    Returns:
      A stateless transform; ``update(..., gate_step={"layers/ffn": scale})``.
    """

    def init_fn(params: Any) -> optax.EmptyState:
        require_gates(params, gates, leaf)
        return optax.EmptyState()

    def update_fn(
        updates: Any,
        state: optax.EmptyState,
        params: Any = None,
        *,
        gate_step: Mapping[str, Array] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, optax.EmptyState]:
        del params, extra_args
        return multiply_columns(updates, gate_step, gates, argument="gate_step", leaf=leaf), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@functools.cache
def _say_that_it_is_constant(activation: str) -> None:
    _log.info("step scale: %s has no meaningful effective-homogeneity partition, so the scale is 1", activation)
