"""A cap on the steps of channels whose response is no longer linear: what the gradient does not see grows there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from nalora_jax.optim.mechanism import Context, Mechanism, register_mechanism


def curvature_cap(excess: Array, response: Array, tau: float) -> Array:
    """``min(1, tau / chi)`` with ``chi = E|X| / E|phi'(z) dz|``, ``X = phi(z + dz) - phi(z) - phi'(z) dz``.

    Args:
      excess: E|X|, [..., d_ff], not negative.
      response: E|phi'(z) dz|, likewise; a channel that has not moved is not capped.
      tau: share of the response that the unseen part may have.
    """
    return jnp.where(excess > 0, jnp.minimum(1.0, tau * response / jnp.where(excess > 0, excess, 1.0)), 1.0)


@register_mechanism("curvature_cap")
@dataclass(frozen=True)
class CurvatureCap(Mechanism):
    """`curvature_cap` on the update of B's columns. It shortens steps on purpose, so it is not normalised.

    Its controls are its own permutation (``permute``), and a lower learning rate.
    """

    # Largest chi that leaves a step as it is.
    tau: float = 0.1

    statistics: ClassVar[tuple[str, ...]] = ("excess", "response")
    reallocates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("tau", self.tau > 0, "a number above 0")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """At most 1."""
        del context
        return curvature_cap(memory["excess"], memory["response"], self.tau)
