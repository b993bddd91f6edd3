"""Rules that no study has tested: random and stochastic masks, and a gate that stops training.

    nalora train --import studies/stochastic_masks.py --mechanisms stochastic

Stochastic masks are drawn anew at every step: a column trains with a probability p, with a step of
1/p. The mean over draws is 1, so no channel's expected step changes; the root mean square is
``1 / sqrt(p)``, as with dropout. These masks are not normalized, because that would shorten every
expected step.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from nalora_jax.errors import NaloraError
from nalora_jax.method.rules import Context, Mechanism, register_mechanism, relative

_LEAST = 0.05  # lowest probability: rarer channels would take steps over 20 times as long


@register_mechanism("freeze")
@dataclass(frozen=True)
class Freeze(Mechanism):
    """1 for the first ``share`` of a run's steps, then 0, on the gradient of A and the update of B.

    It stops steps, so it is not normalized. A's gradient is cut; its momentum
    ends within some steps.
    """

    # Share of the run's steps in which the gate trains.
    share: float = 0.6

    statistics: ClassVar[tuple[str, ...]] = ("slope",)  # only its shape is used
    reallocates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("share", 0 < self.share <= 1, "a share in (0, 1]")

    @property
    def places(self) -> tuple[str, ...]:
        """The gradient of A and the update of B."""
        return ("gradient_a", "update_b")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns 1 or 0 for all channels."""
        if context.total_steps <= 0:
            expected = "total_steps, the length of the run"
            raise NaloraError("mechanism freeze", expected=expected, found=context.total_steps)
        rests = context.step >= self.share * context.total_steps
        return jnp.where(rests, 0.0, jnp.ones_like(memory["slope"]))


def keep_probability(importance: Array, keep: float, power: float) -> Array:
    """Returns ``keep (I / mean I)^power`` over each layer's channels [..., d_ff], in [0.05, 1]."""
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
        """Returns 0, or 1 over the probability; the draw depends on run seed, block and step."""
        block = zlib.crc32(context.block.encode()) & 0x7FFFFFFF
        key = jax.random.fold_in(jax.random.key(context.seed), block)
        draw = jax.random.uniform(jax.random.fold_in(key, context.step), probability.shape)
        return jnp.where(draw < probability, 1 / probability, 0.0)


@register_mechanism("random")
@dataclass(frozen=True)
class RandomMask(_Drawn):
    """The same probability for every channel; the control of `StochasticMask`."""

    statistics: ClassVar[tuple[str, ...]] = ("slope",)  # only its shape is used

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns 0 or ``1 / keep``."""
        return self.drawn(jnp.full_like(memory["slope"], self.keep), context)


@register_mechanism("stochastic")
@dataclass(frozen=True)
class StochasticMask(_Drawn):
    """`keep_probability` of the slope."""

    # Exponent on the importance over its layer's mean.
    power: float = 1.0

    statistics: ClassVar[tuple[str, ...]] = ("slope",)

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns 0, or 1 over the probability."""
        (importance,) = (memory[name] for name in self.statistics)
        return self.drawn(keep_probability(importance, self.keep, self.power), context)


@register_mechanism("stochastic_delta")
@dataclass(frozen=True)
class StochasticDeltaMask(StochasticMask):
    """`keep_probability` of E[delta^2]."""

    power: float = 0.5

    statistics: ClassVar[tuple[str, ...]] = ("delta_squared",)
