"""The table of channel statistics: what a gated block can measure, and how each entry is made, summed and averaged.

A statistic is a function per token and channel, summed over real tokens with their weights, in float32, and cut off
from differentiation. Gate state, sharding, the log and the report are derived from its entry. There are three sources:

    gate        the full pre-activation z of a sample of positions
    probe       the frozen pre-activation and what the adapter adds to it, on a thinner sample
    cotangent   delta, the cotangent of z: the backward pass, not the forward one, on the gate's sample

The sums leave the block in the collection ``gate_stats``, those of cotangents as the "gradient" of zeros that the
collection ``gate_taps`` brings in (`tap`). Every statistic has the count that turns its sum into a mean: ``tokens`` or
``probe_tokens``, sums of the weights of the positions taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax

from nalora_jax.activations import Activation, Partition
from nalora_jax.registry import Registry

Sums = dict[str, Array]


class Gate(NamedTuple):
    """What a statistic of the source "gate" is a function of; arrays are float32 ``[..., tokens, d_ff]``."""

    z: Array
    rho: Array
    drho: Array  # rho'(z)
    partition: Partition


class Move(NamedTuple):
    """What a statistic of the source "probe" is a function of; float32 ``[..., tokens, d_ff]``."""

    z: Array  # of the frozen gate
    dz: Array  # what the adapter adds
    rho: Array
    drho: Array
    moved_rho: Array  # rho(z + dz)

    @property
    def selection(self) -> Array:
        """The selection term S."""
        return (self.moved_rho - self.rho) * (self.z + self.dz)


@dataclass(frozen=True)
class Statistic:
    """One entry of the table."""

    name: str
    source: Literal["gate", "probe", "cotangent"]
    # Of a `Gate`, a `Move`, or delta: per token and channel; a tuple of such arrays makes an axis of its parts.
    values: Callable[[Any], Array | tuple[Array, ...]]
    # Number of parts, 0 for none: a sum is [d_ff], or [parts, d_ff].
    parts: int = 0
    # Whether the parts of every token add up to 1, so that the last one's sum is what the others leave of the count.
    complete: bool = False
    # cotangent: the power of delta, by which the sum scales with the loss.
    degree: float = 0
    # Name under which the log shows its mean over a layer's tokens and channels; "": it does not.
    metric: str = ""

    @property
    def count(self) -> str:
        """The count that its sum is divided by."""
        return "probe_tokens" if self.source == "probe" else "tokens"

    def shape(self, channels: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of its sum in a block of ``channels`` ``(..., d_ff)``."""
        return (*channels[:-1], self.parts, channels[-1]) if self.parts else channels


_TABLE: Registry[Statistic] = Registry("statistic", "nalora_jax.statistics")


def register_statistic(statistic: Statistic, *, replace: bool = False) -> Statistic:
    """Add an entry to the table, and return it."""
    return _TABLE.add(statistic.name, statistic, replace=replace)


def get(name: str) -> Statistic:
    """The entry of that name.

    Raises:
      NaloraError: there is none; the message lists those that there are.
    """
    return _TABLE.get(name)


def _occupied(gate: Gate) -> tuple[Array, ...]:
    below = [gate.z < cut for cut in (gate.partition.z0, 0.0, gate.partition.z1)]
    # NaN is below nothing, and so counts as linear.
    regions = (below[0], below[1] & ~below[0], below[2] & ~below[1], ~below[2])
    return tuple(region.astype(jnp.float32) for region in regions)


SLOPE = Statistic("slope", "gate", lambda g: jnp.abs(g.rho + g.z * g.drho), metric="importance")
OCCUPANCY = Statistic("occupancy", "gate", _occupied, parts=4, complete=True, metric="occupancy")
FEATURE = Statistic("feature", "probe", lambda m: jnp.abs(m.rho * m.dz), metric="feature")
SELECTION = Statistic("selection", "probe", lambda m: jnp.abs(m.selection))
LINEAR = Statistic("linear", "probe", lambda m: jnp.abs(m.z * m.drho * m.dz))
# X = phi(z + dz) - phi(z) - phi'(z) dz, what the gradient does not see, and the response that it does see.
EXCESS = Statistic("excess", "probe", lambda m: jnp.abs(m.selection - m.z * m.drho * m.dz))
RESPONSE = Statistic("response", "probe", lambda m: jnp.abs((m.rho + m.z * m.drho) * m.dz))
DELTA = Statistic("delta", "cotangent", jnp.abs, degree=1, metric="delta")
DELTA_SQUARED = Statistic("delta_squared", "cotangent", jnp.square, degree=2)

for _entry in (SLOPE, OCCUPANCY, FEATURE, SELECTION, LINEAR, EXCESS, RESPONSE, DELTA, DELTA_SQUARED):
    register_statistic(_entry)

# What every block measures, whatever the mechanisms: the log and the report need it, and kernels make it.
STANDARD = ("slope", "occupancy", "feature", "selection", "linear")
COUNTS = ("tokens", "probe_tokens")
# Ratios of a layer's sums that the log shows where both are measured: name -> (numerator, denominator).
RATIOS = {
    "misalignment": ("selection", "feature"),
    "limit": ("linear", "feature"),
    "nonlinearity": ("excess", "response"),
}
# What `nalora_jax.ops.checks` writes: largest ratios, not sums, over layers' tokens and micro-batches.
CHECK = "check_"


def forward(names: Iterable[str]) -> tuple[str, ...]:
    """Those of ``names`` that the forward pass makes."""
    return tuple(name for name in names if get(name).source != "cotangent")


def cotangent(names: Iterable[str]) -> tuple[str, ...]:
    """Those of ``names`` that the backward pass makes."""
    return tuple(name for name in names if get(name).source == "cotangent")


def extra(names: Iterable[str]) -> tuple[str, ...]:
    """Forward statistics among ``names`` beyond `STANDARD`, each once, sorted."""
    return tuple(sorted(set(forward(names)) - set(STANDARD)))


# ---------------------------------------------------------------- sums over tokens


def channel_statistics(
    z: Array, weights: Array, activation: Activation, partition: Partition, names: Iterable[str] = ()
) -> Sums:
    """Sums of the standard statistics of the gate, and of those among ``names``.

    Args:
      z: [..., tokens, d_ff] full gate pre-activations, adapter included.
      weights: [..., tokens] token weights, 0 for padding; or a bool mask.
      activation: the gate's.
      partition: its regions.
      names: further statistics; those of other sources are passed over.

    Returns:
      ``tokens`` [] and the sums, [d_ff] or [parts, d_ff] each.
    """
    z = _float32(z, weights)
    seen = Gate(z, *activation.gate(z), partition)
    return {"tokens": _tokens(weights)} | _sums("gate", seen, weights, names)


def probe_statistics(
    z_base: Array, dz: Array, weights: Array, activation: Activation, names: Iterable[str] = ()
) -> Sums:
    """Sums of the standard statistics of the adapter's movement, and of those among ``names``.

    Args:
      z_base: [..., tokens, d_ff] pre-activations without the adapter.
      dz: [..., tokens, d_ff] what the adapter adds.
      weights: as in `channel_statistics`.
      activation: as there.
      names: as there.

    Returns:
      ``probe_tokens`` [] and the sums, [d_ff] each.
    """
    chex.assert_equal_shape([z_base, dz])
    z, dz = _float32(z_base, weights), _float32(dz, weights)
    seen = Move(z, dz, *activation.gate(z), activation.gate(z + dz)[0])
    return {"probe_tokens": _tokens(weights)} | _sums("probe", seen, weights, names)


def cotangent_statistics(delta: Array, weights: Array, names: Iterable[str]) -> Sums:
    """Sums of the cotangent statistics among ``names``, [d_ff] each.

    Args:
      delta: [..., tokens, d_ff], the cotangent of z: in units of the loss that is differentiated per unit of z.
      weights: [..., tokens].
      names: statistics; those of other sources are passed over.
    """
    delta = _float32(delta, weights)
    return _sums("cotangent", delta, weights, names)


def _sums(source: str, seen: Any, weights: Array, names: Iterable[str]) -> Sums:
    wanted = [get(name) for name in dict.fromkeys((*STANDARD, *names))]
    return {entry.name: _summed(entry.values(seen), weights) for entry in wanted if entry.source == source}


def _summed(values: Array | tuple[Array, ...], weights: Array) -> Array:
    if isinstance(values, tuple):
        return jnp.stack([total(part, weights) for part in values])
    return total(values, weights)


def _float32(z: Array, weights: Array) -> Array:
    """z in float32, cut off from differentiation, its shape checked against that of its token weights."""
    chex.assert_shape(weights, z.shape[:-1])
    assert z.ndim >= 2, z.shape
    return lax.stop_gradient(z).astype(jnp.float32)


def _tokens(weights: Array) -> Array:
    return jnp.sum(lax.stop_gradient(weights).astype(jnp.float32))


def total(values: Array, weights: Array) -> Array:
    """Weighted sum over tokens: [..., tokens, d_ff] -> [d_ff] float32."""
    # As a product, because XLA's CPU reductions of several weighted sums at once are up to ten times slower, and
    # because a mask spread over the channels would be made once for all layers and read by each.
    weights = lax.stop_gradient(weights).astype(jnp.float32).reshape(1, -1)
    values = values.reshape(weights.shape[1], -1)
    return lax.dot_general(weights, values, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)[0]


# ---------------------------------------------------------------- cotangents


def taps(names: Iterable[str], channels: tuple[int, ...]) -> Sums:
    """Zeros whose "gradient" becomes the cotangent statistics among ``names``, of a block of ``channels``.

    Example:
      >>> {name: zeros.shape for name, zeros in taps(("slope", "delta_squared"), (30, 1536)).items()}
      {'delta_squared': (30, 1536)}
    """
    return {name: jnp.zeros(get(name).shape(channels), jnp.float32) for name in cotangent(names)}


def tap(z: Array, sinks: Mapping[str, Array], weights: Any, sums: Callable[[Array, Any, Iterable[str]], Sums]) -> Array:
    """``z`` itself, whose backward pass hands the statistics of its cotangent to ``sinks`` as their gradient.

    The value and the gradient of z are untouched. The zeros in ``sinks`` ride through whatever the model does to its
    variables (scan, remat, vmap), so that statistics of the backward pass need no other way out.

    Args:
      z: any shape.
      sinks: zeros by statistic, shaped as what ``sums`` returns (`taps`).
      weights: token weights, in the form that ``sums`` takes them.
      sums: ``(cotangent of z, weights, names) -> sums by name``, such as `cotangent_statistics`.
    """
    return _tap(z, dict(sinks), weights, sums)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tap(z: Array, sinks: Sums, weights: Any, sums: Callable[..., Sums]) -> Array:
    del sinks, weights, sums
    return z


def _tap_fwd(z: Array, sinks: Sums, weights: Any, sums: Callable[..., Sums]) -> tuple[Array, Any]:
    del sums
    return z, (dict.fromkeys(sinks), weights)


def _tap_bwd(sums: Callable[..., Sums], kept: Any, g: Array) -> tuple[Any, ...]:
    names, weights = kept
    return g, sums(g, weights, tuple(names)), None


_tap.defvjp(_tap_fwd, _tap_bwd)


# ---------------------------------------------------------------- what becomes of sums


def merged(path: str, one: Array, other: Array) -> Array:
    """Two parts' values of the leaf at ``path``: sums are added, of checks the larger counts."""
    return jnp.maximum(one, other) if path.rpartition("/")[2].startswith(CHECK) else one + other


def over_shards(sums: Mapping[str, Array], names: Iterable[str]) -> Sums:
    """Of one block's sums by shard, those among ``names`` and the counts, summed over the shards.

    Nothing else travels between devices. Of parts that are `Statistic.complete` the last does not either.

    Args:
      sums: ``[layers, shards, ..., d_ff]``, ``[layers, shards, ..., parts, d_ff]``, counts ``[layers, shards, ...]``.
      names: statistics.

    Returns:
      The same without the axis ``[shards]``.
    """
    found = {name: jnp.sum(sums[name], axis=1) for name in COUNTS if name in sums}
    for name in names:
        entry, value = get(name), sums[name]
        if not entry.complete:
            found[name] = jnp.sum(value, axis=1)
            continue
        others = jnp.sum(value[..., :-1, :], axis=1)
        rest = found[entry.count][..., None] - jnp.sum(others, axis=-2)
        found[name] = jnp.concatenate([others, jnp.maximum(rest, 0.0)[..., None, :]], axis=-2)
    return found


def per_target(sums: Mapping[str, Array], target_tokens: Array) -> Sums:
    """Sums of one block in which delta is that of the *mean* loss per target token.

    The loss that is differentiated is a sum over target tokens, so that micro-batches and devices add up. Afterwards
    delta is in nats per unit of z, of the loss divided by the step's target tokens: a power k of it is divided by their
    number to the power of k.
    """
    scale = jnp.maximum(target_tokens, 1.0)
    return {name: value / scale ** _degree(name) if _degree(name) else value for name, value in sums.items()}


def _degree(name: str) -> float:
    return get(name).degree if name in _TABLE else 0


def mean(name: str, sums: Mapping[str, Array]) -> Array:
    """The expectation of ``name`` over tokens per channel, from one block's sums; NaN where no token was counted.

    Leading axes (layers, experts) are those of the count: [L] with ``slope`` [L, d_ff], ``occupancy`` [L, 4, d_ff].
    """
    value, count = sums[name], sums[get(name).count]
    count = count.reshape(count.shape + (1,) * (value.ndim - count.ndim))
    return jnp.where(count > 0, value / jnp.where(count > 0, count, 1), jnp.nan)


def layer_means(sums: Mapping[str, Array]) -> Sums:
    """What the log shows of one block's statistics: means over a layer's tokens, channels and experts, and `RATIOS`.

    Args:
      sums: ``[layers, ..., d_ff]``, ``[layers, ..., parts, d_ff]`` and counts ``[layers, ...]``; axes between may be
        those of experts and of shards.

    Returns:
      By metric: ``[layers]``, or ``[layers, parts]``. NaN in a layer of which no token was measured, which is not 0;
      a ratio is 0 where tokens were measured and nothing moved.
    """
    found: Sums = {}
    for name in (name for name in sums if name in _TABLE and get(name).metric):
        entry, value = get(name), sums[name]
        count = _layer_total(sums[entry.count]) * value.shape[-1]
        if entry.parts:
            value = jnp.sum(value, axis=(*range(1, value.ndim - 2), value.ndim - 1))  # [layers, parts]
            found[entry.metric] = _known(value, count[:, None])
        else:
            found[entry.metric] = _known(_layer_total(value), count)
    for ratio, (above, below) in RATIOS.items():
        if above in sums and below in sums:
            bottom, count = _layer_total(sums[below]), _layer_total(sums[get(below).count])
            value = _layer_total(sums[above]) / jnp.where(bottom > 0, bottom, 1.0)
            found[ratio] = jnp.where(count > 0, jnp.where(bottom > 0, value, 0.0), jnp.nan)
    return found


def _layer_total(x: Array) -> Array:
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))  # not reshaped: axes may be split over devices


def _known(total: Array, count: Array) -> Array:
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), jnp.nan)
