"""A mask by the slope of the selection weight, |rho'(z)|, for the studies of readings.

The gate is phi(z) = z rho(z). `nalora_jax.method.rules.SoftMask` weighs channels by |phi'(z)|; a
"derivative-based" mask can also mean the derivative of rho, which is 0 where the gate is linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from nalora_jax.method.rules import Context, SoftMask, register_mechanism, soft_mask
from nalora_jax.method.statistics import Statistic, register_statistic

register_statistic(Statistic("selection_slope", "gate", lambda gate: jnp.abs(gate.drho)))


@register_mechanism("selection")
@dataclass(frozen=True)
class SelectionMask(SoftMask):
    """`soft_mask` of E|rho'(z)|, on the update of B and the gradient of A."""

    statistics: ClassVar[tuple[str, ...]] = ("selection_slope",)

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns factors from ``low`` to ``high``."""
        return soft_mask(memory["selection_slope"], self.power, self.low, self.high)
