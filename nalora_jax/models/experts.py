"""The arithmetic of a mixture of gated experts: pure functions of one device's tokens.

Rows of tokens are sorted by expert, so every projection is one grouped matmul
(`nalora_jax.models.routing`) over exactly the tokens of each expert. No token is dropped and there
is no capacity limit. The mechanisms work per expert channel. `nalora_jax.models.moe` runs these
functions on a mesh.

Experts that are split over devices: every device of the mesh axis holds the same number of
consecutive experts, with their adapters. A device sorts the rows of its tokens by expert, sends
each block of rows to its device, and receives the experts' outputs in the same places. Statistics
of an expert are computed on its device. The blocks have a fixed size, `SLACK` times an even share
and at least `LEAST` rows. If a device has more rows for another, all devices of the axis gather the
experts instead (`lax.cond`), so that no token is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.method import activations, statistics
from nalora_jax.method.ffn import gated_product, up_factor
from nalora_jax.method.low_rank import Adapter, column_norm, displacement
from nalora_jax.method.measurement import CHECKS, GateStatsConfig, Live
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.routing import (
    ExpertGroups,
    Places,
    RouterSpec,
    Routing,
    SampledRows,
    expert_cotangent_statistics,
    expert_statistics,
    frozen_grouped_matmul,
    grouped_residual,
    route,
    sample,
    samples_of_parts,
    scatter_rows,
    sum_token_rows,
)
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.grouped_matmul import recomputes_probe
from nalora_jax.ops.storage import Kernel, expand


class ExpertProjection(NamedTuple):
    """One projection of all experts; all arrays but the scale have an axis ``[experts]``."""

    kernel: Kernel  # [experts, d_in, d_out]
    adapter: Adapter | None = None
    bias: jax.Array | None = None  # [experts, d_out]


class Layer(NamedTuple):
    """The arrays of a block."""

    router: jax.Array  # [d_model, experts]
    router_bias: jax.Array | None  # [experts]
    gate: ExpertProjection
    up: ExpertProjection
    down: ExpertProjection
    # zeros whose gradients are statistics of z's cotangent
    taps: Mapping[str, jax.Array]
    correction: jax.Array | None = None  # [experts], of the router's scores
    expert_scale: jax.Array | None = None  # [experts], of the router's weights


def map_projections(
    layer: Layer, change: Callable[[ExpertProjection], ExpertProjection]
) -> Layer:
    """Returns the layer with all three projections changed."""
    return layer._replace(
        gate=change(layer.gate), up=change(layer.up), down=change(layer.down)
    )


@dataclass(frozen=True)
class RoutedConfig:
    """The static options of a block."""

    base: ModelConfig  # uniform, of the layer's stack
    routing: RouterSpec
    numerics: Numerics
    stats: GateStatsConfig
    names: tuple[str, ...] = ()  # statistics of the forward pass
    dropout: float = 0.0  # on the adapters' inputs
    # Tokens of the whole rows if devices hold parts of them (`nalora_jax.ops.split_rows`); 0: whole
    # rows.
    split_length: int = 0
    # A mapped mesh axis whose devices each hold a part of every expert's channels, in order.
    axis: str | None = None
    records: bool = False  # return the experts of every token

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return self.base.experts_per_token

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of the forward pass's sums and checks."""
        if not self.names:
            return ()
        names = (*statistics.COUNTS, *self.names)
        if self.stats.checks:
            return (*names, *CHECKS)
        return names


# Hidden states ``[..., d_model]``, and the statistics by name.
RoutedOutput = tuple[jax.Array, dict[str, jax.Array]]
# Returns an array with dropout, by its number: the inputs of the adapters of gate, up and down.
Drop = Callable[[int, jax.Array], jax.Array]


def _unchanged(place: int, x: jax.Array) -> jax.Array:
    """Is the `Drop` of a layer without dropout."""
    return x


def routed_ffn(
    x: jax.Array,
    token_weights: jax.Array,
    keys: jax.Array | None,
    layer: Layer,
    config: RoutedConfig,
    routed_by: jax.Array | None = None,
    replayed: jax.Array | None = None,
    *,
    over: str | None = None,
    sends: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array | None]:
    """Passes every token through its ``top_k`` experts.

    Args:
      x: ``[batch, seq, d_model]``.
      token_weights: ``[batch, seq]``, weights of the tokens in the statistics.
      keys: ``[batch]``, dropout keys of the sequences; None for no dropout.
      layer: arrays of the block.
      config: static options.
      routed_by: input of the router; default: ``x``.
      replayed: int ``[batch, seq, top_k]``, experts in place of the router's choice, see `choose`.
      over: the mapped mesh axis that splits the experts, if one does; ``layer`` then has the
        device's experts, with taps of all experts.
      sends: send rows to their experts, without dropout, instead of gathering all experts.

    Returns:
      ``[batch, seq, d_model]``, the statistics (``{}`` if none are computed) of all experts, and
      the experts of every token, int ``[batch, seq, top_k]``; None unless ``config.records``.
    """
    routing = route_tokens(x, layer, config, routed_by, replayed)
    chosen = None
    if config.records:
        chosen = routing.chosen(*x.shape[:-1])
    samples = samples_of(routing, token_weights, config)
    if over is not None and sends:
        return *_exchanged(x, layer, routing, samples, config, over), chosen
    if over is not None:
        layer = all_experts(layer, over)
    if keys is None:
        drop = _unchanged
    else:
        drop = partial(_dropped, keys, routing, config)
    return *routed_rows(x, layer, routing, samples, config, drop), chosen


def samples_of(
    routing: Routing, token_weights: jax.Array, config: RoutedConfig
) -> tuple[SampledRows, SampledRows]:
    """Returns the rows for the gate's statistics and those for the probe."""
    stride = config.stats.stride
    probe_stride = config.stats.probe_stride
    if config.split_length:
        return samples_of_parts(
            routing, token_weights, (stride, probe_stride), config.split_length
        )
    samples = sample(routing, token_weights, stride)
    if not config.names:
        return samples, samples
    return samples, sample(routing, token_weights, probe_stride)


def routed_rows(
    x: jax.Array,
    layer: Layer,
    routing: Routing,
    samples: tuple[SampledRows, SampledRows],
    config: RoutedConfig,
    drop: Drop = _unchanged,
) -> RoutedOutput:
    """Computes `routed_ffn` with given experts and sampled rows of the tokens."""
    places = Places(routing.token, routing.back)
    # [tokens * top_k, d_model], sorted by expert
    rows = scatter_rows(x.reshape(-1, x.shape[-1]), places, config.top_k)
    y, measured = expert_rows(
        rows, routing.weight, layer, routing.groups, samples, config, drop
    )
    return sum_over_experts(y, places, config, x.shape), measured


def route_tokens(
    x: jax.Array,
    layer: Layer,
    config: RoutedConfig,
    routed_by: jax.Array | None = None,
    replayed: jax.Array | None = None,
) -> Routing:
    """Returns the experts of the tokens ``x [batch, seq, d_model]``; see `routed_ffn`."""
    if routed_by is not None:
        x = routed_by
    # [batch, seq, d_model] -> [tokens, d_model]
    flat = x.reshape(-1, x.shape[-1])
    # Float32 for any model dtype: a rounding error here would choose another expert.
    logits = lax.dot_general(
        flat.astype(jnp.float32), _frozen(layer.router), (((1,), (0,)), ((), ()))
    )
    if layer.router_bias is not None:
        logits = logits + _frozen(layer.router_bias)[None]
    of_experts = jax.tree.map(_frozen, (layer.correction, layer.expert_scale))
    if replayed is not None:
        replayed = replayed.reshape(-1, config.top_k)
    return route(logits, config.top_k, config.routing, *of_experts, replayed=replayed)


def _frozen(array: jax.Array) -> jax.Array:
    """Returns a float32 array without a gradient."""
    return lax.stop_gradient(array).astype(jnp.float32)


def sum_over_experts(
    y: jax.Array, places: Places, config: RoutedConfig, shape: tuple[int, ...]
) -> jax.Array:
    """Returns the sums ``[batch, seq, d_model]`` over the experts of each token."""
    y = sum_token_rows(y, places, config.top_k).reshape(shape)
    if config.axis is None:
        return y
    return lax.psum(y, config.axis)


def expert_rows(
    rows: jax.Array,
    weight: jax.Array,
    layer: Layer,
    groups: ExpertGroups,
    samples: tuple[SampledRows, SampledRows],
    config: RoutedConfig,
    drop: Drop = _unchanged,
) -> RoutedOutput:
    """Passes rows that are sorted by expert through their experts, times the router's weights.

    The inputs of the down projection are multiplied, ``(w h) W = w (h W)``: they are narrower than
    its outputs, and the gradient of w does not need the outputs again.

    Args:
      rows: ``[rows, d_model]``.
      weight: ``[rows]``, the router's.
      layer: arrays of the block.
      groups: the rows' experts.
      samples: rows for the gate's statistics and rows for the probe.
      config: static options.
      drop: dropout.

    Returns:
      ``[rows, d_model]``, partial sums over ``config.axis``; and the statistics.
    """
    numerics = config.numerics
    activation = activations.get_activation(config.base.activation)
    axis = config.axis
    inner = drop(0, rows)
    base, delta = _projected(layer.gate, rows, inner, groups, numerics)
    z = combine(base, delta)
    if layer.taps:
        z = statistics.emit(z, layer.taps, {}, samples[0], expert_cotangent_statistics)
    u = combine(*_projected(layer.up, rows, drop(1, rows), groups, numerics))
    hidden, _ = gated_product(z, u, activation, numerics, config.base.up_limit)
    measured: dict[str, jax.Array] = {}
    if config.names:
        start, dz = _probed(
            layer.gate, rows, inner, z, delta, groups, samples[1], numerics
        )
        measured = expert_statistics(
            samples[0].take(z), start, dz, samples, activation, config.names
        )
        if config.stats.checks is not None:
            live = Live(
                z,
                base,
                delta,
                up_factor(u.astype(numerics.residual), config.base.up_limit),
                hidden,
            )
            faults = config.stats.checks.arrays(live, activation, numerics.residual)
            if axis is not None:
                faults = {name: lax.pmax(worst, axis) for name, worst in faults.items()}
            measured |= faults
    hidden = hidden * weight[:, None].astype(hidden.dtype)
    inner = drop(2, hidden)
    return combine(
        *_projected(layer.down, hidden, inner, groups, numerics, axis, weight)
    ), measured


def combine(base: jax.Array, delta: jax.Array | None) -> jax.Array:
    """Returns ``base + delta`` in the base's dtype; the base if ``delta`` is None."""
    if delta is None:
        return base
    return base + delta.astype(base.dtype)


def _projected(
    experts: ExpertProjection,
    x: jax.Array,
    inner: jax.Array,
    groups: ExpertGroups,
    numerics: Numerics,
    axis: str | None = None,
    weight: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the base and the adapter's output ``[rows, d_out]`` of a projection.

    This is `nalora_jax.method.low_rank` over grouped rows; the adapter reads ``inner``. With
    ``axis`` the inputs are split over it, so that the results are partial sums. With ``weight``, by
    which the inputs have been multiplied, the bias is multiplied too.
    """
    base = frozen_grouped_matmul(x, experts.kernel, groups.sizes, numerics)
    adapter = experts.adapter
    bias = None
    if experts.bias is not None:
        bias = lax.stop_gradient(experts.bias)
        if axis is not None:  # only the first device of the axis adds it
            bias = jnp.where(lax.axis_index(axis) == 0, bias, 0)
        bias = jnp.take(bias, groups.expert, axis=0)
        if weight is not None:
            bias = bias * weight[:, None].astype(bias.dtype)
    if adapter is None:
        return combine(base, bias), None
    delta = grouped_residual(inner, *adapter[:3], groups, numerics, adapter.mask)
    if adapter.magnitude is not None:
        kernel = lax.stop_gradient(expand(experts.kernel)).astype(jnp.float32)
        norm = jax.vmap(column_norm, in_axes=(0, 0, 0, None))(kernel, *adapter[:3])
        norm = lax.stop_gradient(norm)
        if axis is not None:
            # The inputs of a column are split over the axis.
            norm = jnp.sqrt(lax.psum(jnp.square(norm), axis))
        ratio = (adapter.magnitude / norm)[groups.expert]
        # Rank 0: the magnitude has no effect and no gradient.
        ratio = jnp.where(jnp.asarray(adapter.scale) == 0, 1.0, ratio)
        delta = (ratio - 1.0) * base.astype(jnp.float32) + ratio * delta
    return combine(base, bias), delta.astype(base.dtype)


def _probed(
    gate: ExpertProjection,
    x: jax.Array,
    inner: jax.Array,
    z: jax.Array,
    delta: jax.Array | None,
    groups: ExpertGroups,
    probe: SampledRows,
    numerics: Numerics,
) -> tuple[jax.Array, jax.Array]:
    """Returns z without the adapter, and the adapter's change, in the probe's rows.

    Both are ``[taken, d_ff]``.

    The base matmul is fused into the sum z. Sampling it as well would write all of it to memory, so
    the initial value is computed as z minus the change. Arguments are as for `_projected`, with z
    and delta of all rows.
    """
    probed_z = probe.take(z).astype(jnp.float32)
    adapter = gate.adapter
    if adapter is None or delta is None:
        return probed_z, jnp.zeros_like(probed_z)
    plain = adapter.magnitude is None and adapter.start is None
    if plain and recomputes_probe(adapter.a.shape[0], adapter.a.shape[-1], numerics):
        # One matmul for all groups (`joins_factors`) reads only the rows' experts: the sizes,
        # which are those of all rows, have no effect.
        few = ExpertGroups(groups.sizes, probe.take(groups.expert))
        dz = grouped_residual(probe.take(inner), *adapter[:3], few, numerics).astype(
            delta.dtype
        )
    else:
        moved = delta
        if adapter.start is not None:
            # Initial factors that are not zero: the change is counted from their output.
            started = grouped_residual(
                x, *adapter.start, adapter.scale, groups, numerics
            )
            moved = lax.stop_gradient(displacement(delta, started.astype(delta.dtype)))
        dz = probe.take(moved)
    return probed_z - dz.astype(jnp.float32), dz


def _dropped(
    keys: jax.Array, routing: Routing, config: RoutedConfig, place: int, x: jax.Array
) -> jax.Array:
    """Returns ``x [rows, d]`` with dropout.

    The mask is drawn by sequence, token and channel, so that it is the same on every mesh.
    """
    size = 1
    first = jnp.int32(0)
    # the channels of the hidden rows are split
    if config.axis is not None and place == 2:
        size = lax.axis_size(config.axis)
        first = lax.axis_index(config.axis) * x.shape[1]
    shape = (x.shape[0] // keys.shape[0], size * x.shape[1])

    def draw(key: jax.Array) -> jax.Array:
        """Draws the mask of one sequence for all channels, which a device takes its part of."""
        folded = jax.random.fold_in(key, place)
        return jax.random.bernoulli(folded, 1.0 - config.dropout, shape)

    # [batch, seq * top_k, d] in the tokens' own order
    mask = lax.dynamic_slice_in_dim(jax.vmap(draw)(keys), first, x.shape[1], axis=2)
    mask = jnp.take(mask.reshape(x.shape), routing.order, axis=0)
    return jnp.where(mask, x / (1.0 - config.dropout), 0.0)


# ---------------------------------------------------------------- experts that are split over
# devices

# Rows of a block over the rows of an even distribution: half more than an even share.
SLACK = 1.5
# Rows of a block, if there are as many: few rows, in generation, are never evenly distributed.
LEAST = 64
UNEVEN = "uneven_experts"  # scope of the branch for more rows than a block holds
# Collectives of a step move a kernel, or the rows there and back, once per pass.
_WAYS = 2


def exchanges_less(
    rows: int, d_model: int, kernel_bytes: float, wide: float, devices: int
) -> bool:
    """Returns True if sending rows moves fewer bytes to a device than gathering the experts.

    Args:
      rows: rows of a device's tokens, ``tokens * top_k``.
      d_model: numbers in a row.
      kernel_bytes: of all experts of a layer, on a device after the gather.
      wide: bytes of a number in a row.
      devices: number of devices that share the experts.
    """
    return (
        devices > 1
        and _WAYS * block_rows(rows, devices) * devices * d_model * wide < kernel_bytes
    )


def block_rows(rows: int, devices: int) -> int:
    """Returns the rows of the block that a device sends to each device."""
    return min(rows, max(LEAST, math.ceil(SLACK * rows / devices)))


def _exchanged(
    x: jax.Array,
    layer: Layer,
    routing: Routing,
    samples: tuple[SampledRows, SampledRows],
    config: RoutedConfig,
    over: str,
) -> RoutedOutput:
    """Computes `routed_ffn` by sending rows; statistics have zeros for the experts of other
    devices."""
    devices = lax.axis_size(over)
    local = layer.gate.kernel.shape[0]  # experts of this device
    # [devices]: rows of this device's tokens for the experts of each device
    counts = jnp.sum(routing.sizes.reshape(devices, local), axis=1)
    block = block_rows(routing.token.shape[0], devices)
    # The same on all devices, because both branches have collectives.
    fits = lax.pmax(jnp.max(counts), over) <= block

    def exchanged(x: jax.Array, layer: Layer, routing: Routing) -> RoutedOutput:
        """Sends every row to the device with its expert, and the result back.

        A block of ``block`` places is sent to each device; rows are sorted by expert, therefore
        by device, too.
        """
        starts = jnp.cumsum(counts) - counts
        place = jnp.arange(block)
        # [devices * block]: the row in each place of the blocks
        real = (place[None] < counts[:, None]).reshape(-1)
        row = jnp.where(real, (starts[:, None] + place[None]).reshape(-1), 0)
        # The device of each row's expert, and the row's place in the blocks.
        target = routing.expert // local
        place_of_row = target * block + jnp.arange(target.shape[0]) - starts[target]
        places = Places(jnp.take(routing.token, row), place_of_row[routing.back], real)
        received = _to_devices(
            scatter_rows(x.reshape(-1, x.shape[-1]), places, config.top_k), over
        )
        # Unused places count as zeros of the last expert, with weight 0 in statistics.
        labels = jnp.where(
            real, jnp.take(routing.expert, row) % local, local - 1
        ).astype(jnp.float32)
        all_weights = routing.weight, *(_row_weights(routing, rows) for rows in samples)
        weights = [
            jnp.where(real, jnp.take(weight, row), 0.0) for weight in all_weights
        ]
        labelled = jnp.stack([labels, *weights], axis=1)
        labelled = _to_devices(labelled, over)
        # Received rows are in the order of their senders: sort them by expert.
        order = jnp.argsort(labelled[:, 0], stable=True)
        expert, weight, *weights = jnp.unstack(
            jnp.take(labelled, order, axis=0), axis=1
        )
        expert = expert.astype(jnp.int32)
        groups = ExpertGroups(
            jnp.bincount(expert, length=local).astype(jnp.int32), expert
        )
        # [local, rows]: True for the rows of an expert
        reached = expert[None, :] == jnp.arange(local)[:, None]
        of_gate, of_probe = (
            SampledRows(None, jnp.where(reached, w[None], 0.0)) for w in weights
        )
        first = lax.axis_index(over) * local
        taps = {
            name: lax.dynamic_slice_in_dim(tap, first, local)
            for name, tap in layer.taps.items()
        }
        layer = layer._replace(taps=taps)
        inverse = jnp.argsort(order)
        received = scatter_rows(received, Places(order, inverse), 1)
        y, measured = expert_rows(
            received, weight, layer, groups, (of_gate, of_probe), config
        )
        y = _to_devices(scatter_rows(y, Places(inverse, order), 1), over)
        y = sum_over_experts(y, places, config, x.shape)
        return y, {
            name: _of_all(value, first, local, devices)
            for name, value in measured.items()
        }

    @jax.checkpoint  # saves no gathered kernel
    def all_here(x: jax.Array, layer: Layer, routing: Routing) -> RoutedOutput:
        """Computes the rows here with gathered experts: a block is too small for them."""
        with jax.named_scope(UNEVEN):
            return routed_rows(x, all_experts(layer, over), routing, samples, config)

    return lax.cond(fits, exchanged, all_here, x, layer, routing)


def all_experts(layer: Layer, over: str) -> Layer:
    """Returns the layer with all experts, which the devices of a mapped mesh axis share."""

    def gather(leaf: jax.Array) -> jax.Array:
        """Returns ``[experts, ...]`` of a device's part; scalars are the same on all devices."""
        if leaf.ndim == 0:
            return leaf
        return lax.all_gather(leaf, over, tiled=True)

    return map_projections(layer, lambda experts: jax.tree.map(gather, experts))


def _to_devices(blocks: jax.Array, over: str) -> jax.Array:
    """Sends block i of ``[devices * block, n]`` to device i, and returns the received blocks in
    order."""
    return lax.all_to_all(blocks, over, split_axis=0, concat_axis=0, tiled=True)


def _row_weights(routing: Routing, sampled: SampledRows) -> jax.Array:
    """Returns the weight of every sorted row in statistics, float32 ``[rows]``, 0 if it is not
    sampled."""
    weights = jnp.sum(sampled.weights, axis=0)
    if sampled.rows is None:
        return weights
    return jnp.zeros(routing.token.shape, jnp.float32).at[sampled.rows].add(weights)


def _of_all(value: jax.Array, first: jax.Array, local: int, devices: int) -> jax.Array:
    """Returns a statistic ``[local, ...]`` among zeros of other experts; a check is a scalar and
    stays."""
    zeros = jnp.zeros((devices * local, *value.shape[1:]), value.dtype)
    if value.ndim:
        return lax.dynamic_update_slice_in_dim(zeros, value, first, axis=0)
    return value
