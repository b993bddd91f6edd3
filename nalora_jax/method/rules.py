"""The rules in use: masks by slope, step scales by homogeneity and by curvature.

Each rule is a pure function of averages over tokens, with a `Mechanism` that holds its settings. The
masks and `homogeneity_scale` follow the paper's abstract (arXiv 2606.31717); `curvature_cap` is this
library's default. Rules that no default uses are in `nalora_jax.experimental_rules`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import chex
import jax.numpy as jnp
from jax import Array, lax

from nalora_jax.mechanism import Context, Mechanism, register_mechanism
from nalora_jax.method.activations import Partition

_log = logging.getLogger(__name__)


# ---------------------------------------------------------------- mechanism 1: masks by slope


def relative(importance: Array) -> Array:
    """Returns ``I / mean(I)`` over each layer's channels [..., d_ff]; ones if I is all 0."""
    mean = jnp.mean(importance, axis=-1, keepdims=True)
    return jnp.where(mean > 0, importance / jnp.where(mean > 0, mean, 1), 1)


def hard_mask(importance: Array, keep: float) -> Array:
    """Returns 1 for the ``round(keep * d_ff)`` most important channels of each layer, else 0.

    At least one channel is kept; ties go to the lower index.

    Args:
      importance: [..., d_ff], not negative.
      keep: share of channels, in (0, 1].
    """
    k = max(1, round(keep * importance.shape[-1]))
    threshold = lax.top_k(importance, k)[0][..., -1:]
    above, tied = importance > threshold, importance == threshold
    vacancies = k - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    chosen = tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= vacancies)
    return (above | chosen).astype(importance.dtype)


def soft_mask(importance: Array, power: float, low: float, high: float) -> Array:
    """Returns ``clip((I / mean(I))^power, low, high)`` over each layer's channels [..., d_ff]."""
    return jnp.clip(relative(importance) ** power, low, high)


@dataclass(frozen=True)
class _Mask(Mechanism):
    """The common part of the masks by average |phi'(z)|."""

    # Also weigh the gradient of A through the gate.
    mask_gradient: bool = True

    label: ClassVar[str] = "mask"
    draws: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ("slope",)

    @property
    def places(self) -> tuple[str, ...]:
        """The update of B's columns and, with ``mask_gradient``, the gradient of A."""
        return ("gradient_a", "update_b") if self.mask_gradient else ("update_b",)

    def metrics(self, factor: Array) -> dict[str, Array]:
        """Returns its mean."""
        return {"mean": jnp.mean(factor, axis=1)}


@register_mechanism("hard")
@dataclass(frozen=True)
class HardMask(_Mask):
    """`hard_mask` of the slope: only the most responsive channels train."""

    # Share of channels kept in each layer.
    keep: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("keep", 0 < self.keep <= 1, "a share in (0, 1]")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns 1 or 0."""
        return hard_mask(memory["slope"], self.keep)


@register_mechanism("soft")
@dataclass(frozen=True)
class SoftMask(_Mask):
    """`soft_mask` of the slope: responsive channels take longer steps."""

    # Exponent on the slope over its layer's mean.
    power: float = 1.0
    # Lower clip, before the normalization.
    low: float = 0.0
    # Upper clip, before the normalization.
    high: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("power", 0 < self.power <= 100, "a number in (0, 100]")
        self._require("low", 0 <= self.low < 1, "a number in [0, 1)")
        self._require("high", 1 < self.high <= 1e6, "a number in (1, 1e6]")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns factors from ``low`` to ``high``."""
        return soft_mask(memory["slope"], self.power, self.low, self.high)


@register_mechanism("squared")
@dataclass(frozen=True)
class SquaredMask(SoftMask):
    """`SoftMask` with the exponent 2."""

    power: float = 2.0


# ---------------------------------------------------------------- mechanism 2: step scales


def homogeneity_scale(occupancy: Array, gains: Sequence[float]) -> Array:
    """Returns ``gamma_c = sum_k p_ck g_k`` over its mean in each layer; ones if it is all 0.

    Args:
      occupancy: [..., 4, d_ff] shares of tokens (inverted, contracting, expanding, linear).
      gains: g_k per region; smaller for regions of a low degree.

    Returns:
      [..., d_ff] with mean 1 over the last axis.
    """
    chex.assert_axis_dimension(occupancy, -2, len(gains))
    gamma = sum(gain * occupancy[..., region, :] for region, gain in enumerate(gains))
    return relative(jnp.asarray(gamma))


def degrees_vary(occupancy: Array, partition: Partition, min_occupancy: float) -> Array:
    """Returns True for layers whose tokens occupy regions of at least two different degrees.

    Args:
      occupancy: [..., 4, d_ff] mean occupancies of each channel.
      partition: the activation's.
      min_occupancy: share of (token, channel) pairs at which a region counts as occupied.

    Returns:
      [...] bool; False for an activation with a single degree.
    """
    chex.assert_axis_dimension(occupancy, -2, 4)
    share = jnp.mean(occupancy, axis=-1)
    occupied = (share >= min_occupancy) & (share > 0)
    degrees = jnp.broadcast_to(jnp.asarray(partition.degrees, jnp.float32), occupied.shape)
    highest = jnp.max(jnp.where(occupied, degrees, -jnp.inf), axis=-1)
    lowest = jnp.min(jnp.where(occupied, degrees, jnp.inf), axis=-1)
    return highest > lowest


@register_mechanism("homogeneity")
@dataclass(frozen=True)
class HomogeneityStep(Mechanism):
    """`homogeneity_scale` where the partition has a meaning; 1 elsewhere, with one line in the log."""

    # Gain of the regions inverted, contracting, expanding, linear.
    gains: tuple[float, float, float, float] = (0.5, 0.75, 1.0, 1.0)
    # Share of tokens at which a region counts as occupied.
    min_occupancy: float = 0.02

    label: ClassVar[str] = "step_scale"
    draws: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ("occupancy",)
    # From 1/2 to 2, eight per doubling: the default gains are within a factor of 2.
    bins: ClassVar[tuple[float, ...]] = tuple(2.0 ** (k / 8) for k in range(-8, 9))

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = len(self.gains) == 4 and all(0 <= gain <= 1e6 for gain in self.gains) and any(self.gains)
        self._require("gains", valid, "four numbers in [0, 1e6], not all 0")
        self._require("min_occupancy", 0 <= self.min_occupancy < 0.5, "a share in [0, 0.5)")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns factors of mean 1; 1 in layers whose tokens occupy a single degree."""
        occupancy = memory["occupancy"]
        if not context.partition.meaningful:
            _log_constant_scale(context.partition.activation)
            return jnp.ones_like(occupancy[..., 0, :])
        varied = degrees_vary(occupancy, context.partition, self.min_occupancy)
        return jnp.where(varied[..., None], homogeneity_scale(occupancy, self.gains), 1)

    def metrics(self, factor: Array) -> dict[str, Array]:
        """Returns its range."""
        return {"min": jnp.min(factor, axis=1), "max": jnp.max(factor, axis=1)}


@functools.cache
def _log_constant_scale(activation: str) -> None:
    message = "step scale: %s has no meaningful effective-homogeneity partition, so the scale is 1"
    _log.info(message, activation)


def curvature_cap(excess: Array, response: Array, tau: float) -> Array:
    """Returns ``min(1, tau / chi)`` with ``chi = E|X| / E|phi'(z) dz|``; 1 if dz is 0.

    ``X = phi(z + dz) - phi(z) - phi'(z) dz`` is the nonlinear part of the accumulated adapter's effect
    at the frozen z, so the cap is a trust region around the base model.

    Args:
      excess: E|X|, [..., d_ff], not negative.
      response: E|phi'(z) dz|, the same. A channel with a response of 0 has not moved; its excess is 0
        or rounding noise.
      tau: chi above which steps are shortened.
    """
    responds = (excess > 0) & (response > 0)
    ratio = tau * response / jnp.where(responds, excess, 1.0)
    return jnp.where(responds, jnp.minimum(1.0, ratio), 1.0)


@register_mechanism("curvature_cap")
@dataclass(frozen=True)
class CurvatureCap(Mechanism):
    """`curvature_cap` on the update of B's columns. It shortens steps, so it is not normalized.

    Its controls are its permutation (``permute``) and a lower learning rate.
    """

    # Largest chi with a full step.
    tau: float = 0.1

    label: ClassVar[str] = "step_scale"
    draws: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ("excess", "response")
    reallocates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("tau", 0 < self.tau <= 1e6, "a number in (0, 1e6]")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns factors of at most 1."""
        return curvature_cap(memory["excess"], memory["response"], self.tau)
