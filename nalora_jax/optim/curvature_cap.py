"""Caps the steps of channels in which the adapter has left the linear range around the frozen pre-activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from nalora_jax.optim.mechanism import Context, Mechanism, register_mechanism


def curvature_cap(excess: Array, response: Array, tau: float) -> Array:
    """Returns ``min(1, tau / chi)`` with ``chi = E|X| / E|phi'(z) dz|``, ``X = phi(z + dz) - phi(z) - phi'(z) dz``.

    ``z`` is the frozen pre-activation and ``dz`` the output of the whole accumulated adapter, so the cap is a trust
    region around the base model, not a bound on one update.

    Args:
      excess: E|X|, [..., d_ff], not negative.
      response: E|phi'(z) dz|, [..., d_ff], not negative. A channel with a response of 0 has not moved and is not
        capped: its excess is 0 or rounding noise.
      tau: largest chi of a channel that takes full steps.
    """
    moved = (excess > 0) & (response > 0)
    return jnp.where(moved, jnp.minimum(1.0, tau * response / jnp.where(moved, excess, 1.0)), 1.0)


@register_mechanism("curvature_cap")
@dataclass(frozen=True)
class CurvatureCap(Mechanism):
    """Applies `curvature_cap` to the update of B's columns, without normalization because it shortens steps on purpose.

    Its controls are its permutation over channels (``permute``) and a lower learning rate.
    """

    # Largest chi of a channel that takes full steps.
    tau: float = 0.1

    statistics: ClassVar[tuple[str, ...]] = ("excess", "response")
    reallocates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("tau", self.tau > 0, "a number above 0")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns factors of at most 1."""
        del context
        return curvature_cap(memory["excess"], memory["response"], self.tau)
