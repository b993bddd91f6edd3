"""Experts that are split over devices: rows are sent to the devices that hold their experts.

Every device of the mesh axis holds the same number of consecutive experts, with their adapters. A
device sorts the rows of its tokens by expert, sends each block of rows to its device, and receives
the experts' outputs in the same places. Statistics of an expert are computed on its device.

The blocks have a fixed size, `SLACK` times an even share and at least `LEAST` rows. If a device has
more rows for another, all devices of the axis gather the experts instead (`lax.cond`), so that no
token is dropped.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.models.expert_products import Groups
from nalora_jax.models.expert_statistics import SampledRows
from nalora_jax.models.experts import (
    Layer,
    RoutedConfig,
    expert_rows,
    of_each,
    of_tokens,
    routed,
    routed_rows,
    samples_of,
)
from nalora_jax.models.router import Routing
from nalora_jax.models.token_rows import Places, permuted, spread

SLACK = 1.5  # rows of a block over the rows of an even distribution
LEAST = 64  # rows of a block, if there are as many: few rows, in generation, are never evenly distributed
UNEVEN = "uneven_experts"  # scope of the branch for more rows than a block holds
# Collectives of a step move a kernel, or the rows there and back, once per pass.
_WAYS = 2

Measured = dict[str, jax.Array]


def exchanges_less(rows: int, d_model: int, kernel_bytes: float, wide: float, devices: int) -> bool:
    """Returns True if sending rows moves fewer bytes to a device than gathering the experts.

    Args:
      rows: rows of a device's tokens, ``tokens * top_k``.
      d_model: numbers in a row.
      kernel_bytes: of all experts of a layer, on a device after the gather.
      wide: bytes of a number in a row.
      devices: number of devices that share the experts.
    """
    return devices > 1 and _WAYS * block_rows(rows, devices) * devices * d_model * wide < kernel_bytes


def block_rows(rows: int, devices: int) -> int:
    """Returns the rows of the block that a device sends to each device."""
    return min(rows, max(LEAST, math.ceil(SLACK * rows / devices)))


def exchanged_ffn(
    x: jax.Array,
    token_weights: jax.Array,
    layer: Layer,
    config: RoutedConfig,
    over: str,
    axis: str | None = None,
    routed_by: jax.Array | None = None,
) -> tuple[jax.Array, Measured]:
    """Computes `routed_ffn` without dropout, with experts that are split over a mapped mesh axis.

    Args:
      x, token_weights, config, axis, routed_by: as for `routed_ffn`.
      layer: the device's experts; taps are of all experts.
      over: the mapped mesh axis that splits the experts.

    Returns:
      As `routed_ffn`; statistics have all experts, with zeros for the experts of other devices.
    """
    routing = routed(x, layer, config, routed_by)
    samples = samples_of(routing, token_weights, config)
    devices, local = lax.axis_size(over), layer.gate.kernel.shape[0]
    counts = jnp.sum(routing.sizes.reshape(devices, local), axis=1)
    block = block_rows(routing.token.shape[0], devices)
    fits = lax.pmax(jnp.max(counts), over) <= block

    def exchanged(x: jax.Array, layer: Layer, routing: Routing) -> tuple[jax.Array, Measured]:
        return _exchanged(x, layer, routing, samples, counts, block, config, over, axis)

    @jax.checkpoint  # saves no gathered kernel
    def all_here(x: jax.Array, layer: Layer, routing: Routing) -> tuple[jax.Array, Measured]:
        with jax.named_scope(UNEVEN):
            return routed_rows(x, gathered(layer, over), routing, samples, config, axis)

    y, measured = lax.cond(fits, exchanged, all_here, x, layer, routing)
    return y, measured


def gathered(layer: Layer, over: str) -> Layer:
    """Returns the layer with all experts, which the devices of a mapped mesh axis share."""

    def gather(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 0:
            return leaf
        return lax.all_gather(leaf, over, tiled=True)

    return of_each(layer, lambda experts: jax.tree.map(gather, experts))


def _exchanged(
    x: jax.Array,
    layer: Layer,
    routing: Routing,
    samples: tuple[SampledRows, SampledRows],
    counts: jax.Array,
    block: int,
    config: RoutedConfig,
    over: str,
    axis: str | None,
) -> tuple[jax.Array, Measured]:
    devices, local = counts.shape[0], layer.gate.kernel.shape[0]
    starts = jnp.cumsum(counts) - counts
    place = jnp.arange(block)
    # [devices * block]: the row in each place of the blocks
    real = (place[None] < counts[:, None]).reshape(-1)
    row = jnp.where(real, (starts[:, None] + place[None]).reshape(-1), 0)
    target = routing.expert // local
    place_of_row = target * block + jnp.arange(target.shape[0]) - starts[target]
    places = Places(jnp.take(routing.token, row), place_of_row[routing.back], real)
    received = _to_devices(spread(x.reshape(-1, x.shape[-1]), places, config.top_k), over)
    # Unused places count as zeros of the last expert, with weight 0 in statistics.
    labels = jnp.where(real, jnp.take(routing.expert, row) % local, local - 1).astype(jnp.float32)
    all_weights = routing.weight, *(_row_weights(routing, rows) for rows in samples)
    weights = [jnp.where(real, jnp.take(weight, row), 0.0) for weight in all_weights]
    labelled = jnp.stack([labels, *weights], axis=1)
    labelled = _to_devices(labelled, over)
    order = jnp.argsort(labelled[:, 0], stable=True)
    expert, weight, *weights = jnp.unstack(jnp.take(labelled, order, axis=0), axis=1)
    expert = expert.astype(jnp.int32)
    groups = Groups(jnp.bincount(expert, length=local).astype(jnp.int32), expert)
    reached = expert[None, :] == jnp.arange(local)[:, None]
    of_gate, of_probe = (SampledRows(None, jnp.where(reached, w[None], 0.0)) for w in weights)
    first = lax.axis_index(over) * local
    taps = {name: lax.dynamic_slice_in_dim(tap, first, local) for name, tap in layer.taps.items()}
    layer = layer._replace(taps=taps)
    inverse = jnp.argsort(order)
    received = permuted(received, order, inverse)
    y, measured = expert_rows(received, weight, layer, groups, (of_gate, of_probe), config, axis)
    y = of_tokens(_to_devices(permuted(y, inverse, order), over), places, config, x.shape, axis)
    return y, {name: _of_all(value, first, local, devices) for name, value in measured.items()}


def _to_devices(blocks: jax.Array, over: str) -> jax.Array:
    """Sends block i of ``[devices * block, n]`` to device i, and returns the received blocks in order."""
    return lax.all_to_all(blocks, over, split_axis=0, concat_axis=0, tiled=True)


def _row_weights(routing: Routing, sampled: SampledRows) -> jax.Array:
    """Returns the weight of every sorted row in statistics, float32 ``[rows]``, 0 if it is not sampled."""
    weights = jnp.sum(sampled.weights, axis=0)
    if sampled.rows is None:
        return weights
    return jnp.zeros(routing.token.shape, jnp.float32).at[sampled.rows].add(weights)


def _of_all(value: jax.Array, first: jax.Array, local: int, devices: int) -> jax.Array:
    """Returns a statistic ``[local, ...]`` among zeros of other experts; a check is a scalar and stays."""
    if value.ndim == 0:
        return value
    zeros = jnp.zeros((devices * local, *value.shape[1:]), value.dtype)
    return lax.dynamic_update_slice_in_dim(zeros, value, first, axis=0)
