"""Mechanism 2: the step scale, and its rule by the regions of effective homogeneity that a gate channel occupies."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import chex
import jax.numpy as jnp
from jax import Array

from nalora_jax.config import StepScaleConfig
from nalora_jax.optim.curvature_cap import CurvatureCap
from nalora_jax.optim.mechanism import Context, Mechanism, register_mechanism
from nalora_jax.selection import meaningful

_log = logging.getLogger(__name__)


def homogeneity_scale(occupancy: Array, gains: Sequence[float]) -> Array:
    """``gamma_c = sum_k p_ck g_k``, divided by its mean over each layer's channels; all ones where it is all 0.

    Args:
      occupancy: [..., 4, d_ff] shares of tokens per region (inverted, contracting, expanding, linear).
      gains: g_k, which should fall where the region's degree is low: steps that grow there measured worse.

    Returns:
      [..., d_ff] with mean 1 over the last axis.
    """
    chex.assert_axis_dimension(occupancy, -2, len(gains))
    gamma = sum(gain * occupancy[..., region, :] for region, gain in enumerate(gains))
    mean = jnp.mean(gamma, axis=-1, keepdims=True)
    return jnp.where(mean > 0, gamma / jnp.where(mean > 0, mean, 1), 1)


@register_mechanism("homogeneity")
@dataclass(frozen=True)
class HomogeneityStep(Mechanism):
    """`homogeneity_scale`, where the partition is meaningful; elsewhere 1, which is said once in the log."""

    # Gain of the regions inverted, contracting, expanding, linear.
    gains: tuple[float, float, float, float] = (0.5, 0.75, 1.0, 1.0)
    # Share of tokens from which a region counts as occupied.
    min_occupancy: float = 0.02

    statistics: ClassVar[tuple[str, ...]] = ("occupancy",)
    # From 1/2 to 2, eight to a doubling: the default gains are within a factor of 2 of each other.
    bins: ClassVar[tuple[float, ...]] = tuple(2.0 ** (k / 8) for k in range(-8, 9))

    def __post_init__(self) -> None:
        super().__post_init__()
        sound = len(self.gains) == 4 and min(self.gains) >= 0 and max(self.gains) > 0
        self._require("gains", sound, "four gains, none below 0, not all 0")
        self._require("min_occupancy", 0 <= self.min_occupancy < 0.5, "a share in [0, 0.5)")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Mean 1; 1 throughout in layers whose tokens do not occupy two regions of different degree."""
        occupancy = memory["occupancy"]
        if not context.partition.meaningful:
            _say_that_it_is_constant(context.partition.activation)
            return jnp.ones_like(occupancy[..., 0, :])
        varied = meaningful(occupancy, context.partition, self.min_occupancy)
        return jnp.where(varied[..., None], homogeneity_scale(occupancy, self.gains), 1)

    def metrics(self, factor: Array) -> dict[str, Array]:
        """Its range."""
        return {"min": jnp.min(factor, axis=1), "max": jnp.max(factor, axis=1)}


def from_config(config: StepScaleConfig) -> Mechanism | None:
    """The scale that ``--step-scale`` asks for; None if it is off."""
    common: dict[str, Any] = {name: getattr(config, name) for name in ("decay", "warmup", "frozen_after", "permute")}
    match config.kind:
        case "off":
            return None
        case "curvature":
            return CurvatureCap(tau=config.tau, **common)
        case "homogeneity":
            return HomogeneityStep(gains=config.gains, min_occupancy=config.min_occupancy, **common)


@functools.cache
def _say_that_it_is_constant(activation: str) -> None:
    _log.info("step scale: %s has no meaningful effective-homogeneity partition, so the scale is 1", activation)
