"""A mixture of gated experts as a Linen module: router, top-k and gated FFNs.

On a mesh every device routes its own tokens, in training and in evaluation. The axis "tensor"
splits the channels of every expert, so that all devices have the same work for any routing. "fsdp"
splits the experts: they are gathered for the layer, or rows are sent to them, whichever moves fewer
bytes. The arithmetic is in `nalora_jax.models.experts`.

Experts that are split over devices: every device of the mesh axis holds the same number of
consecutive experts, with their adapters. A device sorts the rows of its tokens by expert, sends each
block of rows to its device, and receives the experts' outputs in the same places. Statistics of an
expert are computed on its device. The blocks have a fixed size, `SLACK` times an even share and at
least `LEAST` rows. If a device has more rows for another, all devices of the axis gather the experts
instead (`lax.cond`), so that no token is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.method import statistics
from nalora_jax.method.ffn import Adapters, LoRADense
from nalora_jax.method.low_rank import Adapter, Dense
from nalora_jax.method.measurement import GateStatsConfig, SampledWeights
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.experts import (
    Experts,
    Layer,
    RoutedConfig,
    expert_rows,
    of_each,
    of_tokens,
    routed,
    routed_ffn,
    routed_rows,
    samples_of,
)
from nalora_jax.models.parts import FeedForward, PartOptions, Shapes
from nalora_jax.models.routing import Groups, Places, RouterSpec, Routing, SampledRows, permuted, spread
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.quantize import Quantized
from nalora_jax.ops.reductions import count, first_alone
from nalora_jax.ops.storage import Kernel, in_stored_layout

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


_AXIS = "tensor"  # the mesh axis that splits the experts' channels
_OVER = "fsdp"  # the mesh axis that splits the experts


class MoEFFN(nn.Module):
    """A top-k mixture of gated FFNs with the call signature of `GatedFFN`."""

    d_model: int
    d_ff: int
    n_experts: int
    top_k: int
    routing: RouterSpec = RouterSpec()
    activation: str = "silu"
    adapters: Adapters = Adapters()
    use_bias: bool = False
    router_bias: bool = False
    up_limit: float = 0.0  # see `nalora_jax.method.ffn.up_factor`
    numerics: Numerics = Numerics()
    stats: GateStatsConfig = GateStatsConfig()
    sharding: NamedSharding | None = None  # of [batch, seq, d_model] on a mesh
    experts: str = "auto"  # "gather" or "send", see `nalora_jax.config.ComputeConfig`

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scales: Mapping[str, jax.Array | float] | None = None,
        *,
        token_weights: jax.Array | SampledWeights | None = None,
        deterministic: bool = True,
        routed_by: jax.Array | None = None,
    ) -> jax.Array:
        """Returns ``[batch, seq, d_model]`` as ``x``.

        ``routed_by`` is the input of the router, ``x`` by default.
        """
        scales = scales or {}
        mask = None
        if self.has_variable("gate_mask", "mask"):
            mask = self.get_variable("gate_mask", "mask")
        taps = {}
        if not self.is_initializing():
            taps = self.variables.get("gate_taps", {})
        router = Router(self.n_experts, self.router_bias, self.routing, name="router")
        kernel, bias, *of_experts = router(self.d_model)
        layer = Layer(
            kernel,
            bias,
            self._experts("gate_proj", self.d_model, self.d_ff, scales, mask),
            self._experts("up_proj", self.d_model, self.d_ff, scales),
            self._experts("down_proj", self.d_ff, self.d_model, scales),
            {name: taps[name] for name in statistics.cotangent(taps)},
            *of_experts,
        )
        length, split_length = x.shape[1], 0
        if isinstance(token_weights, SampledWeights):
            length = split_length = token_weights.length
            token_weights = token_weights.every
        drops = self.adapters.dropout > 0 and not deterministic
        config = RoutedConfig(
            self.top_k,
            self.routing,
            self.activation,
            self.numerics,
            self.stats.of_rows(length),
            names=statistics.forward(taps),
            dropout=self.adapters.dropout,
            up_limit=self.up_limit,
            split_length=split_length,
        )
        weights = jnp.ones(x.shape[:2], jnp.float32)
        if token_weights is not None:
            weights = jnp.broadcast_to(token_weights, x.shape[:2])
        keys = None
        if drops:
            keys = jax.random.split(self.make_rng("dropout"), x.shape[0])
        y, measured = on_mesh(
            self.sharding, x, weights, keys, layer, config, routed_by, experts=self.experts
        )
        return statistics.emit_measured(y, taps, measured) if measured else y

    def _experts(
        self, name: str, d_in: int, d_out: int, scales: Mapping[str, Any], mask: jax.Array | None = None
    ) -> Experts:
        rank, dora = self.adapters.rank(name), self.adapters.dora
        module = LoRADense(d_out, rank, self.use_bias, dora, experts=self.n_experts, name=name)
        dense: Dense = module.dense(d_in, jnp.asarray(scales.get(name, 1.0), jnp.float32), mask)
        return Experts(dense.kernel, dense.adapter, dense.bias)


@dataclass(frozen=True)
class Mixture(FeedForward):
    """A mixture of experts; number, width and biases of the experts are fields of the config."""

    router: RouterSpec
    name: ClassVar[str] = "ffn"

    def param_shapes(self, config: ModelConfig) -> Shapes:
        """See `Part`."""
        shapes: Shapes = {"router/kernel": (config.d_model, config.n_experts)}
        if config.router_bias:
            shapes["router/bias"] = (config.n_experts,)
        if self.router.correction:
            shapes["router/correction"] = (config.n_experts,)
        for name, shape in self.projections(config).items():
            shapes[f"{name}/kernel"] = shape
            if config.ffn_bias:
                shapes[f"{name}/bias"] = (shape[0], shape[-1])
        return shapes

    def projections(self, config: ModelConfig) -> Shapes:
        """See `Part`."""
        n, d, f = config.n_experts, config.d_model, config.d_ff
        return {"gate_proj": (n, d, f), "up_proj": (n, d, f), "down_proj": (n, f, d)}

    def saved(self, config: ModelConfig) -> float:
        """See `Part`."""
        return 2.0 * config.experts_per_token * config.d_ff

    def gates(self, config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `FeedForward`."""
        return {"": ((config.n_experts, config.d_ff), config.activation)}

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """See `FeedForward`."""
        return MoEFFN(
            config.d_model,
            config.d_ff,
            config.n_experts,
            config.experts_per_token,
            self.router,
            config.activation,
            options.adapters,
            use_bias=config.ffn_bias,
            numerics=options.numerics,
            stats=options.stats,
            router_bias=config.router_bias,
            up_limit=config.up_limit,
            sharding=options.routing,
            experts=options.experts,
            name=self.name,
        )


class Router(nn.Module):
    """The frozen arrays of a router."""

    n_experts: int
    use_bias: bool = False
    spec: RouterSpec = RouterSpec()

    @nn.compact
    def __call__(self, d_model: int) -> tuple[jax.Array, *tuple[jax.Array | None, ...]]:
        """Returns the kernel ``[d_model, experts]``; bias, correction and scale ``[experts]`` or None."""
        kernel: jax.Array = self.param("kernel", nn.initializers.lecun_normal(), (d_model, self.n_experts))
        zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
        return (
            kernel,
            self._of_experts("bias", zeros, self.use_bias),
            self._of_experts("correction", zeros, self.spec.correction),
            self._of_experts("scale", ones, self.spec.expert_scale),
        )

    def _of_experts(self, name: str, init: Callable[..., jax.Array], exists: bool) -> jax.Array | None:
        if not exists:
            return None
        values: jax.Array = self.param(name, init, (self.n_experts,))
        return values


def on_mesh(
    sharding: NamedSharding | None,
    x: jax.Array,
    weights: jax.Array,
    keys: jax.Array | None,
    layer: Layer,
    config: RoutedConfig,
    routed_by: jax.Array | None = None,
    *,
    experts: str = "auto",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs `routed_ffn` on every device's own tokens.

    Without the mapping the compiler makes each device route the tokens of all devices.

    Args:
      sharding: of x; None on one device. If it does not divide the batch, every device computes all
        of it.
      x, weights, keys, layer, config, routed_by: as for `routed_ffn`; if ``config.stats`` has a
        sharding, taps have a leading axis ``[shards]``.
      experts: see `MoEFFN`; with dropout, experts are gathered.

    Returns:
      As `routed_ffn`; the statistics are by shard if ``config.stats`` has a sharding.
    """
    by_shard = count(config.stats.sharding) > 1
    if sharding is None or sharding.mesh.size == 1 or x.shape[0] % count(sharding):
        y, measured = routed_ffn(x, weights, keys, _of_shard(layer, config), config, routed_by=routed_by)
        return y, {name: first_alone(value, config.stats.sharding) for name, value in measured.items()}
    rows, mesh = sharding.spec[0], sharding.mesh
    axis = _AXIS if _splits(layer, mesh.shape.get(_AXIS, 1)) else None
    over = _OVER if _shares(sharding, layer) else None
    sends = over and keys is None and _sends(sharding, x, layer, config, experts)

    def local(
        x: jax.Array, weights: jax.Array, keys: jax.Array | None, layer: Layer, routed_by: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        x, layer = in_stored_layout(x, config.numerics), _of_shard(layer, config)
        if over and sends:
            y, measured = exchanged_ffn(x, weights, layer, config, over, axis, routed_by)
        else:
            layer = gathered(layer, over) if over else layer
            y, measured = routed_ffn(x, weights, keys, layer, config, axis, routed_by)
        return in_stored_layout(y, config.numerics), {name: value[None] for name, value in measured.items()}

    names, taps = config.measured, (rows,) if by_shard else ()
    y, parts = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(rows), P(rows), P(rows), _specs(layer, axis, taps, over), P(rows)),
        out_specs=(P(rows), {name: P(rows, *_by_channel(name, axis)) for name in names}),
        # An axis that splits no array is left to the compiler: mapping it would split cotangents
        # into partial sums, and their statistics are not linear.
        axis_names={*rows, axis} - {None},
        check_vma=False,
    )(x, weights, keys, layer, routed_by)
    if by_shard:
        return y, parts
    merge = {name: jnp.max if name.startswith(statistics.CHECK) else jnp.sum for name in names}
    return y, {name: merge[name](arrays, axis=0) for name, arrays in parts.items()}


def _shares(sharding: NamedSharding, layer: Layer) -> bool:
    """Returns True if the devices of a mesh axis hold the same number of experts each."""
    devices = sharding.mesh.shape.get(_OVER, 1)
    return devices > 1 and layer.gate.kernel.shape[0] % devices == 0 and _OVER in sharding.spec[0]


def _sends(sharding: NamedSharding, x: jax.Array, layer: Layer, config: RoutedConfig, experts: str) -> bool:
    """Returns True if rows are sent to experts, False if experts are gathered."""
    if experts != "auto":
        return experts == "send"
    rows = x.shape[0] // count(sharding) * x.shape[1] * config.top_k
    kernels = sum(
        leaf.nbytes for e in (layer.gate, layer.up, layer.down) for leaf in jax.tree.leaves(e.kernel)
    )
    kernels /= sharding.mesh.shape.get(_AXIS, 1)
    return exchanges_less(rows, x.shape[-1], kernels, x.dtype.itemsize, sharding.mesh.shape[_OVER])


def _of_shard(layer: Layer, config: RoutedConfig) -> Layer:
    """Returns ``layer`` with one shard's taps and with kernels in the layout of their stack."""

    def stored(experts: Experts) -> Experts:
        kernel = jax.tree.map(lambda x: in_stored_layout(x, config.numerics), experts.kernel)
        return experts._replace(kernel=kernel)

    layer = of_each(layer, stored)
    if count(config.stats.sharding) == 1:
        return layer
    # On a device these are the first.
    return layer._replace(taps={name: tap[0] for name, tap in layer.taps.items()})


def _splits(layer: Layer, parts: int) -> bool:
    """Returns True if the channels of every projection, as stored, can be split into ``parts``."""

    def divides(kernel: Kernel, place: int) -> bool:
        sizes = [leaf.shape[place] for leaf in jax.tree.leaves(kernel)]
        if isinstance(kernel, Quantized) and kernel.kind == "int8" and place == 1:
            sizes = [kernel.codes.shape[place]]  # one scale covers all inputs
        return all(size % parts == 0 for size in sizes)

    places = (layer.gate, 2), (layer.up, 2), (layer.down, 1)
    return parts > 1 and all(divides(experts.kernel, place) for experts, place in places)


def _specs(layer: Layer, axis: str | None, taps: tuple[Any, ...], over: str | None) -> Any:
    """Returns the partition specs of a layer's arrays; an absent array has no spec either.

    Channels are split over ``axis``, experts over ``over`` and taps by shard over ``taps``; all
    other axes are replicated.
    """
    channels, inputs = P(over, None, axis), P(over, axis, None)

    def projection(experts: Experts, kernel: P, a: P, b: P, of_outputs: P) -> Any:
        def stored(leaf: jax.Array) -> P:  # int8 has one scale for all inputs, which is not split
            return P(*(None if size == 1 else name for size, name in zip(leaf.shape, kernel, strict=True)))

        kernels = jax.tree.map(stored, experts.kernel)
        bias: Any = _if_present(experts.bias, of_outputs)
        if experts.adapter is None:
            return Experts(kernels, bias=bias)
        places: Any = (a, b, P(), of_outputs, of_outputs, (a, b))
        return Experts(kernels, Adapter(*map(_if_present, experts.adapter, places)), bias)

    places: Any = (
        P(),
        _if_present(layer.router_bias, P()),
        projection(layer.gate, channels, P(over), channels, P(over, axis)),
        projection(layer.up, channels, P(over), channels, P(over, axis)),
        projection(layer.down, inputs, inputs, P(over), P(over)),
        {name: P(*taps, *_by_channel(name, axis)) for name in layer.taps},
        _if_present(layer.correction, P()),
        _if_present(layer.expert_scale, P()),
    )
    return Layer(*places)


def _if_present(array: Any, spec: Any) -> Any:
    return None if array is None else spec


def _by_channel(name: str, axis: str | None) -> P:
    """Returns the spec of a statistic ``[experts, ...]``; counts and checks have no channels."""
    if name in statistics.COUNTS or name.startswith(statistics.CHECK):
        return P()
    rank = len(statistics.get(name).shape((1, 1)))
    return P(*[None] * (rank - 1), axis)
