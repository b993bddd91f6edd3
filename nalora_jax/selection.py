"""The gate-compensation identity, and the positions that statistics of it are taken at: pure functions of arrays.

    phi(z + dz) - phi(z) = F + S,   F = rho(z) dz,   S = (rho(z + dz) - rho(z)) (z + dz)

F is what a low-rank update of the gate promises; S, the movement of the selection weight, is what it leaves out.
What is measured of them is a table, `nalora_jax.statistics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax

from nalora_jax import statistics as table
from nalora_jax.activations import Activation, Partition
from nalora_jax.statistics import channel_statistics as channel_statistics
from nalora_jax.statistics import probe_statistics as probe_statistics

Statistics = dict[str, Array]

# Below this a denominator counts as 0: far under any gate movement that float32 resolves.
_EPS = 1e-12
# Positions that are taken together where only some are.
_RUN = 8


def gate_decomposition(z: Array, dz: Array, activation: Activation) -> tuple[Array, Array]:
    """Feature and selection term of a gate's movement: ``F + S = phi(z + dz) - phi(z)``, exact but for rounding.

    Args:
      z: pre-activations of the frozen gate, any shape.
      dz: what the adapter adds to them, same shape.

    Returns:
      ``(F, S)``, each of z's shape.
    """
    chex.assert_equal_shape([z, dz])
    rho = activation.rho(z)
    return rho * dz, (activation.rho(z + dz) - rho) * (z + dz)


def compensated_gate(z: Array, dz: Array, activation: Activation) -> Array:
    """``rho(z) (z + dz)``: the adapted gate with its selection frozen, that is with S removed."""
    chex.assert_equal_shape([z, dz])
    return activation.rho(z) * (z + dz)


def misalignment(z: Array, dz: Array, weights: Array, activation: Activation) -> Array:
    """``E|S| / E|F|`` per channel over weighted tokens, 0 where nothing moves.

    Args:
      z: [..., d_ff].
      dz: [..., d_ff].
      weights: [...], 1 for a real token and 0 for padding.

    Returns:
      [d_ff] float32.
    """
    return ratios(probe_statistics(z, dz, weights, activation))["misalignment"]


def misalignment_limit(z: Array, dz: Array, weights: Array, activation: Activation) -> Array:
    """``E|z rho'(z) dz| / E|rho(z) dz|`` per channel: what `misalignment` tends to as dz shrinks; same arguments."""
    return ratios(probe_statistics(z, dz, weights, activation))["limit"]


def sampled(x: Array, weights: Array, stride: int, run: int = _RUN) -> Array:
    """One in ``stride`` positions of every row, as statistics take them: real ones where there are any.

    Positions are taken in runs of 8, one of every ``stride`` runs: the one with most real tokens, in a row that is full
    the middle one. Of a length that such groups do not divide, one of every ``stride`` positions: the first one, or the
    first that is real. So a row of few tokens counts as well, and a row counts alike in any batch.

    A TPU holds 8 positions in one tile: a run is read alone, while for single positions the whole array is read and
    their copy written, which for two strides is 3% of all that a LoRA step reads and writes.

        stride 2, 32 real positions                    8 to 15 and 24 to 31
        stride 2, 32 positions, the first 6 real       0 to 7 and 24 to 31 (whose weights are 0)
        stride 2, 6 real positions                     0, 2, 4

    Args:
      x: ``[..., positions, n]``.
      weights: ``[..., positions]``, 0 for padding.
      stride: 1 or more.
      run: positions that are taken together.

    Returns:
      ``[..., taken, n]``.
    """
    chex.assert_equal_shape_prefix([x, weights], weights.ndim)
    if stride == 1:
        return x
    run, groups = _grouping(weights.shape[-1], stride, run)
    chosen = _chosen(weights, stride, run)
    missing = groups * stride * run - weights.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]) if missing else x
    # [..., groups, stride, run, n], of which one of every stride
    x = x.reshape(*x.shape[:-2], groups, stride, run, x.shape[-1])
    taken = jnp.take_along_axis(x, chosen[..., None, None, None], axis=-3, mode="promise_in_bounds")
    return taken.reshape(*weights.shape[:-1], groups * run, x.shape[-1])


def sampled_positions(weights: Array, stride: int) -> tuple[Array, Array]:
    """The positions that `sampled` takes, int32 ``[..., taken]``, and the float32 weights of their tokens."""
    places = jnp.broadcast_to(jnp.arange(weights.shape[-1], dtype=jnp.int32), weights.shape)
    positions = sampled(places[..., None], weights, stride)[..., 0]
    return positions, sampled(weights.astype(jnp.float32)[..., None], weights, stride)[..., 0]


def sampled_weights(weights: Array, stride: int) -> Array:
    """Float32 ``weights`` ``[..., positions]`` where `sampled` takes a position, 0 where it does not."""
    if stride == 1:
        return weights.astype(jnp.float32)
    run, groups = _grouping(weights.shape[-1], stride, _RUN)
    taken = jax.nn.one_hot(_chosen(weights, stride, run), stride, dtype=bool)  # [..., groups, stride]
    taken = jnp.repeat(taken.reshape(*weights.shape[:-1], groups * stride), run, axis=-1)
    return jnp.where(taken[..., : weights.shape[-1]], weights.astype(jnp.float32), 0.0)


def _grouping(length: int, stride: int, run: int) -> tuple[int, int]:
    """Positions in a run, 1 where groups of ``stride`` runs do not divide the length, and the number of groups."""
    run = run if length % (run * stride) == 0 else 1
    return run, -(-length // (stride * run))


def _chosen(weights: Array, stride: int, run: int) -> Array:
    """Which run of each group is taken: int32 ``[..., groups]``."""
    groups = -(-weights.shape[-1] // (stride * run))
    real = lax.stop_gradient(weights) > 0
    missing = groups * stride * run - weights.shape[-1]
    real = jnp.pad(real, [(0, 0)] * (real.ndim - 1) + [(0, missing)]) if missing else real
    counts = jnp.sum(real.reshape(*weights.shape[:-1], groups, stride, run), axis=-1, dtype=jnp.int32)
    preferred = jnp.arange(stride, dtype=jnp.int32) == (stride // 2 if run > 1 else 0)
    ranks = 2 * counts + jnp.broadcast_to(preferred, counts.shape).astype(jnp.int32)
    return jnp.argmax(ranks, axis=-1).astype(jnp.int32)


def occupancy_of(below: Sequence[Array], tokens: Array) -> Array:
    """Tokens per region, ``[4, d_ff]``, from those below each of the three cuts, ``[d_ff]``, and the sum of all."""
    return jnp.stack([below[0], below[1] - below[0], below[2] - below[1], tokens - below[2]])


def merge_statistics(*statistics: Statistics) -> Statistics:
    """Statistics of the union of disjoint sets of tokens (micro-batches, hosts): their sums added."""
    return jax.tree.map(lambda *sums: sum(sums[1:], start=sums[0]), *statistics)


def means(statistics: Mapping[str, Array]) -> Statistics:
    """Sums turned into expectations over tokens; NaN where there were none.

    Leading axes (layers, experts) are those of ``tokens``: [L] with ``slope`` [L, d_ff] and ``occupancy`` [L, 4, d_ff].
    The counts ``tokens`` and ``probe_tokens`` stay as they are.
    """
    return {name: sums if name in table.COUNTS else table.mean(name, statistics) for name, sums in statistics.items()}


def ratios(statistics: Mapping[str, Array], *, over_channels: bool = False) -> Statistics:
    """``misalignment`` and its small-movement ``limit`` from probe sums: per channel [..., d_ff], or per layer [...].

    Args:
      over_channels: divide sums over all channels (a layer's figure), instead of each channel's own.
    """
    feature, selection, linear = (
        jnp.sum(statistics[name], axis=-1) if over_channels else statistics[name]
        for name in ("feature", "selection", "linear")
    )
    return {"misalignment": _ratio(selection, feature), "limit": _ratio(linear, feature)}


def meaningful(occupancy: Array, partition: Partition, min_occupancy: float) -> Array:
    """Whether regions of at least two different degrees hold their share of tokens.

    Args:
      occupancy: [..., 4, d_ff] mean occupancies of each channel.
      min_occupancy: the share of (token, channel) pairs from which a region counts as occupied.

    Returns:
      [...] bool; always false for an activation whose regions all have one degree.
    """
    chex.assert_axis_dimension(occupancy, -2, 4)
    share = jnp.mean(occupancy, axis=-1)
    occupied = (share >= min_occupancy) & (share > 0)
    degrees = jnp.broadcast_to(jnp.asarray(partition.degrees, jnp.float32), occupied.shape)
    highest = jnp.max(jnp.where(occupied, degrees, -jnp.inf), axis=-1)
    lowest = jnp.min(jnp.where(occupied, degrees, jnp.inf), axis=-1)
    return highest > lowest


def _ratio(numerator: Array, denominator: Array) -> Array:
    return numerator / (denominator + _EPS)
