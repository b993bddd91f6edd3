"""Masks drawn anew at every step: a column trains with a probability, and then with a step that makes up for it.

The mean over draws is 1, so that no channel's expected step changes; the root mean square is ``1 / sqrt(p)``, as with
dropout. Normalising that away would shrink every expected step, so these masks are not normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from nalora_jax.optim.importance_mask import relative
from nalora_jax.optim.mechanism import Context, Mechanism, register_mechanism

_LEAST = 0.05  # probability: a rarer channel's steps would be more than 20 times as long


def keep_probability(importance: Array, keep: float, power: float) -> Array:
    """``keep (I / mean I)^power``, within 0.05 and 1, over each layer's channels [..., d_ff]."""
    return jnp.clip(keep * jnp.maximum(relative(importance), 1e-12) ** power, _LEAST, 1.0)


@dataclass(frozen=True)
class _Drawn(Mechanism):
    """Bernoulli draws over their probability."""

    # Share of channels that train in a step.
    keep: float = 0.5

    reallocates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("keep", _LEAST <= self.keep <= 1, f"a share in [{_LEAST}, 1]")

    def drawn(self, probability: Array, context: Context) -> Array:
        """0, or 1 over the probability."""
        return jnp.where(jax.random.uniform(self.key(context), probability.shape) < probability, 1 / probability, 0.0)


@register_mechanism("random")
@dataclass(frozen=True)
class RandomMask(_Drawn):
    """The same probability for every channel: the control of `StochasticMask`, and a regulariser of its own."""

    statistics: ClassVar[tuple[str, ...]] = ("slope",)  # of which only the shape is used

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """0 or ``1 / keep``."""
        return self.drawn(jnp.full_like(memory["slope"], self.keep), context)


@register_mechanism("stochastic")
@dataclass(frozen=True)
class StochasticMask(_Drawn):
    """`keep_probability` of the slope."""

    # Exponent on the importance over its layer's mean.
    power: float = 1.0

    statistics: ClassVar[tuple[str, ...]] = ("slope",)

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """0, or 1 over the probability."""
        (importance,) = (memory[name] for name in self.statistics)
        return self.drawn(keep_probability(importance, self.keep, self.power), context)


@register_mechanism("stochastic_delta")
@dataclass(frozen=True)
class StochasticDeltaMask(StochasticMask):
    """`keep_probability` of E[delta^2], the gradient that arrives (`nalora_jax.optim.delta_importance`)."""

    power: float = 0.5

    statistics: ClassVar[tuple[str, ...]] = ("delta_squared",)
