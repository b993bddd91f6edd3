"""The step scale by homogeneity with two regions, z < 0 and z >= 0.

    nalora train --import studies/two_regions.py --mechanisms two_regions

`nalora_jax.method.rules.HomogeneityStep` has four regions. The earlier activation functions of the paper's
authors (IIEU, CSaN) treat the two sides of 0 differently and have no further cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jax import Array

from nalora_jax.method.rules import Context, Mechanism, register_mechanism


def two_region_scale(occupancy: Array, gains: Sequence[float]) -> Array:
    """Returns ``p g_0 + (1 - p) g_1`` of the share p of tokens with z < 0, ``[..., d_ff]``.

    Args:
      occupancy: [..., 4, d_ff] shares of tokens (inverted, contracting, expanding, linear); the first two are z < 0.
      gains: of both sides of 0.
    """
    negative = occupancy[..., 0, :] + occupancy[..., 1, :]
    return negative * gains[0] + (1 - negative) * gains[1]


@register_mechanism("two_regions")
@dataclass(frozen=True)
class TwoRegions(Mechanism):
    """`two_region_scale` on the update of B's columns, normalized to a root mean square of 1."""

    # Gain for z < 0 and for z >= 0; the first is the least of `homogeneity`.
    gains: tuple[float, float] = (0.5, 1.0)

    statistics: ClassVar[tuple[str, ...]] = ("occupancy",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("gains", len(self.gains) == 2 and min(self.gains) > 0, "two numbers above 0")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns factors between the two gains."""
        return two_region_scale(memory["occupancy"], self.gains)
