"""A mixture of gated experts as a Linen module: router, top-k, and the gated FFN of each chosen expert.

On a mesh every device routes the tokens that it holds, in training and in evaluation, and none are moved. Experts are
split over the axis "tensor", each by its channels, so that all devices have the same work whatever the router prefers;
what "fsdp" splits is gathered for the layer. The arithmetic is `nalora_jax.models.experts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.dense import frozen_kernel, init_a, initial_factors, magnitude_of
from nalora_jax.errors import NaloraError
from nalora_jax.measurement import GateStatsConfig
from nalora_jax.method import statistics
from nalora_jax.method.ffn import Adapters
from nalora_jax.method.low_rank import Adapter
from nalora_jax.models.experts import Experts, Layer, RoutedConfig, routed_ffn
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.quantize import Quantized
from nalora_jax.ops.reductions import count, first_alone
from nalora_jax.ops.storage import Kernel

_AXIS = "tensor"  # of the mesh, which splits the experts' channels


class ExpertDense(nn.Module):
    """The frozen kernels of one projection of all experts, with optional adapters."""

    n_experts: int
    features: int
    rank: int = 0
    dora: bool = False

    @nn.compact
    def __call__(self, d_in: int, scale: jax.Array | float = 1.0, mask: jax.Array | None = None) -> Experts:
        """Returns the projection's arrays; see `nalora_jax.dense.LoRADense.dense`; mask ``[experts, d_out]``."""
        shape = (self.n_experts, d_in, self.features)
        kernel = frozen_kernel(self, shape, nn.initializers.lecun_normal(batch_axis=(0,)))
        if not self.rank or not (self.is_initializing() or self.has_variable("lora", "a")):
            return Experts(kernel)
        a = self.variable("lora", "a", lambda: init_a(self.make_rng("params"), (*shape[:2], self.rank))).value
        b = self.variable("lora", "b", lambda: jnp.zeros((self.n_experts, self.rank, self.features), jnp.float32)).value
        if self.has_variable("lora", "singular"):  # AdaLoRA, in training
            a = a * self.get_variable("lora", "singular")[:, None, :]
        if a.ndim != 3:
            raise NaloraError("adapters", expected="one adapter on expert projections", found="a stack of adapters")
        magnitude = magnitude_of(self, kernel, axis=1) if self.dora else None
        start = initial_factors(self)
        return Experts(kernel, Adapter(a, b, jnp.asarray(scale, jnp.float32), mask, magnitude, start=start))


class MoEFFN(nn.Module):
    """A top-k mixture of gated FFNs; the call is `GatedFFN`'s."""

    d_model: int
    d_ff: int
    n_experts: int
    top_k: int
    norm_topk: bool = True
    activation: str = "silu"
    adapters: Adapters = Adapters()
    use_bias: bool = False
    numerics: Numerics = Numerics()
    stats: GateStatsConfig = GateStatsConfig()
    sharding: NamedSharding | None = None  # of [batch, seq, d_model] on a mesh

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scales: Mapping[str, jax.Array | float] | None = None,
        *,
        token_weights: jax.Array | None = None,
        deterministic: bool = True,
        adapter_ids: jax.Array | None = None,
    ) -> jax.Array:
        """``[batch, seq, d_model]`` -> the same; ``adapter_ids`` has no meaning here."""
        del adapter_ids
        scales = scales or {}
        mask = self.get_variable("gate_mask", "mask") if self.has_variable("gate_mask", "mask") else None
        taps = {} if self.is_initializing() else self.variables.get("gate_taps", {})
        layer = Layer(
            Router(self.n_experts, name="router")(self.d_model),
            self._experts("gate_proj", self.d_model, self.d_ff, scales, mask),
            self._experts("up_proj", self.d_model, self.d_ff, scales),
            self._experts("down_proj", self.d_ff, self.d_model, scales),
            {name: self.get_variable("gate_taps", name) for name in taps},
        )
        drops = self.adapters.dropout > 0 and not deterministic
        config = RoutedConfig(
            self.top_k,
            self.norm_topk,
            self.activation,
            self.numerics,
            self.stats.of_rows(x.shape[1]),
            measure=not self.is_initializing() and self.is_mutable_collection("gate_stats"),
            dropout=self.adapters.dropout,
        )
        weights = jnp.ones(x.shape[:2], jnp.float32) if token_weights is None else token_weights
        weights = jnp.broadcast_to(weights, x.shape[:2])
        keys = jax.random.split(self.make_rng("dropout"), x.shape[0]) if drops else None
        y, measured = on_mesh(self.sharding, x, weights, keys, layer, config)
        for name, value in measured.items():
            self.sow("gate_stats", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
        return y

    def _experts(
        self, name: str, d_in: int, d_out: int, scales: Mapping[str, Any], mask: jax.Array | None = None
    ) -> Experts:
        module = ExpertDense(self.n_experts, d_out, self.adapters.rank(name), self.adapters.dora, name=name)
        experts: Experts = module(d_in, scales.get(name, 1.0), mask)
        return experts


class Router(nn.Module):
    """The frozen kernel of the expert logits."""

    n_experts: int

    @nn.compact
    def __call__(self, d_model: int) -> jax.Array:
        """``[d_model, experts]``."""
        kernel: jax.Array = self.param("kernel", nn.initializers.lecun_normal(), (d_model, self.n_experts))
        return kernel


def on_mesh(
    sharding: NamedSharding | None,
    x: jax.Array,
    weights: jax.Array,
    keys: jax.Array | None,
    layer: Layer,
    config: RoutedConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`routed_ffn` of every device's own tokens; left to the compiler, each device would route those of all.

    Args:
      sharding: of x; None on one device. Where it does not divide the batch, all devices do all of it.
      x, weights, keys, layer, config: as of `routed_ffn`; where ``config.stats`` has a sharding, taps have a leading
        axis ``[shards]``.

    Returns:
      As of `routed_ffn`, the statistics by shard where ``config.stats`` has a sharding.
    """
    by_shard = count(config.stats.sharding) > 1
    if sharding is None or sharding.mesh.size == 1 or x.shape[0] % count(sharding):
        y, measured = routed_ffn(x, weights, keys, _with_first_taps(layer) if by_shard else layer, config)
        return y, {name: first_alone(value, config.stats.sharding) for name, value in measured.items()}
    rows, mesh = sharding.spec[0], sharding.mesh
    axis = _AXIS if _splits(layer, mesh.shape.get(_AXIS, 1)) else None

    def local(
        x: jax.Array, weights: jax.Array, keys: jax.Array | None, layer: Layer
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        y, measured = routed_ffn(x, weights, keys, _with_first_taps(layer) if by_shard else layer, config, axis)
        return y, {name: value[None] for name, value in measured.items()}

    names = config.measured if config.measure else ()
    y, parts = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(rows), P(rows), P(rows), _specs(layer, axis, rows if by_shard else None)),
        out_specs=(P(rows), {name: P(rows, *_by_channel(name, axis)) for name in names}),
        # An axis that splits nothing is left to the compiler: mapped, it would cut cotangents into parts of a sum, and
        # statistics of them are not linear.
        axis_names={*rows, *([axis] if axis else [])},
        check_vma=False,
    )(x, weights, keys, layer)
    if by_shard:
        return y, parts
    merge = {name: jnp.max if name.startswith(statistics.CHECK) else jnp.sum for name in names}
    return y, {name: merge[name](part, axis=0) for name, part in parts.items()}


def _with_first_taps(layer: Layer) -> Layer:
    """``layer`` with the first of its taps by shard: on a device that holds those of its own shard, these."""
    return layer._replace(taps={name: tap[0] for name, tap in layer.taps.items()})


def _splits(layer: Layer, parts: int) -> bool:
    """Whether every projection's channels, as they are stored, can be cut into ``parts``."""

    def divides(kernel: Kernel, place: int) -> bool:
        sizes = [leaf.shape[place] for leaf in jax.tree.leaves(kernel)]
        if isinstance(kernel, Quantized) and kernel.kind == "int8" and place == 1:
            sizes = [kernel.codes.shape[place]]  # a scale is that of all inputs
        return all(size % parts == 0 for size in sizes)

    return parts > 1 and divides(layer.gate.kernel, 2) and divides(layer.up.kernel, 2) and divides(layer.down.kernel, 1)


def _specs(layer: Layer, axis: str | None, rows: Any) -> Any:
    """Where a device's part of the arrays lies: channels over ``axis``, taps by shard over ``rows``, else whole."""
    channels = P(None, None, axis)

    def projection(experts: Experts, kernel: P, a: P, b: P, of_outputs: P) -> Any:
        def stored(leaf: jax.Array) -> P:  # int8 has one scale for all inputs, which is not split
            return P(*(None if size == 1 else name for size, name in zip(leaf.shape, kernel, strict=True)))

        made = jax.tree.map(stored, experts.kernel)
        if experts.adapter is None:
            return Experts(made)
        places: Any = (a, b, P(), of_outputs, of_outputs, None, (a, b))
        # Where the adapter has no such array there is no place for it either.
        kept: Any = [None if leaf is None else at for at, leaf in zip(places, experts.adapter, strict=True)]
        return Experts(made, Adapter(*kept))

    places: Any = (
        P(),
        projection(layer.gate, channels, P(), channels, P(None, axis)),
        projection(layer.up, channels, P(), channels, P(None, axis)),
        projection(layer.down, P(None, axis, None), P(None, axis, None), P(), P()),
        {name: P(*([rows] if rows else []), *_by_channel(name, axis)) for name in layer.taps},
    )
    return Layer(*places)


def _by_channel(name: str, axis: str | None) -> P:
    """Where the sums of a statistic lie, ``[experts, ...]``: counts and checks have no axis of channels."""
    if name in statistics.COUNTS or name.startswith(statistics.CHECK):
        return P()
    rank = len(statistics.get(name).shape((1, 1)))
    return P(*[None] * (rank - 1), axis)
