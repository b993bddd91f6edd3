"""What a mechanism is, and the registry of all that there are.

A mechanism gives every gate channel a factor, made of averages of channel statistics (`nalora_jax.statistics`). It is
one entry: the statistics that it needs, what it remembers of them, its factor, and the places where the factor acts:

    gradient_a   the gradient of A through the gate's branch (`nalora_jax.nn.low_rank.residual`)
    gradient_b   the gradient of B's columns, before the preconditioner
    update_b     the update of B's columns, after the preconditioner and the weight decay

Nearly every rule is one small pure function of averages:

    @register_mechanism("flat", statistics=("slope",))
    def flat(averages, context):
        return 1 / (1 + averages["slope"])      # [..., d_ff]

One with settings of its own, or with another memory than averages, is a frozen dataclass derived from `Mechanism`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nalora_jax import statistics
from nalora_jax.activations import Partition
from nalora_jax.errors import NaloraError
from nalora_jax.registry import Registry

PLACES = ("gradient_a", "gradient_b", "update_b")
Memory = dict[str, Array]
Rule = Callable[[Mapping[str, Array], "Context"], Array]


class Context(NamedTuple):
    """What a factor may depend on besides its averages."""

    step: Array  # optimizer steps done, [] int32
    total_steps: int  # of the run; 0 where it is not known
    partition: Partition  # of the gates' activation
    block: str  # path, e.g. "layers/ffn"
    seed: int  # of the run


@dataclass(frozen=True)
class Mechanism:
    """A rule that gives every gate channel a factor; see the module's docstring.

    Derive from it, set what differs, and register the class with `register_mechanism`. Fields are settings, typed on
    the command line as ``--mechanisms name:field=value,field=value``.
    """

    # Decay of the averages.
    decay: float = 0.95
    # Optimizer steps before the rule acts.
    warmup: int = 10
    # Measured steps after which the averages stay as they are (1: those of one calibration batch); 0: never.
    frozen_after: int = 0
    # Placebo: seed of a permutation of the factors over each layer's channels, fixed in a run; -1: none.
    permute: int = -1

    # What it is registered under.
    name: ClassVar[str] = ""
    # Names in `nalora_jax.statistics` of what it needs.
    statistics: ClassVar[tuple[str, ...]] = ()
    # Edges of the bins in which the log counts its factors: by default from 1/8 to 8, four to a doubling.
    bins: ClassVar[tuple[float, ...]] = tuple(2.0 ** (k / 4) for k in range(-12, 13))
    # Whether it re-allocates: the product of all such factors at a place is normalised to a root mean square of 1 over
    # each layer's channels. One that is meant to change the size of steps, or to stop them, says False.
    reallocates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._require("decay", 0 <= self.decay < 1, "a number in [0, 1)")
        for name in ("warmup", "frozen_after"):
            self._require(name, getattr(self, name) >= 0, "0 or more")

    @property
    def places(self) -> tuple[str, ...]:
        """Where its factor acts, some of `PLACES`."""
        return ("update_b",)

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """The rule.

        Args:
          memory: one block's, as `init` lays it out: averages of the statistics by name, each
            [..., d_ff] or [..., parts, d_ff].
          context: see `Context`.

        Returns:
          [..., d_ff] float32, not negative. It is used where the warm-up is over and tokens have been measured.
        """
        raise NotImplementedError

    def init(self, channels: tuple[int, ...]) -> Memory:
        """What it remembers of a block of ``channels`` (..., d_ff), before the first step; last axes are d_ff."""
        return {name: jnp.zeros(statistics.get(name).shape(channels), jnp.float32) for name in self.statistics}

    def advance(self, memory: Mapping[str, Array], sums: Mapping[str, Array], updates: Array) -> Memory:
        """What it remembers after one more optimizer step: by default bias-corrected exponential averages.

        Args:
          memory: of one block.
          sums: the block's statistics of this step, and their counts (``tokens`` [...]).
          updates: [...] int32, steps in which a layer or expert was measured, this one included.
        """
        return {name: self._average(name, memory[name], sums, updates) for name in memory}

    def metrics(self, factor: Array) -> dict[str, Array]:
        """What the log shows of its factor ``[layers, channels]``, under its label: ``[layers]`` each."""
        return {"mean": jnp.mean(factor, axis=1), "min": jnp.min(factor, axis=1), "max": jnp.max(factor, axis=1)}

    def key(self, context: Context) -> Array:
        """A random key that depends on the run's seed, the block and the step, and on nothing else."""
        seeded = jax.random.fold_in(jax.random.key(context.seed), zlib.crc32(context.block.encode()) & 0x7FFFFFFF)
        return jax.random.fold_in(seeded, context.step)

    def permuted(self, factor: Array, context: Context) -> Array:
        """``factor`` with each layer's channels in another order, if it is its own placebo."""
        if self.permute < 0:
            return factor
        rng = np.random.default_rng([self.permute, context.seed, zlib.crc32(context.block.encode())])
        order = rng.permuted(np.broadcast_to(np.arange(factor.shape[-1], dtype=np.int32), factor.shape), axis=-1)
        return jnp.take_along_axis(factor, jnp.asarray(order), axis=-1)

    def _average(self, name: str, average: Array, sums: Mapping[str, Array], updates: Array) -> Array:
        """Unchanged where nothing was counted, and once frozen.

        With n updates the corrected average moves by (1 - decay) / (1 - decay^n) of the difference: wholly at n = 1.
        """
        count, value = sums[statistics.get(name).count], sums[name]
        log_decay = math.log(self.decay) if self.decay > 0 else -math.inf
        rate = math.expm1(log_decay) / jnp.expm1(log_decay * jnp.maximum(updates, 1).astype(jnp.float32))
        moves = count > 0
        if self.frozen_after:
            moves &= updates <= self.frozen_after
        rate, count, moves = (x.reshape(x.shape + (1,) * (average.ndim - x.ndim)) for x in (rate, count, moves))
        return jnp.where(moves, average + rate * (value / jnp.where(count > 0, count, 1) - average), average)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise NaloraError(f"mechanism {self.name}: {name}", expected=expected, found=getattr(self, name))


_MECHANISMS: Registry[type[Mechanism]] = Registry("mechanism", "nalora_jax.mechanisms", "--mechanisms")
Registered = TypeVar("Registered", bound=Any)


def register_mechanism(
    name: str,
    *,
    statistics: tuple[str, ...] = (),
    places: tuple[str, ...] = ("update_b",),
    reallocates: bool = True,
    replace: bool = False,
) -> Callable[[Registered], Registered]:
    """A decorator that makes a rule selectable by name.

    Args:
      name: for ``--mechanisms``, ``RunConfig.mechanisms`` and `make`.
      statistics: of a rule that is a function ``(averages, context) -> factor``; a class derived from `Mechanism`
        states them itself, like the next two.
      places: where the factor acts.
      reallocates: whether it is normalised to a root mean square of 1 over channels.
      replace: whether a rule of that name may be replaced.

    Returns:
      A decorator that returns what it got.

    Raises:
      NaloraError: the name is taken, or is no name.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise NaloraError("register_mechanism", expected="a name of letters, digits and _", found=repr(name))

    def register(rule: Registered) -> Registered:
        kind: Any = rule if isinstance(rule, type) else _from_function(name, rule, statistics, places, reallocates)
        kind.name = name
        _MECHANISMS.add(name, kind, replace=replace)
        return rule

    return register


def _from_function(
    name: str, rule: Rule, needed: tuple[str, ...], places: tuple[str, ...], reallocates: bool
) -> type[Mechanism]:
    members = {
        "__module__": rule.__module__,
        "__qualname__": rule.__qualname__,
        "__doc__": rule.__doc__,
        "statistics": needed,
        "reallocates": reallocates,
        "places": property(lambda self: places),
        "factor": lambda self, memory, context: rule(memory, context),
    }
    return dataclass(frozen=True)(type(name, (Mechanism,), members))


def mechanism_names() -> list[str]:
    """Every mechanism that can be asked for."""
    return _MECHANISMS.names()


def make(text: str) -> Mechanism:
    """The mechanism of a text such as ``"soft"`` or ``"soft:power=2,high=3"``.

    Tuples are written with slashes: ``"homogeneity:gains=0.5/0.75/1/1"``.

    Raises:
      NaloraError: an unknown name or setting, or a value of the wrong type or out of range.
    """
    name, _, options = text.partition(":")
    kind = _MECHANISMS.get(name)
    fields = {one.name: one for one in dataclasses.fields(kind)}
    settings: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if key not in fields or not equals:
            raise NaloraError(
                f"--mechanisms {text}",
                expected=f"NAME:setting=value, with a setting of {', '.join(fields)}",
                found=option,
            )
        settings[key] = _typed(text, key, value, fields[key].default)
    return kind(**settings)


def _typed(text: str, key: str, value: str, default: Any) -> Any:
    """``value`` as the type that the setting's default has."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, tuple):
            return tuple(type(default[0])(part) for part in value.split("/"))
        return type(default)(value)
    except (KeyError, ValueError):
        expected = f"{key} of type {type(default).__name__}"
        raise NaloraError(f"--mechanisms {text}", expected=expected, found=repr(value)) from None
