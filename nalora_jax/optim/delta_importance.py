"""Importance by the gradient that arrives: E[delta^2], delta = phi'(z) u g the cotangent of the pre-activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from nalora_jax.optim.importance_mask import relative
from nalora_jax.optim.mechanism import Context, Mechanism, register_mechanism


def delta_importance(delta_squared: Array, q: float, limit: float) -> Array:
    """``(D / mean D)^(q / 2)``, ``D = E[delta^2]``, clipped to ``[1 / limit, limit]`` over each layer's channels.

    Args:
      delta_squared: [..., d_ff], not negative.
      q: 0 gives ones (Adam as it is), 1 nearly one second moment for the whole layer (Adam-mini), -1 a preconditioner
        by the output's curvature.
      limit: 1 or more; a channel that no gradient reaches would otherwise get 0, or infinity below q = 0.
    """
    if q == 0:
        return jnp.ones_like(delta_squared)
    # Clipped before the power, so that no power of 0 is taken.
    widest = limit ** (2 / abs(q))
    return jnp.clip(relative(delta_squared), 1 / widest, widest) ** (q / 2)


@register_mechanism("delta")
@dataclass(frozen=True)
class DeltaImportance(Mechanism):
    """`delta_importance` on the update of B's columns; it re-allocates, so its product is normalised."""

    # Exponent on the root mean square of delta.
    q: float = 1.0
    # Clip of the factor, before the normalisation.
    limit: float = 10.0

    statistics: ClassVar[tuple[str, ...]] = ("delta_squared",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("limit", self.limit >= 1, "1 or more")
        self._require("q", -8 <= self.q <= 8, "a number from -8 to 8")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """From ``1 / limit`` to ``limit``."""
        del context
        return delta_importance(memory["delta_squared"], self.q, self.limit)
