"""The gate-compensation identity and the table of channel statistics.

    phi(z + dz) - phi(z) = F + S,   F = rho(z) dz,   S = (rho(z + dz) - rho(z)) (z + dz)

z is the pre-activation of the frozen gate and dz the adapter's output. A low-rank update
promises the feature term F; it also changes the selection weight, which gives S.
Misalignment is E|S| / E|F|.

A statistic is a function of a token and a channel, summed over real tokens with their weights in
float32, without gradients. Its entry in the table determines gate state, sharding, log and report:

    gate        a function of the full pre-activation z, on a sample of positions
    probe       a function of z and dz, on a thinner sample
    cotangent   a function of delta, the cotangent of z, on the gate's sample

Sums leave a model as the gradients of zeros, its taps (`observe`). The zeros pass through every
transformation of parameters (scan, remat, vmap, shards), and micro-batches and devices add
gradients up. Flax's float8 matmuls return their scales in the same way
(``_overwrite_with_gradient``). Two counts turn sums into means: ``tokens`` and ``probe_tokens``,
the summed weights of the sampled positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from nalora_jax.common.registry import Registry
from nalora_jax.errors import NaloraError
from nalora_jax.method import activations
from nalora_jax.method.activations import Activation, Partition, regions
from nalora_jax.ops.storage import SUMS

StatisticSums = dict[str, Array]


def gate_decomposition(
    z: Array, dz: Array, activation: Activation
) -> tuple[Array, Array]:
    """Returns the feature and the selection term: ``F + S = phi(z + dz) - phi(z)`` up to rounding.

    Args:
      z: pre-activations of the frozen gate, any shape.
      dz: the adapter's output, same shape.
      activation: phi.
    """
    chex.assert_equal_shape([z, dz])
    rho = activation.rho(z)
    feature = rho * dz
    selection = (activation.rho(z + dz) - rho) * (z + dz)
    return feature, selection


# ---------------------------------------------------------------- the table


class Gate(NamedTuple):
    """Arguments of a "gate" statistic; arrays are float32 ``[..., tokens, d_ff]``."""

    z: Array
    rho: Array
    drho: Array  # rho'(z)
    partition: Partition


class Move(NamedTuple):
    """Arguments of a "probe" statistic; float32 ``[..., tokens, d_ff]``."""

    z: Array  # of the frozen gate
    dz: Array  # the adapter's output
    rho: Array
    drho: Array
    moved_rho: Array  # rho(z + dz)

    @property
    def selection(self) -> Array:
        """The selection term S."""
        return (self.moved_rho - self.rho) * (self.z + self.dz)


@dataclass(frozen=True)
class Statistic:
    """An entry of the table."""

    name: str
    source: Literal["gate", "probe", "cotangent"]
    # Function of a `Gate`, a `Move` or delta, per token and channel; a tuple has an axis of parts.
    values: Callable[[Any], Array | tuple[Array, ...]]
    parts: int = 0  # number of parts: a sum is [parts, d_ff], or [d_ff] for 0
    # the parts of a token add up to 1: the last sum follows from the others
    complete: bool = False
    # of a cotangent: the power of delta, by which the sum scales with the loss
    degree: float = 0
    # name of its mean over tokens and channels in the log; "" leaves it out
    metric: str = ""

    @property
    def count(self) -> str:
        """Name of the count that divides its sum."""
        if self.source == "probe":
            return "probe_tokens"
        return "tokens"

    def shape(self, channels: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of its sum in a block of ``channels`` ``(..., d_ff)``."""
        if self.parts:
            return (*channels[:-1], self.parts, channels[-1])
        return channels


TABLE: Registry[Statistic] = Registry("statistic", "nalora_jax.statistics")


def register_statistic(statistic: Statistic, *, replace: bool = False) -> Statistic:
    """Adds an entry to the table and returns it."""
    return TABLE.add(statistic.name, statistic, replace=replace)


def get_statistic(name: str) -> Statistic:
    """Returns the entry with that name.

    Raises:
      NaloraError: the name is unknown; the message lists the known names.
    """
    return TABLE.get(name)


def _occupied(gate: Gate) -> tuple[Array, ...]:
    """Returns 1 for tokens in a region and 0 for others, for each of the four regions."""
    masks = regions(gate.z, gate.partition)
    return tuple(mask.astype(jnp.float32) for mask in masks)


for _entry in (
    Statistic(
        "slope", "gate", lambda g: jnp.abs(g.rho + g.z * g.drho), metric="importance"
    ),
    Statistic(
        "occupancy", "gate", _occupied, parts=4, complete=True, metric="occupancy"
    ),
    Statistic("feature", "probe", lambda m: jnp.abs(m.rho * m.dz), metric="feature"),
    Statistic("selection", "probe", lambda m: jnp.abs(m.selection)),
    Statistic("linear", "probe", lambda m: jnp.abs(m.z * m.drho * m.dz)),
    # X = phi(z + dz) - phi(z) - phi'(z) dz, the part of the response that the gradient does not
    # see.
    Statistic("excess", "probe", lambda m: jnp.abs(m.selection - m.z * m.drho * m.dz)),
    Statistic("response", "probe", lambda m: jnp.abs((m.rho + m.z * m.drho) * m.dz)),
    Statistic("delta", "cotangent", jnp.abs, degree=1, metric="delta"),
    Statistic("delta_squared", "cotangent", jnp.square, degree=2),
):
    register_statistic(_entry)

# Measured by every block for the log and the report, whichever rules are active.
STANDARD = ("slope", "occupancy", "feature", "selection", "linear")
COUNTS = ("tokens", "probe_tokens")
# Ratios of sums: name -> (numerator, denominator). "limit" is the misalignment for small dz.
RATIOS = {"misalignment": ("selection", "feature"), "limit": ("linear", "feature")}
RATIOS |= {"nonlinearity": ("excess", "response")}
# Prefix of the checks of `nalora_jax.method.measurement`: the largest ratios, not sums.
CHECK = "check_"


def forward(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the statistics of the forward pass among ``names``, no counts and no checks."""
    return _of_sources(names, "gate", "probe")


def cotangent(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the statistics of the backward pass among ``names``."""
    return _of_sources(names, "cotangent")


def _of_sources(names: Iterable[str], *sources: str) -> tuple[str, ...]:
    """Returns the statistics among ``names`` with one of these sources, no counts and no checks."""
    selected = []
    for name in names:
        if name in COUNTS or name.startswith(CHECK):
            continue
        if get_statistic(name).source in sources:
            selected.append(name)
    return tuple(selected)


# ---------------------------------------------------------------- sums over tokens


def channel_statistics(
    z: Array,
    weights: Array,
    activation: Activation,
    partition: Partition,
    names: Iterable[str] = STANDARD,
) -> StatisticSums:
    """Returns ``tokens`` and the sums of the gate statistics in ``names``.

    Args:
      z: [..., tokens, d_ff] full gate pre-activations, adapter included.
      weights: [..., tokens] token weights, 0 for padding; or a bool mask.
      activation: the gate's.
      partition: its regions.
      names: statistics; other sources are ignored.
    """
    z = _float32(z, weights)
    values = Gate(z, *activation.gate(z), partition)
    return {"tokens": _tokens(weights)} | _sums("gate", values, weights, names)


def probe_statistics(
    z_base: Array,
    dz: Array,
    weights: Array,
    activation: Activation,
    names: Iterable[str] = STANDARD,
) -> StatisticSums:
    """Returns ``probe_tokens`` and the sums of the probe statistics in ``names``.

    Args:
      z_base: [..., tokens, d_ff] pre-activations without the adapter.
      dz: [..., tokens, d_ff] the adapter's output.
      weights, activation, names: as in `channel_statistics`.
    """
    chex.assert_equal_shape([z_base, dz])
    z = _float32(z_base, weights)
    dz = _float32(dz, weights)
    rho, drho = activation.gate(z)
    moved_rho, _ = activation.gate(z + dz)
    values = Move(z, dz, rho, drho, moved_rho)
    return {"probe_tokens": _tokens(weights)} | _sums("probe", values, weights, names)


def cotangent_statistics(
    delta: Array, weights: Array, names: Iterable[str]
) -> StatisticSums:
    """Returns the sums of the cotangent statistics in ``names``, [d_ff] each.

    Args:
      delta: [..., tokens, d_ff], the cotangent of z: loss per unit of z.
      weights: [..., tokens].
      names: statistics; other sources are ignored.
    """
    return _sums("cotangent", _float32(delta, weights), weights, names)


def _sums(
    source: str, values: Any, weights: Array, names: Iterable[str]
) -> StatisticSums:
    """Returns the sums over tokens of the statistics in ``names`` that have this ``source``.

    ``values`` is the argument of their functions, ``weights`` is ``[..., tokens]``; a sum is
    ``[d_ff]`` or ``[parts, d_ff]``.
    """

    def summed(values: Array | tuple[Array, ...]) -> Array:
        """Returns the sum of values per token and channel, or of each part of them."""
        if isinstance(values, tuple):
            return jnp.stack([total(value, weights) for value in values])
        return total(values, weights)

    entries = [get_statistic(name) for name in dict.fromkeys(names)]
    return {
        entry.name: summed(entry.values(values))
        for entry in entries
        if entry.source == source
    }


def _float32(z: Array, weights: Array) -> Array:
    """Returns z in float32 without gradient, after a check against the shape of its weights."""
    chex.assert_shape(weights, z.shape[:-1])
    assert z.ndim >= 2, z.shape
    return lax.stop_gradient(z).astype(jnp.float32)


def _tokens(weights: Array) -> Array:
    return jnp.sum(lax.stop_gradient(weights).astype(jnp.float32))


def total(values: Array, weights: Array) -> Array:
    """Returns the weighted sum over tokens: [..., tokens, d_ff] -> [d_ff] float32."""
    # A matmul: XLA's CPU reductions of several weighted sums at once are up to ten times slower,
    # and a mask broadcast over channels would be materialized once for all layers.
    weights = lax.stop_gradient(weights).astype(jnp.float32).reshape(1, -1)
    values = values.reshape(weights.shape[1], -1)
    contract = (((1,), (0,)), ((), ()))  # [1, tokens] @ [tokens, d_ff]
    exact = lax.Precision.HIGHEST
    sums = lax.dot_general(weights, values, contract, precision=exact)
    return sums[0]


# ---------------------------------------------------------------- the way out of a model


def taps(names: Iterable[str], channels: tuple[int, ...]) -> StatisticSums:
    """Returns zeros whose gradients become the statistics in ``names`` and their counts.

    Example:
      >>> {name: tap.shape for name, tap in taps(("slope", "delta_squared"), (30, 1536)).items()}
      {'slope': (30, 1536), 'delta_squared': (30, 1536), 'tokens': (30,)}
    """
    entries = [get_statistic(name) for name in names]
    shapes = {entry.name: entry.shape(channels) for entry in entries}
    if entries:
        counts = [entry.count for entry in entries]
        shapes |= dict.fromkeys(("tokens", *counts), channels[:-1])
    return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}


_WEIGHTS: ContextVar[Array | None] = ContextVar("token_weights", default=None)


@contextmanager
def token_weights(weights: Array) -> Iterator[None]:
    """Sets the weights of the tokens in the statistics of `observe`, 0 for padding, for calls
    inside.

    Args:
      weights: shaped like the gates' pre-activations without their last axis, e.g. ``[batch,
        seq]``.
    """
    token = _WEIGHTS.set(weights)
    try:
        yield
    finally:
        _WEIGHTS.reset(token)


def observe(
    z: Array,
    dz: Array,
    taps: Mapping[str, Array],
    activation: Activation | str,
    weights: Array | None = None,
) -> Array:
    """Returns ``z``; the gradient with respect to ``taps`` is the statistics of the gate.

    Value and gradient of z are unchanged.

    Args:
      z: ``[..., d_ff]``, the gate's pre-activation with the adapter's output, the argument of phi.
      dz: the adapter's output, same shape.
      taps: zeros by statistic (`taps`), which are the request for statistics.
      activation: phi.
      weights: ``[...]``, weights of the tokens; by default those of `token_weights`, or ones.

    Raises:
      NaloraError: weights of another shape, or an unknown activation or statistic.

    Example:
      >>> z = observe(x @ kernel + dz, dz, lora["taps"], "silu")
      >>> y = (jax.nn.silu(z) * u) @ down
    """
    if isinstance(activation, str):
        activation = activations.get_activation(activation)
    if weights is None:
        weights = _WEIGHTS.get()
    if weights is None:
        weights = jnp.ones(z.shape[:-1], bool)
    if weights.shape != z.shape[:-1]:
        raise NaloraError(
            "token_weights",
            expected=f"shape {z.shape[:-1]}, the tokens of the gate",
            found=weights.shape,
        )
    rows = _rows_of(z)
    moved = _rows_of(dz)
    flat = weights.reshape(-1)
    partition = activations.partition(activation.name)
    names = forward(taps)
    sums = channel_statistics(rows, flat, activation, partition, names)
    sums |= probe_statistics(rows - moved, moved, flat, activation, names)
    requested = {name: sums[name] for name in taps if name in sums}
    return emit(z, taps, requested, weights, _of_tokens)


def _rows_of(z: Array) -> Array:
    """Returns ``[tokens, d_ff]`` float32, without gradient."""
    rows = lax.stop_gradient(z).reshape(-1, z.shape[-1])
    return rows.astype(jnp.float32)


def _of_tokens(delta: Array, weights: Array, names: Iterable[str]) -> StatisticSums:
    """Returns the statistics of a cotangent ``[..., d_ff]`` with weights ``[...]``."""
    rows = delta.reshape(-1, delta.shape[-1])
    return cotangent_statistics(rows, weights.reshape(-1), names)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def emit(
    z: Array,
    taps: Mapping[str, Array],
    sums: Mapping[str, Array],
    weights: Any,
    of_cotangent: Any = None,
) -> Array:
    """Returns ``z``; the gradients of ``taps`` are ``sums`` and the statistics of z's cotangent.

    Args:
      z: any shape; its value and gradient are unchanged.
      taps: zeros by statistic.
      sums: statistics of the forward pass, in the shapes of their taps.
      weights: token weights, in the form that ``of_cotangent`` takes.
      of_cotangent: ``(cotangent of z, weights, names) -> sums by name``, for the other taps.
    """
    return z


def _emit_fwd(
    z: Array,
    taps: Mapping[str, Array],
    sums: Mapping[str, Array],
    weights: Any,
    of_cotangent: Any,
) -> tuple[Array, Any]:
    """Returns z and the residuals of `_emit_bwd`: names of the taps, sums and weights."""
    # Saved by a rematerialized layer, which would compute the sums again otherwise.
    sums = {name: checkpoint_name(value, SUMS) for name, value in sums.items()}
    return z, (dict.fromkeys(taps), sums, weights)


def _emit_bwd(of_cotangent: Any, saved: Any, g: Array) -> tuple[Any, ...]:
    """Returns the cotangent of z unchanged, the statistics as gradients of the taps, and zeros for
    the sums."""
    names, sums, weights = saved
    others = tuple(name for name in names if name not in sums)
    measured = dict(sums)
    if others:
        measured |= of_cotangent(g, weights, others)
    of_taps = {name: measured[name] for name in names}
    of_sums = jax.tree.map(jnp.zeros_like, sums)
    return g, of_taps, of_sums, None


emit.defvjp(_emit_fwd, _emit_bwd)


def emit_measured(
    y: Array, taps: Mapping[str, Array], measured: Mapping[str, Array]
) -> Array:
    """Returns ``y``; the gradients of the taps that name a sum in ``measured`` are these sums."""
    of_forward = {name: tap for name, tap in taps.items() if name in measured}
    return emit(y, of_forward, {name: measured[name] for name in of_forward}, None)


# ---------------------------------------------------------------- sums to means


def merge_leaf(path: str, first: Array, second: Array) -> Array:
    """Returns the union of the leaf at ``path`` of two micro-batches: the larger value of a check,
    the sum of others."""
    if path.rpartition("/")[2].startswith(CHECK):
        return jnp.maximum(first, second)
    return first + second


def sum_over_shards(sums: Mapping[str, Array], names: Iterable[str]) -> StatisticSums:
    """Returns a block's counts and the sums in ``names``, summed over shards.

    The last part of a `Statistic.complete` entry is not communicated; it follows from the count.

    Args:
      sums: ``[layers, shards, ..., d_ff]``, ``[layers, shards, ..., parts, d_ff]``, counts
        ``[layers, shards, ...]``.
      names: statistics.
    """
    totals = {name: jnp.sum(sums[name], axis=1) for name in COUNTS if name in sums}
    for name in names:
        entry = get_statistic(name)
        value = sums[name]
        if not entry.complete:
            totals[name] = jnp.sum(value, axis=1)
            continue
        first = jnp.sum(value[..., :-1, :], axis=1)  # all parts but the last
        tokens = totals[entry.count][..., None]
        last = jnp.maximum(tokens - jnp.sum(first, axis=-2), 0.0)
        totals[name] = jnp.concatenate([first, last[..., None, :]], axis=-2)
    return totals


def scale_to_targets(sums: Mapping[str, Array], target_tokens: Array) -> StatisticSums:
    """Returns a block's sums with delta as the cotangent of the mean loss per target token.

    The differentiated loss is a sum over target tokens, so that micro-batches and devices add up. A
    sum of the k-th power of delta is divided by the k-th power of their number.
    """
    scale = jnp.maximum(target_tokens, 1.0)
    scaled = dict(sums)
    for name in sums:
        if name in TABLE and get_statistic(name).degree:
            scaled[name] = sums[name] / scale ** get_statistic(name).degree
    return scaled


def mean(name: str, sums: Mapping[str, Array]) -> Array:
    """Returns the mean of ``name`` over tokens per channel; NaN if no token was counted.

    Leading axes (layers, experts) are those of the count, e.g. [L] with ``slope`` [L, d_ff].
    """
    value = sums[name]
    count = sums[get_statistic(name).count]
    missing = (1,) * (value.ndim - count.ndim)
    count = count.reshape(count.shape + missing)
    divisor = jnp.where(count > 0, count, 1)
    return jnp.where(count > 0, value / divisor, jnp.nan)


def ratio(name: str, sums: Mapping[str, Array]) -> Array:
    """Returns an entry of `RATIOS` of any sums; 0 if the denominator is 0."""
    above, below = (sums[statistic] for statistic in RATIOS[name])
    divisor = jnp.where(below > 0, below, 1.0)
    return jnp.where(below > 0, above / divisor, 0.0)
