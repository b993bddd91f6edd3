"""The rules: factors of a gate's channels, from running averages of channel statistics.

A rule gives every channel of a gate a factor, a function of averages over tokens
(`nalora_jax.method.statistics`). Its entry names the statistics and the places where the factor
acts:

    gradient_a   the gradient of A through the gate (`nalora_jax.method.low_rank`)
    update_b     the update of B's columns, after the preconditioner and the weight decay

Most rules are one pure function of averages:

    @register_mechanism("flat", statistics=("slope",))
    def flat(averages, context):
        return 1 / (1 + averages["slope"])      # [..., d_ff]

A rule with settings, or with another memory than averages, is a frozen dataclass derived from
`Mechanism`. The masks and `homogeneity_scale` follow the paper's abstract (arXiv 2606.31717);
`curvature_cap` is this library's default.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import chex
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nalora_jax.common.registry import Registry, parse_instance
from nalora_jax.errors import NaloraError
from nalora_jax.method import statistics
from nalora_jax.method.activations import Partition

_log = logging.getLogger(__name__)

PLACES = ("gradient_a", "update_b")
Memory = dict[str, Array]
Rule = Callable[[Mapping[str, Array], "Context"], Array]


class Context(NamedTuple):
    """The arguments of a rule besides its averages."""

    step: Array  # optimizer steps done, [] int32
    total_steps: int  # of the run; 0 if unknown
    partition: Partition  # of the gates' activation
    block: str  # path, e.g. "layers/ffn"
    seed: int  # of the run
    # The gate's update of B after the preconditioner, [..., r, d_ff], where "update_b" multiplies
    # it; None where factors are computed before it, for the gradient of A and for the log.
    update: Array | None = None


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
    # Permutation control: seed of a permutation of the factors over each layer's channels, or -1.
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
    # True for a rule that redistributes steps: the product of such factors at a place is normalized
    # to a root mean square of 1 over each layer's channels. False for one that shortens or stops
    # steps.
    reallocates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises a NaloraError if a setting is out of range."""
        self._require("decay", 0 <= self.decay < 1, "a number in [0, 1)")
        self._require(
            "warmup", 0 <= self.warmup < 2**31, "a whole number in [0, 2147483647]"
        )
        self._require(
            "permute", -1 <= self.permute < 2**32, "a seed in [0, 4294967295], or -1"
        )

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
        memory = {}
        for name in self.statistics:
            shape = statistics.get_statistic(name).shape(channels)
            memory[name] = jnp.zeros(shape, jnp.float32)
        return memory

    def advance(
        self, memory: Mapping[str, Array], sums: Mapping[str, Array], updates: Array
    ) -> Memory:
        """Returns the memory after an optimizer step: bias-corrected exponential moving averages.

        Args:
          memory: of one block.
          sums: the block's sums of this step and their counts (``tokens`` [...]).
          updates: [...] int32, measured steps of each layer or expert, this one included.
        """
        return {
            name: self._average(name, memory[name], sums, updates) for name in memory
        }

    def metrics(self, factor: Array) -> dict[str, Array]:
        """Returns the log metrics of its factor ``[layers, channels]``, ``[layers]`` each."""
        return {
            "mean": jnp.mean(factor, axis=1),
            "min": jnp.min(factor, axis=1),
            "max": jnp.max(factor, axis=1),
        }

    def permuted(
        self, factor: Array, context: Context, order: Array | None = None
    ) -> Array:
        """Returns ``factor [..., d_ff]`` with channels in ``order``, int ``[..., d_ff]``.

        By default the order is `permutation`; without a permutation control the factors are
        unchanged.
        """
        if order is None:
            if self.permute < 0:
                return factor
            order = jnp.asarray(
                self.permutation(factor.shape, context.block, context.seed)
            )
        return jnp.take_along_axis(factor, order, axis=-1)

    def permutation(self, shape: tuple[int, ...], block: str, seed: int) -> np.ndarray:
        """Returns the order of the channels in a run of ``seed``, int32 ``[..., d_ff]``: a random
        one for each layer, or the natural one without a permutation control."""
        channels = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
        if self.permute < 0:
            return channels
        rng = np.random.default_rng([self.permute, seed, zlib.crc32(block.encode())])
        return rng.permuted(channels, axis=-1)

    def _average(
        self, name: str, average: Array, sums: Mapping[str, Array], updates: Array
    ) -> Array:
        """Returns the next average of a statistic; a layer without a token keeps its average.

        With n updates the bias-corrected average moves by (1 - decay) / (1 - decay^n) of the
        difference to the mean of this step.
        """
        count = sums[statistics.get_statistic(name).count]
        value = sums[name]
        n = jnp.maximum(updates, 1).astype(jnp.float32)
        library: Any = math
        if isinstance(self.decay, Array):  # in a sweep
            library = jnp
        if library is jnp or self.decay > 0:
            log_decay = library.log(self.decay)
        else:
            log_decay = -math.inf
        rate = library.expm1(log_decay) / jnp.expm1(log_decay * n)
        # [layers] -> [layers, 1, ...], with the rank of the average
        pad = lambda x: x.reshape(x.shape + (1,) * (average.ndim - x.ndim))  # noqa: E731
        rate = pad(rate)
        count = pad(count)
        mean = value / jnp.where(count > 0, count, 1)
        moved = average + rate * (mean - average)
        return jnp.where(count > 0, moved, average)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        """Raises a NaloraError about the setting ``name`` unless its condition ``holds``."""
        if not holds:
            where = f"mechanism {self.name}: {name}"
            raise NaloraError(where, expected=expected, found=getattr(self, name))


# ---------------------------------------------------------------- registry

MECHANISMS: Registry[type[Mechanism]] = Registry(
    "mechanism", "nalora_jax.mechanisms", "--mechanisms"
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
      statistics: of a function ``(averages, context) -> factor``; a class derived from `Mechanism`
        has its own, like the next two arguments.
      places: where the factor acts.
      reallocates: True to normalize the factors to a root mean square of 1 over channels.
      replace: True to allow a name that is taken.

    Raises:
      NaloraError: the name is taken or not an identifier.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise NaloraError(
            "register_mechanism",
            expected="a name of letters, digits and _",
            found=repr(name),
        )

    def register(rule: Registered) -> Registered:
        """Registers a class, or the class of a function, and returns its argument."""
        kind: Any = rule
        if not isinstance(rule, type):
            kind = _from_function(name, rule, statistics, places, reallocates)
        kind.name = name
        MECHANISMS.add(name, kind, replace=replace)
        return rule

    return register


def _from_function(
    name: str,
    rule: Rule,
    names: tuple[str, ...],
    places: tuple[str, ...],
    reallocates: bool,
) -> type[Mechanism]:
    """Returns a class derived from `Mechanism` whose factor is the function ``rule``, with the
    arguments of `register_mechanism`."""
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


def make(rule: str | Mechanism) -> Mechanism:
    """Returns the mechanism of a text such as ``"soft"`` or ``"soft:power=2,high=3"``.

    Raises:
      NaloraError: an unknown name or setting, or a value of the wrong type or out of range.
    """
    if not isinstance(rule, str):
        return rule
    mechanism: Mechanism = parse_instance(MECHANISMS, rule)
    return mechanism


# ---------------------------------------------------------------- mechanism 1: masks by slope


def relative(importance: Array) -> Array:
    """Returns ``I / mean(I)`` over each layer's channels [..., d_ff]; ones if I is all 0."""
    mean = jnp.mean(importance, axis=-1, keepdims=True)
    divisor = jnp.where(mean > 0, mean, 1)
    return jnp.where(mean > 0, importance / divisor, 1)


def hard_mask(importance: Array, keep: float) -> Array:
    """Returns 1 for the ``round(keep * d_ff)`` most important channels of each layer, else 0.

    At least one channel is kept; ties go to the lower index.

    Args:
      importance: [..., d_ff], not negative.
      keep: share of channels, in (0, 1].
    """
    k = max(1, round(keep * importance.shape[-1]))
    largest, _ = lax.top_k(importance, k)
    threshold = largest[..., -1:]
    above = importance > threshold
    tied = importance == threshold
    vacancies = k - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    rank_among_tied = jnp.cumsum(tied, axis=-1, dtype=jnp.int32)
    chosen = tied & (rank_among_tied <= vacancies)
    return (above | chosen).astype(importance.dtype)


def soft_mask(importance: Array, power: float, low: float, high: float) -> Array:
    """Returns ``clip((I / mean(I))^power, low, high)`` over each layer's channels [..., d_ff]."""
    return jnp.clip(relative(importance) ** power, low, high)


@dataclass(frozen=True)
class _Mask(Mechanism):
    """The common part of the masks by average |phi'(z)|."""

    # Also weigh the gradient of A through the gate.
    mask_gradient: bool = True

    label: ClassVar[str] = "mask"
    draws: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ("slope",)

    @property
    def places(self) -> tuple[str, ...]:
        """The update of B's columns and, with ``mask_gradient``, the gradient of A."""
        if self.mask_gradient:
            return ("gradient_a", "update_b")
        return ("update_b",)

    def metrics(self, factor: Array) -> dict[str, Array]:
        """Returns its mean."""
        return {"mean": jnp.mean(factor, axis=1)}


@register_mechanism("hard")
@dataclass(frozen=True)
class HardMask(_Mask):
    """`hard_mask` of the slope: only the most responsive channels train."""

    # Share of channels kept in each layer.
    keep: float = 0.5

    def __post_init__(self) -> None:
        """Raises a NaloraError if a setting is out of range."""
        super().__post_init__()
        self._require("keep", 0 < self.keep <= 1, "a share in (0, 1]")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns 1 or 0."""
        return hard_mask(memory["slope"], self.keep)


@register_mechanism("soft")
@dataclass(frozen=True)
class SoftMask(_Mask):
    """`soft_mask` of the slope: responsive channels take longer steps."""

    # Exponent on the slope over its layer's mean.
    power: float = 1.0
    # Lower clip, before the normalization.
    low: float = 0.0
    # Upper clip, before the normalization.
    high: float = 4.0

    def __post_init__(self) -> None:
        """Raises a NaloraError if a setting is out of range."""
        super().__post_init__()
        self._require("power", 0 < self.power <= 100, "a number in (0, 100]")
        self._require("low", 0 <= self.low < 1, "a number in [0, 1)")
        self._require("high", 1 < self.high <= 1e6, "a number in (1, 1e6]")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns factors from ``low`` to ``high``."""
        return soft_mask(memory["slope"], self.power, self.low, self.high)


@register_mechanism("squared")
@dataclass(frozen=True)
class SquaredMask(SoftMask):
    """`SoftMask` with the exponent 2."""

    power: float = 2.0


# ---------------------------------------------------------------- mechanism 2: step scales


def homogeneity_scale(occupancy: Array, gains: Sequence[float]) -> Array:
    """Returns ``gamma_c = sum_k p_ck g_k`` over its mean in each layer; ones if it is all 0.

    Args:
      occupancy: [..., 4, d_ff] shares of tokens (inverted, contracting, expanding, linear).
      gains: g_k per region; smaller for regions of a low degree.

    Returns:
      [..., d_ff] with mean 1 over the last axis.
    """
    chex.assert_axis_dimension(occupancy, -2, len(gains))
    gamma = sum(gain * occupancy[..., region, :] for region, gain in enumerate(gains))
    return relative(jnp.asarray(gamma))


def degrees_vary(occupancy: Array, partition: Partition, min_occupancy: float) -> Array:
    """Returns True for layers whose tokens occupy regions of at least two different degrees.

    Args:
      occupancy: [..., 4, d_ff] mean occupancies of each channel.
      partition: the activation's.
      min_occupancy: share of (token, channel) pairs at which a region counts as occupied.

    Returns:
      [...] bool; False for an activation with a single degree.
    """
    chex.assert_axis_dimension(occupancy, -2, 4)
    share = jnp.mean(occupancy, axis=-1)
    occupied = (share >= min_occupancy) & (share > 0)
    degrees = jnp.asarray(partition.degrees, jnp.float32)
    degrees = jnp.broadcast_to(degrees, occupied.shape)  # [..., 4]
    highest = jnp.max(jnp.where(occupied, degrees, -jnp.inf), axis=-1)
    lowest = jnp.min(jnp.where(occupied, degrees, jnp.inf), axis=-1)
    return highest > lowest


@register_mechanism("homogeneity")
@dataclass(frozen=True)
class HomogeneityStep(Mechanism):
    """`homogeneity_scale` if the partition has a meaning; otherwise 1, with a line in the log."""

    # Gain of the regions inverted, contracting, expanding, linear.
    gains: tuple[float, float, float, float] = (0.5, 0.75, 1.0, 1.0)
    # Share of tokens at which a region counts as occupied.
    min_occupancy: float = 0.02

    label: ClassVar[str] = "step_scale"
    draws: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ("occupancy",)
    # From 1/2 to 2, eight per doubling: the default gains are within a factor of 2.
    bins: ClassVar[tuple[float, ...]] = tuple(2.0 ** (k / 8) for k in range(-8, 9))

    def __post_init__(self) -> None:
        """Raises a NaloraError if a setting is out of range."""
        super().__post_init__()
        in_range = all(0 <= gain <= 1e6 for gain in self.gains)
        valid = len(self.gains) == 4 and in_range and any(self.gains)
        self._require("gains", valid, "four numbers in [0, 1e6], not all 0")
        self._require(
            "min_occupancy", 0 <= self.min_occupancy < 0.5, "a share in [0, 0.5)"
        )

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns factors of mean 1; 1 in layers whose tokens occupy a single degree."""
        occupancy = memory["occupancy"]
        if not context.partition.meaningful:
            _log_constant_scale(context.partition.activation)
            return jnp.ones_like(occupancy[..., 0, :])
        varied = degrees_vary(occupancy, context.partition, self.min_occupancy)
        return jnp.where(varied[..., None], homogeneity_scale(occupancy, self.gains), 1)

    def metrics(self, factor: Array) -> dict[str, Array]:
        """Returns its range."""
        return {"min": jnp.min(factor, axis=1), "max": jnp.max(factor, axis=1)}


@functools.cache
def _log_constant_scale(activation: str) -> None:
    """Logs, once for each activation, that its step scale is 1."""
    message = "step scale: %s has no meaningful effective-homogeneity partition, so the scale is 1"
    _log.info(message, activation)


def curvature_cap(excess: Array, response: Array, tau: float) -> Array:
    """Returns ``min(1, tau / chi)`` with ``chi = E|X| / E|phi'(z) dz|``; 1 if dz is 0.

    ``X = phi(z + dz) - phi(z) - phi'(z) dz`` is the nonlinear part of the accumulated adapter's
    effect at the frozen z, so the cap is a trust region around the base model.

    Args:
      excess: E|X|, [..., d_ff], not negative.
      response: E|phi'(z) dz|, the same. A channel with a response of 0 has not moved; its excess is
        0 or rounding noise.
      tau: chi above which steps are shortened.
    """
    responds = (excess > 0) & (response > 0)
    ratio = tau * response / jnp.where(responds, excess, 1.0)
    return jnp.where(responds, jnp.minimum(1.0, ratio), 1.0)


@register_mechanism("curvature_cap")
@dataclass(frozen=True)
class CurvatureCap(Mechanism):
    """`curvature_cap` on the update of B's columns. It shortens steps, so it is not normalized.

    Its controls are its permutation (``permute``) and a lower learning rate.
    """

    # Largest chi with a full step.
    tau: float = 0.1

    label: ClassVar[str] = "step_scale"
    draws: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ("excess", "response")
    reallocates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raises a NaloraError if a setting is out of range."""
        super().__post_init__()
        self._require("tau", 0 < self.tau <= 1e6, "a number in (0, 1e6]")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns factors of at most 1."""
        return curvature_cap(memory["excess"], memory["response"], self.tau)


# ---------------------------------------------------------------- importance by cotangent


def delta_importance(delta_squared: Array, q: float, limit: float) -> Array:
    """Returns ``(D / mean D)^(q / 2)``, ``D = E[delta^2]``, clipped to ``[1 / limit, limit]``.

    delta = phi'(z) u g is the cotangent of the pre-activation; means are over a layer's channels.

    Args:
      delta_squared: [..., d_ff], not negative.
      q: 0 gives ones (plain Adam), 1 nearly one second moment for a layer (Adam-mini), -1 a
        preconditioner by the output's curvature.
      limit: 1 or more; bounds the factor of a channel without gradient.
    """
    if q == 0:
        return jnp.ones_like(delta_squared)
    # Clipped before the power, so that 0 is never raised to a negative power.
    widest = limit ** (2 / abs(q))
    return jnp.clip(relative(delta_squared), 1 / widest, widest) ** (q / 2)


@register_mechanism("delta")
@dataclass(frozen=True)
class DeltaImportance(Mechanism):
    """`delta_importance` on the update of B's columns."""

    # Exponent on the root mean square of delta.
    q: float = 1.0
    # Clip of the factor, before the normalization.
    limit: float = 10.0

    statistics: ClassVar[tuple[str, ...]] = ("delta_squared",)

    def __post_init__(self) -> None:
        """Raises a NaloraError if a setting is out of range."""
        super().__post_init__()
        self._require("limit", self.limit >= 1, "1 or more")
        self._require("q", -8 <= self.q <= 8, "a number from -8 to 8")

    def factor(self, memory: Mapping[str, Array], context: Context) -> Array:
        """Returns factors from ``1 / limit`` to ``limit``."""
        return delta_importance(memory["delta_squared"], self.q, self.limit)
