"""The sample of positions of rows that are split over devices (`nalora_jax.ops.split_rows`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from nalora_jax.method.measurement import GateStatsConfig, SampledWeights
from nalora_jax.models.routing import Routing, SampledRows, by_expert, sample
from nalora_jax.ops.reductions import RUN, sampled_weights
from nalora_jax.ops.split_rows import block_numbers, gathered


def sampled_as_whole(
    weights: Array, config: GateStatsConfig, block: int, parts: Callable[[Array], Array]
) -> SampledWeights:
    """Returns the weights of parts of rows for the positions that are sampled of the whole rows.

    Args:
      weights: ``[batch, seq]`` of whole rows.
      config: strides.
      block: tokens of the blocks that parts consist of.
      parts: returns the parts of rows ``[batch, seq]``.
    """
    length = weights.shape[-1]
    config = config.of_rows(length)
    strides = config.stride, config.probe_stride
    of_gate, of_probe = (parts(sampled_weights(weights, stride)) for stride in strides)
    gate, probe = (_within_blocks(stride, length, block) for stride in strides)
    return SampledWeights(parts(weights), of_gate, of_probe, (gate, probe), length)


def _within_blocks(stride: int, length: int, block: int) -> int:
    """Returns the largest stride at which samples of blocks contain the sample of their row.

    A group of the row consists of whole groups of a block, which take the group's run if the weights
    of all others are 0. If the row's positions are taken singly, or blocks divide runs, all are taken.
    """
    singly = length % (RUN * stride) or block % RUN
    return 1 if singly else math.gcd(stride, block // RUN)


# ---------------------------------------------------------------- experts


class _PlacedRows(NamedTuple):
    """The rows of a shard's blocks, sorted by expert, ``[blocks, rows]``.

    A place counts the rows of a whole sequence, sorted by expert and then by token.
    """

    row: Array  # int, among all sorted rows of the shard
    expert: Array  # int
    weight: Array  # float32, 0 for padding
    place: Array  # int
    before: Array  # int, place of the last row with weight before this row; -1 for none


def samples_of_parts(
    routing: Routing, token_weights: Array, strides: tuple[int, int], length: int
) -> tuple[SampledRows, SampledRows]:
    """Samples rows of parts of sequences (`nalora_jax.ops.split_rows`) as `sample` does of whole ones.

    Within a shard. The rows of an expert in a block have consecutive places, so the number of these
    rows and the last with weight, two integers by block and expert, are all that shards exchange.

    Args:
      routing: of the shard's tokens.
      token_weights: ``[batch, 2 * block]``, 0 for padding.
      strides: of both samples.
      length: tokens of a whole sequence, without the padding to whole blocks.
    """
    weights = lax.stop_gradient(token_weights).astype(jnp.float32)
    rows = _placed(routing, weights, length)

    def of_stride(stride: int) -> SampledRows:
        return sample(routing, weights, stride) if stride == 1 else _one_in(stride, rows, routing)

    return of_stride(strides[0]), of_stride(strides[1])


def _one_in(stride: int, rows: _PlacedRows, routing: Routing) -> SampledRows:
    """Returns the first row with weight in every ``stride`` places of a sequence."""
    chosen = (rows.weight > 0) & (rows.place // stride != rows.before // stride)
    # The rows of an expert are in at most rows / stride + 2 groups of places.
    most = min(chosen.shape[1], chosen.shape[1] // stride + 2 * routing.sizes.shape[0])
    taken = jnp.argsort(~chosen, axis=1, stable=True)[:, :most]
    weight = jnp.where(chosen, rows.weight, 0.0)
    of_taken = (jnp.take_along_axis(x, taken, axis=1) for x in (rows.row, weight, rows.expert))
    index, weight, expert = (x.reshape(-1) for x in of_taken)
    return SampledRows(index, by_expert(weight, expert, routing))


def _placed(routing: Routing, weights: Array, length: int) -> _PlacedRows:
    """Returns a shard's rows with their places; arguments as for `samples_of_parts`."""
    batch, block = weights.shape[0], weights.shape[1] // 2
    natural = routing.expert[routing.back].reshape(2 * batch, -1)
    order = jnp.argsort(natural, axis=1, stable=True)
    in_order = partial(jnp.take_along_axis, indices=order, axis=1)
    index, expert = in_order(routing.back.reshape(order.shape)), in_order(natural)
    weight = jnp.take(weights.reshape(-1), jnp.take(routing.token, index))
    # Rows of the padding to whole blocks have no place.
    tokens = jnp.clip(length - jnp.stack(block_numbers()) * block, 0, block)
    exists = order // (order.shape[1] // block) < jnp.tile(tokens, batch)[:, None]
    reached = jax.nn.one_hot(expert, routing.sizes.shape[0], dtype=bool)
    number, sizes = jnp.arange(order.shape[1])[None], jnp.sum(reached, axis=1)
    first = jnp.cumsum(sizes, axis=1) - sizes  # [blocks, experts]
    last = jnp.max(jnp.where(reached & (weight > 0)[..., None], number[..., None], -1), axis=1) - first
    counts = jnp.sum(reached & exists[..., None], axis=1)
    start, before = _of_sequence(counts.reshape(batch, 2, -1), last.reshape(batch, 2, -1))
    of_expert = partial(jnp.take_along_axis, indices=expert, axis=1)
    place = number + of_expert(start - first)
    preceding = lax.cummax(jnp.where(weight > 0, place, -1), axis=1)
    preceding = jnp.pad(preceding[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return _PlacedRows(index, expert, weight, place, jnp.maximum(preceding, of_expert(before)))


def _of_sequence(counts: Array, last: Array) -> tuple[Array, Array]:
    """Returns the first place of every expert's rows in a shard's blocks, and the last before it with weight.

    Args:
      counts: int ``[batch, 2, experts]``, rows of every expert in the shard's two blocks.
      last: the last of these with weight; negative for none.

    Returns:
      Two arrays ``[2 * batch, experts]``.
    """
    batch, _, experts = counts.shape
    # [batch, experts, blocks of the sequence]
    counts, last = jnp.moveaxis(gathered(jnp.stack([counts, last], axis=-1)), (3, 2), (0, 2))
    flat = counts.reshape(batch, -1)
    start = jnp.cumsum(flat, axis=1) - flat
    ends = lax.cummax(jnp.where(last.reshape(batch, -1) >= 0, start + last.reshape(batch, -1), -1), axis=1)
    before = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)), constant_values=-1)

    def of_blocks(x: Array) -> Array:
        x = x.reshape(batch, experts, -1)[:, :, jnp.stack(block_numbers())]
        return jnp.moveaxis(x, 2, 1).reshape(2 * batch, experts)

    return of_blocks(start), of_blocks(before)
