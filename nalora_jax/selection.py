"""The gate-compensation identity and the channel statistics: pure functions of gate pre-activations.

    phi(z + dz) - phi(z) = F + S,   F = rho(z) dz,   S = (rho(z + dz) - rho(z)) (z + dz)

F is what a low-rank update of the gate promises; S, the movement of the selection weight, is what it leaves out.
Statistics are sums over tokens, weighted, in float32 and under ``stop_gradient``; `means` turns them into expectations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nalora_jax.activations import Activation, Partition

Statistics = dict[str, Array]

# Below this a denominator counts as 0: far under any gate movement that float32 resolves.
_EPS = 1e-12
# Positions that are taken together where only some are.
_RUN = 8
# The count that each sum is divided by.
_COUNTS = {"slope": "tokens", "occupancy": "tokens"} | dict.fromkeys(("feature", "selection", "linear"), "probe_tokens")


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
      z, dz: [..., d_ff].
      weights: [...], 1 for a real token and 0 for padding.

    Returns:
      [d_ff] float32.
    """
    return ratios(probe_statistics(z, dz, weights, activation))["misalignment"]


def misalignment_limit(z: Array, dz: Array, weights: Array, activation: Activation) -> Array:
    """``E|z rho'(z) dz| / E|rho(z) dz|`` per channel: what `misalignment` tends to as dz shrinks; same arguments."""
    return ratios(probe_statistics(z, dz, weights, activation))["limit"]


def sampled(x: Array, stride: int, axis: int = -2) -> Array:
    """One in ``stride`` positions along ``axis``, as statistics take them.

    Runs of 8 positions, the middle one of every ``stride`` runs; of a length that such groups do not divide, every
    ``stride``-th position. A TPU holds 8 positions in one tile: a run is read alone, while for single positions the
    whole array is read and their copy written, which for two strides is 3% of all that a LoRA step reads and writes.

        stride 2, 32 positions     8 to 15 and 24 to 31
        stride 2, 6 positions      0, 2, 4

    Args:
      x: ``[..., positions, ...]``.
      stride: 1 or more.
      axis: that of the positions.
    """
    axis %= x.ndim
    length = x.shape[axis]
    if not _in_runs(length, stride):
        return lax.slice_in_dim(x, 0, None, stride, axis)
    start = _first_taken(stride)
    # [..., groups, stride * run, ...]
    groups = x.reshape(*x.shape[:axis], -1, stride * _RUN, *x.shape[axis + 1 :])
    runs = lax.slice_in_dim(groups, start, start + _RUN, axis=axis + 1)
    return runs.reshape(*x.shape[:axis], length // stride, *x.shape[axis + 1 :])


def sampled_weights(weights: Array, stride: int) -> Array:
    """Float32 ``weights`` ``[..., positions]`` where `sampled` takes a position, 0 where it does not."""
    places = np.arange(weights.shape[-1])
    if _in_runs(len(places), stride):
        taken = places % (stride * _RUN) // _RUN == _first_taken(stride) // _RUN
    else:
        taken = places % stride == 0
    return jnp.where(jnp.broadcast_to(taken, weights.shape), weights.astype(jnp.float32), 0.0)


def _in_runs(length: int, stride: int) -> bool:
    return length % (_RUN * stride) == 0


def _first_taken(stride: int) -> int:
    """Of every ``stride`` runs."""
    return stride // 2 * _RUN


def channel_statistics(z: Array, weights: Array, activation: Activation, partition: Partition) -> Statistics:
    """Sums over tokens of how responsive each channel is, and of where its pre-activations lie.

    Args:
      z: [..., tokens, d_ff] full gate pre-activations, adapter included.
      weights: [..., tokens] token weights, 0 for padding; or a bool mask.

    Returns:
      ``tokens`` [] = sum of weights; ``slope`` [d_ff] = sum of |phi'(z)|; ``occupancy`` [4, d_ff] = tokens per region,
      in the partition's order.
    """
    z = _float32(z, weights)
    rho, drho = activation.gate(z)
    tokens = _tokens(weights)
    below = [_total((z < cut).astype(jnp.float32), weights) for cut in (partition.z0, 0.0, partition.z1)]
    slope = _total(jnp.abs(rho + z * drho), weights)
    return {"tokens": tokens, "slope": slope, "occupancy": occupancy_of(below, tokens)}


def occupancy_of(below: Sequence[Array], tokens: Array) -> Array:
    """Tokens per region, ``[4, d_ff]``, from those below each of the three cuts, ``[d_ff]``, and the sum of all."""
    return jnp.stack([below[0], below[1] - below[0], below[2] - below[1], tokens - below[2]])


def probe_statistics(z_base: Array, dz: Array, weights: Array, activation: Activation) -> Statistics:
    """Sums over tokens of the identity's two terms, and of the selection term's linear limit.

    Args:
      z_base: [..., tokens, d_ff] pre-activations without the adapter.
      dz: [..., tokens, d_ff] what the adapter adds.
      weights: [..., tokens] token weights or bool mask.

    Returns:
      ``probe_tokens`` []; ``feature``, ``selection``, ``linear`` [d_ff]: sums of |F|, |S| and |z rho'(z) dz|.
    """
    chex.assert_equal_shape([z_base, dz])
    z, dz = _float32(z_base, weights), _float32(dz, weights)
    rho, drho = activation.gate(z)
    moved = (activation.gate(z + dz)[0] - rho) * (z + dz)
    return {
        "probe_tokens": _tokens(weights),
        "feature": _total(jnp.abs(rho * dz), weights),
        "selection": _total(jnp.abs(moved), weights),
        "linear": _total(jnp.abs(z * drho * dz), weights),
    }


def merge_statistics(*statistics: Statistics) -> Statistics:
    """Statistics of the union of disjoint sets of tokens (micro-batches, hosts): their sums added."""
    return jax.tree.map(lambda *sums: sum(sums[1:], start=sums[0]), *statistics)


def means(statistics: Mapping[str, Array]) -> Statistics:
    """Sums turned into expectations over tokens; 0 where there were none.

    Leading axes (layers, experts) are those of ``tokens``: [L] with ``slope`` [L, d_ff] and ``occupancy`` [L, 4, d_ff].
    The counts ``tokens`` and ``probe_tokens`` stay as they are.
    """
    return {name: _per_token(total, statistics.get(_COUNTS.get(name, ""))) for name, total in statistics.items()}


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


def _float32(z: Array, weights: Array) -> Array:
    """z in float32, cut off from differentiation, its shape checked against that of its token weights."""
    chex.assert_shape(weights, z.shape[:-1])
    assert z.ndim >= 2, z.shape
    return lax.stop_gradient(z).astype(jnp.float32)


def _tokens(weights: Array) -> Array:
    return jnp.sum(lax.stop_gradient(weights).astype(jnp.float32))


def _total(values: Array, weights: Array) -> Array:
    """Weighted sum over tokens: [..., tokens, d_ff] -> [d_ff] float32."""
    # As a product, because XLA's CPU reductions of several weighted sums at once are up to ten times slower, and
    # because a mask spread over the channels would be made once for all layers and read by each.
    weights = lax.stop_gradient(weights).astype(jnp.float32).reshape(1, -1)
    values = values.reshape(weights.shape[1], -1)
    return lax.dot_general(weights, values, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)[0]


def _per_token(total: Array, tokens: Array | None) -> Array:
    if tokens is None:
        return total
    tokens = tokens.reshape(tokens.shape + (1,) * (total.ndim - tokens.ndim))
    return total / jnp.where(tokens > 0, tokens, 1)


def _ratio(numerator: Array, denominator: Array) -> Array:
    return numerator / (denominator + _EPS)
