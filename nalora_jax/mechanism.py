"""Mechanisms: the base class of the rules, and their registry.

A rule gives every gate channel a factor, a function of running averages of channel statistics
(`nalora_jax.method.statistics`). Its entry names the statistics and the places where the factor acts:

    gradient_a   the gradient of A through the gate (`nalora_jax.method.low_rank`)
    gradient_b   the gradient of B's columns, before the preconditioner
    update_b     the update of B's columns, after the preconditioner and the weight decay

Most rules are one pure function of averages:

    @register_mechanism("flat", statistics=("slope",))
    def flat(averages, context):
        return 1 / (1 + averages["slope"])      # [..., d_ff]

A rule with settings, or with another memory than averages, is a frozen dataclass derived from
`Mechanism`. The paper's rules and the default are in `nalora_jax.method.rules`.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from nalora_jax.errors import NaloraError
from nalora_jax.method import statistics
from nalora_jax.method.activations import Partition
from nalora_jax.registry import Registry

PLACES = ("gradient_a", "gradient_b", "update_b")
Memory = dict[str, Array]
Rule = Callable[[Mapping[str, Array], "Context"], Array]


class Context(NamedTuple):
    """The arguments of a rule besides its averages."""

    step: Array  # optimizer steps done, [] int32
    total_steps: int  # of the run; 0 if unknown
    partition: Partition  # of the gates' activation
    block: str  # path, e.g. "layers/ffn"
    seed: int  # of the run


@dataclass(frozen=True)
class Mechanism:
    """A rule with its settings; see the module's docstring.

    Derive from it and register the class with `register_mechanism`. Fields are settings, written as
    ``--mechanisms name:field=value,field=value`` on the command line.
    """

    # Decay of the averages.
    decay: float = 0.95
    # Optimizer steps before the rule acts.
    warmup: int = 10
    # Measured steps after which the averages stay constant (1: one calibration batch); 0: never.
    frozen_after: int = 0
    # Permutation control: seed of a permutation of the factors over each layer's channels; -1: none.
    permute: int = -1

    # Name in the registry.
    name: ClassVar[str] = ""
    # Name of its memory in checkpoints and of its metrics in logs, for the first rule of a run with
    # this label; other rules have their name in the registry.
    label: ClassVar[str] = ""
    # False for a rule that never reads the run's seed: studies compile it once for all seeds.
    draws: ClassVar[bool] = True
    # Names of its statistics.
    statistics: ClassVar[tuple[str, ...]] = ()
    # Edges of the histogram of its factors in the log; by default from 1/8 to 8, four per doubling.
    bins: ClassVar[tuple[float, ...]] = tuple(2.0 ** (k / 4) for k in range(-12, 13))
    # True for a rule that redistributes steps: the product of such factors at a place is normalized to
    # a root mean square of 1 over each layer's channels. False for one that shortens or stops steps.
    reallocates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._require("decay", 0 <= self.decay < 1, "a number in [0, 1)")
        for name in ("warmup", "frozen_after"):
            self._require(name, 0 <= getattr(self, name) < 2**31, "a whole number in [0, 2147483647]")
        self._require("permute", -1 <= self.permute < 2**32, "a seed in [0, 4294967295], or -1")

    @property
    def places(self) -> tuple[str, ...]:
        """The places where its factor acts, a subset of `PLACES`."""
        return ("update_b",)

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns the factors of a block, [..., d_ff] float32, not negative.

        They are used after the warm-up, for layers with at least one measured token.

        Args:
          memory: the block's averages by statistic, [..., d_ff] or [..., parts, d_ff] (`init`).
          context: see `Context`.
        """
        raise NotImplementedError

    def init(self, channels: tuple[int, ...]) -> Memory:
        """Returns the memory of a block of ``channels`` (..., d_ff) before the first step."""
        shapes = {name: statistics.get(name).shape(channels) for name in self.statistics}
        return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}

    def advance(self, memory: Mapping[str, Array], sums: Mapping[str, Array], updates: Array) -> Memory:
        """Returns the memory after an optimizer step: bias-corrected exponential moving averages.

        Args:
          memory: of one block.
          sums: the block's sums of this step and their counts (``tokens`` [...]).
          updates: [...] int32, measured steps of each layer or expert, this one included.
        """
        return {name: self._average(name, memory[name], sums, updates) for name in memory}

    def metrics(self, factor: Array) -> dict[str, Array]:
        """Returns the log metrics of its factor ``[layers, channels]``, ``[layers]`` each."""
        mean, low, high = (f(factor, axis=1) for f in (jnp.mean, jnp.min, jnp.max))
        return {"mean": mean, "min": low, "max": high}

    def permuted(self, factor: Array, context: Context, order: Array | None = None) -> Array:
        """Returns ``factor`` with channels in ``order``; by default the permutation control's order."""
        if order is None:
            if self.permute < 0:
                return factor
            order = jnp.asarray(self.permutation(factor.shape, context.block, context.seed))
        return jnp.take_along_axis(factor, order, axis=-1)

    def permutation(self, shape: tuple[int, ...], block: str, seed: int) -> np.ndarray:
        """Returns the order of the channels in a run of ``seed``, int32 ``[..., d_ff]``."""
        channels = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
        if self.permute < 0:
            return channels
        rng = np.random.default_rng([self.permute, seed, zlib.crc32(block.encode())])
        return rng.permuted(channels, axis=-1)

    def _average(self, name: str, average: Array, sums: Mapping[str, Array], updates: Array) -> Array:
        """Returns the next average of a statistic; unchanged without a token, and once frozen.

        With n updates the corrected average moves by (1 - decay) / (1 - decay^n) of the difference.
        """
        count, value = sums[statistics.get(name).count], sums[name]
        n = jnp.maximum(updates, 1).astype(jnp.float32)
        library: Any = jnp if isinstance(self.decay, Array) else math  # an array in a sweep
        log_decay = library.log(self.decay) if library is jnp or self.decay > 0 else -math.inf
        rate = library.expm1(log_decay) / jnp.expm1(log_decay * n)
        moves = count > 0
        moves &= (updates <= self.frozen_after) | (self.frozen_after == 0)
        pad = lambda x: x.reshape(x.shape + (1,) * (average.ndim - x.ndim))  # noqa: E731
        rate, count, moves = pad(rate), pad(count), pad(moves)
        mean = value / jnp.where(count > 0, count, 1)
        return jnp.where(moves, average + rate * (mean - average), average)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            where = f"mechanism {self.name}: {name}"
            raise NaloraError(where, expected=expected, found=getattr(self, name))


# ---------------------------------------------------------------- registry

_RULES, _EXPERIMENTAL = "nalora_jax.method.rules", "nalora_jax.experimental_rules"
MECHANISMS: Registry[type[Mechanism]] = Registry(
    "mechanism",
    "nalora_jax.mechanisms",
    "--mechanisms",
    modules=dict.fromkeys(("hard", "soft", "squared", "homogeneity", "curvature_cap"), _RULES)
    | dict.fromkeys(("delta", "freeze", "random", "stochastic", "stochastic_delta"), _EXPERIMENTAL),
)
Registered = TypeVar("Registered", bound=Any)


def register_mechanism(
    name: str,
    *,
    statistics: tuple[str, ...] = (),
    places: tuple[str, ...] = ("update_b",),
    reallocates: bool = True,
    replace: bool = False,
) -> Callable[[Registered], Registered]:
    """Returns a decorator that registers a rule.

    Args:
      name: for ``--mechanisms`` and ``RunConfig.mechanisms``.
      statistics: of a function ``(averages, context) -> factor``; a class derived from `Mechanism` has
        its own, like the next two arguments.
      places: where the factor acts.
      reallocates: True to normalize the factors to a root mean square of 1 over channels.
      replace: True to allow a name that is taken.

    Raises:
      NaloraError: the name is taken or not an identifier.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        expected = "a name of letters, digits and _"
        raise NaloraError("register_mechanism", expected=expected, found=repr(name))

    def register(rule: Registered) -> Registered:
        kind: Any = rule
        if not isinstance(rule, type):
            kind = _from_function(name, rule, statistics, places, reallocates)
        kind.name = name
        MECHANISMS.add(name, kind, replace=replace)
        return rule

    return register


def _from_function(
    name: str, rule: Rule, names: tuple[str, ...], places: tuple[str, ...], reallocates: bool
) -> type[Mechanism]:
    members = {
        "__module__": rule.__module__,
        "__qualname__": rule.__qualname__,
        "__doc__": rule.__doc__,
        "statistics": names,
        "reallocates": reallocates,
        "places": property(lambda self: places),
        "factor": lambda self, memory, context: rule(memory, context),
    }
    return dataclass(frozen=True)(type(name, (Mechanism,), members))
