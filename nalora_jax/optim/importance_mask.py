"""Mechanism 1: the temporal-importance mask, from the averaged |phi'(z)| of each gate channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from nalora_jax.config import MaskConfig
from nalora_jax.optim.mechanism import Context, Mechanism, register_mechanism


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
    return jnp.clip(relative(importance) ** power, low, high)


def relative(importance: Array) -> Array:
    """``I / mean(I)`` over each layer's channels [..., d_ff]; all ones where I is all 0."""
    mean = jnp.mean(importance, axis=-1, keepdims=True)
    return jnp.where(mean > 0, importance / jnp.where(mean > 0, mean, 1), 1)


@dataclass(frozen=True)
class _Mask(Mechanism):
    """What the masks by slope have in common."""

    # Also act on the gradient of A through the gate's branch.
    mask_gradient: bool = True

    statistics: ClassVar[tuple[str, ...]] = ("slope",)

    @property
    def places(self) -> tuple[str, ...]:
        """On the gradient of A, where asked, and on the update of B's columns."""
        return ("gradient_a", "update_b") if self.mask_gradient else ("update_b",)

    def metrics(self, factor: Array) -> dict[str, Array]:
        """Its mean, and the share of channels that it favours."""
        return {"mean": jnp.mean(factor, axis=1)}


@register_mechanism("hard")
@dataclass(frozen=True)
class HardMask(_Mask):
    """`hard_mask` of the slope: the most responsive channels train, the others rest."""

    # Share of channels kept in each layer.
    keep: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("keep", 0 < self.keep <= 1, "a share in (0, 1]")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """1 or 0."""
        del context
        return hard_mask(memory["slope"], self.keep)


@register_mechanism("soft")
@dataclass(frozen=True)
class SoftMask(_Mask):
    """`soft_mask` of the slope: responsive channels take larger steps."""

    # Exponent on the slope over its layer's mean.
    power: float = 1.0
    # Clip of what comes out, before the normalisation.
    low: float = 0.0
    high: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("power", self.power > 0, "a number above 0")
        self._require("low", 0 <= self.low < 1, "a number in [0, 1)")
        self._require("high", self.high > 1, "a number above 1")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """From ``low`` to ``high``."""
        del context
        return soft_mask(memory["slope"], self.power, self.low, self.high)


@register_mechanism("squared")
@dataclass(frozen=True)
class SquaredMask(SoftMask):
    """`SoftMask` with the exponent 2, the default of ``--mask.kind soft``."""

    power: float = 2.0


def from_config(config: MaskConfig) -> Mechanism | None:
    """The mask that ``--mask`` asks for; None if it is off."""
    common: dict[str, Any] = {
        "decay": config.decay,
        "warmup": config.warmup,
        "frozen_after": config.frozen_after,
        "permute": config.permute,
        "mask_gradient": config.mask_gradient,
    }
    if config.kind == "off":
        return None
    if config.kind == "hard":
        return HardMask(keep=config.keep, **common)
    return SoftMask(power=config.power, low=config.low, high=config.high, **common)
