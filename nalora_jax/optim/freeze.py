"""A gate that rests for the end of a run: selection settles first, what is selected goes on training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from nalora_jax.errors import NaloraError
from nalora_jax.optim.mechanism import Context, Mechanism, register_mechanism


@register_mechanism("freeze")
@dataclass(frozen=True)
class Freeze(Mechanism):
    """1 for the first ``share`` of a run's steps, then 0: on the gradient of A and on the update of B.

    It stops steps on purpose, so it is not normalised. A's gradient is cut; its momentum runs out within some steps.
    """

    # Share of the run's steps in which the gate trains.
    share: float = 0.6

    statistics: ClassVar[tuple[str, ...]] = ("slope",)  # of which only the shape is used
    reallocates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", 0 < self.share <= 1, "a share in (0, 1]")

    @property
    def places(self) -> tuple[str, ...]:
        """Wherever the gate trains."""
        return ("gradient_a", "update_b")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """1 or 0 throughout."""
        if context.total_steps <= 0:
            raise NaloraError(
                "mechanism freeze", expected="total_steps, the length of the run", found=context.total_steps
            )
        rests = context.step >= self.share * context.total_steps
        return jnp.where(rests, 0.0, jnp.ones_like(memory["slope"]))
