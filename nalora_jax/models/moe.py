"""Mixtures of gated experts as parts of a layer: router, top-k, gated FFNs and blocks that every token passes.

    y = experts(x)                                   Mixtral, OLMoE, Qwen3-MoE, gpt-oss, LFM2-MoE
    y = experts(x) + shared(x)                       GLM-4.5, DeepSeek-V3
    y = experts(x) + sigmoid(x w) * shared(x)        Qwen2-MoE, Qwen3-Next
    y = norm(dense(n(x))) + norm(experts(norm(x)))   Gemma 4; n: the layer's norm of the residual stream x

On a mesh every device routes its own tokens, in training and in evaluation. The axis "tensor"
splits the channels of every expert, so that all devices have the same work for any routing. "fsdp"
splits the experts: they are gathered for the layer, or rows are sent to them, whichever moves fewer
bytes. The arithmetic is in `nalora_jax.models.experts`.

A layer of experts with another block has two gates: ``ffn/experts_ffn`` (channels ``[experts, d_ff]``),
and ``ffn/shared_ffn`` or ``ffn/dense_ffn`` (``[width]``), each with separate adapters, masks and
statistics. Both names end in "ffn", so that the rule ``ffn/gate_proj`` matches both, and the gates of
dense layers. Gemma 4's router reads a third norm of x.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.method import statistics
from nalora_jax.method.ffn import Adapters, GatedFFN, LoRADense
from nalora_jax.method.low_rank import Adapter, Dense
from nalora_jax.method.measurement import GateStatsConfig, SampledWeights
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.experts import (
    Experts,
    Layer,
    RoutedConfig,
    all_experts,
    exchanged_ffn,
    exchanges_less,
    of_each,
    routed_ffn,
)
from nalora_jax.models.parts import (
    FeedForward,
    Gates,
    PartOptions,
    RMSNorm,
    Shapes,
    adapters_below,
    scales_below,
)
from nalora_jax.models.routing import RouterSpec
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.quantize import Quantized
from nalora_jax.ops.reductions import count, first_alone
from nalora_jax.ops.storage import Kernel, in_stored_layout, round_and_save

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
        return self.param(name, init, (self.n_experts,))


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
        split = replace(config, axis=axis)
        if over and sends:
            y, measured = exchanged_ffn(x, weights, layer, split, over, routed_by)
        else:
            layer = all_experts(layer, over) if over else layer
            y, measured = routed_ffn(x, weights, keys, layer, split, routed_by)
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


# ---------------------------------------------------------------- parts of a layer


def _router(config: ModelConfig, spec: RouterSpec, prefix: str = "") -> Shapes:
    """Returns the shapes of a router's arrays."""
    shapes: Shapes = {f"{prefix}router/kernel": (config.d_model, config.n_experts)}
    optional = {"bias": config.router_bias, "correction": spec.correction, "scale": spec.expert_scale}
    of_experts: Shapes = {
        f"{prefix}router/{name}": (config.n_experts,) for name in optional if optional[name]
    }
    return shapes | of_experts


def _mixture(
    config: ModelConfig, options: PartOptions, router: RouterSpec, adapters: Adapters, name: str
) -> MoEFFN:
    """Returns the module of the experts that the config describes."""
    return MoEFFN(
        config.d_model,
        config.d_ff,
        config.n_experts,
        config.experts_per_token,
        router,
        config.activation,
        adapters,
        use_bias=config.ffn_bias,
        numerics=options.numerics,
        stats=options.stats,
        router_bias=config.router_bias,
        up_limit=config.up_limit,
        sharding=options.routing,
        experts=options.experts,
        name=name,
    )


@dataclass(frozen=True)
class Mixture(FeedForward):
    """A mixture of experts; number, width and biases of the experts are fields of the config."""

    router: RouterSpec
    name: ClassVar[str] = "ffn"

    def arrays(self, config: ModelConfig) -> Shapes:
        """Returns the router."""
        return _router(config, self.router)

    def has_bias(self, config: ModelConfig, name: str) -> bool:
        """See `Part`."""
        return config.ffn_bias

    def projections(self, config: ModelConfig) -> Shapes:
        """See `Part`."""
        n, d, f = config.n_experts, config.d_model, config.d_ff
        return {"gate_proj": (n, d, f), "up_proj": (n, d, f), "down_proj": (n, f, d)}

    def saved(self, config: ModelConfig) -> float:
        """See `Part`."""
        return 2.0 * config.experts_per_token * config.d_ff

    def gates(self, config: ModelConfig) -> Gates:
        """See `Part`."""
        return {"": ((config.n_experts, config.d_ff), config.activation)}

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """See `Part`."""
        return _mixture(config, options, self.router, options.adapters, self.name)


class WithExperts(FeedForward):
    """A mixture of experts, ``experts_ffn``, with a gated block that every token passes.

    Number and width of the experts are fields of the config.
    """

    name: ClassVar[str] = "ffn"
    block: ClassVar[str]  # name of the gated block

    @property
    @abstractmethod
    def width(self) -> int:
        """The channels of the gated block."""

    def projections(self, config: ModelConfig) -> Shapes:
        """See `Part`."""
        d, experts = config.d_model, _gated(config.d_model, config.d_ff)
        shapes: Shapes = {f"experts_ffn/{name}": (config.n_experts, *s) for name, s in experts.items()}
        return shapes | {f"{self.block}/{name}": s for name, s in _gated(d, self.width).items()}

    def saved(self, config: ModelConfig) -> float:
        """See `Part`."""
        return 2.0 * (config.experts_per_token * config.d_ff + self.width)

    def gates(self, config: ModelConfig) -> Gates:
        """See `Part`."""
        channels = {"experts_ffn": (config.n_experts, config.d_ff), self.block: (self.width,)}
        return {name: (channels[name], config.activation) for name in sorted(channels)}

    def modules(self, config: ModelConfig, options: PartOptions, routing: RouterSpec) -> tuple[Any, Any]:
        """Returns the mixture and the gated block."""
        of_experts, of_block = (
            adapters_below(options.adapters, f"{name}/") for name in ("experts_ffn", self.block)
        )
        return _mixture(config, options, routing, of_experts, "experts_ffn"), GatedFFN(
            config.d_model,
            self.width,
            config.activation,
            of_block,
            numerics=options.numerics,
            stats=options.stats,
            name=self.block,
        )


def _gated(d_model: int, d_ff: int) -> Shapes:
    return {"gate_proj": (d_model, d_ff), "up_proj": (d_model, d_ff), "down_proj": (d_ff, d_model)}


@dataclass(frozen=True)
class SharedExperts(WithExperts):
    """Sizes of the part."""

    d_shared: int
    router: RouterSpec
    gated: bool = False  # sigmoid(x w) multiplies the shared expert's output
    block: ClassVar[str] = "shared_ffn"

    @property
    def width(self) -> int:
        """The channels of the shared expert."""
        return self.d_shared

    def arrays(self, config: ModelConfig) -> Shapes:
        """Returns the router, and the gate of the shared expert."""
        shapes = _router(config, self.router, "experts_ffn/")
        if self.gated:
            shapes["shared_gate/kernel"] = (config.d_model, 1)
        return shapes

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """See `Part`."""
        return SharedExpertsFFN(config, self, options, name=self.name)


class SharedExpertsFFN(nn.Module):
    """The mixture and the shared expert, with the call signature of `GatedFFN`."""

    config: ModelConfig
    part: SharedExperts
    options: PartOptions

    @nn.compact
    def __call__(
        self, x: jax.Array, scales: Mapping[str, jax.Array | float] | None = None, **inputs: Any
    ) -> jax.Array:
        """Returns ``[batch, seq, d_model]`` as ``x``; for ``inputs`` see `GatedFFN`."""
        experts, shared = self.part.modules(self.config, self.options, self.part.router)
        y = shared(x, scales_below(scales, "shared_ffn/"), **inputs)
        if self.part.gated:
            y = y * TokenGate(name="shared_gate")(x).astype(y.dtype)
        return experts(x, scales_below(scales, "experts_ffn/"), **inputs) + y


class TokenGate(nn.Module):
    """A frozen gate per token."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., d]`` -> float32 ``[..., 1]``, ``sigmoid(x w)``."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 1))
        frozen = lax.stop_gradient(kernel).astype(jnp.float32)
        return jax.nn.sigmoid(jnp.dot(x.astype(jnp.float32), frozen, precision=lax.Precision.HIGHEST))


_SCALED = RouterSpec(expert_scale=True)
_NORMS = ("dense_norm", "experts_norm", "experts_post_norm", "router_norm")


@dataclass(frozen=True)
class DenseAndExperts(WithExperts):
    """Sizes of the part."""

    d_dense: int
    block: ClassVar[str] = "dense_ffn"
    reads_stream: ClassVar[bool] = True

    @property
    def width(self) -> int:
        """The channels of the dense block."""
        return self.d_dense

    def arrays(self, config: ModelConfig) -> Shapes:
        """Returns the scales of norms, and the router."""
        shapes: Shapes = {f"{name}/scale": (config.d_model,) for name in _NORMS}
        return shapes | _router(config, _SCALED, "experts_ffn/")

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """See `Part`."""
        return DenseAndExpertsFFN(config, self, options, name=self.name)


class DenseAndExpertsFFN(nn.Module):
    """Both branches, with the call signature of `GatedFFN` and the residual stream."""

    config: ModelConfig
    part: DenseAndExperts
    options: PartOptions

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scales: Mapping[str, jax.Array | float] | None = None,
        *,
        stream: jax.Array,
        **inputs: Any,
    ) -> jax.Array:
        """Returns ``[batch, seq, d_model]`` of ``x``, the layer's norm of ``stream``."""
        c, options = self.config, self.options
        experts, dense = self.part.modules(c, options, _SCALED)
        stream = round_and_save(stream, options.numerics)
        routed_by = self._norm("router_norm", stream, "float32") * c.d_model**-0.5
        of_dense = dense(x, scales_below(scales, "dense_ffn/"), **inputs)
        normed = self._norm("experts_norm", stream)
        of_experts = experts(normed, scales_below(scales, "experts_ffn/"), routed_by=routed_by, **inputs)
        return self._norm("dense_norm", of_dense) + self._norm("experts_post_norm", of_experts)

    def _norm(self, name: str, x: jax.Array, dtype: str | None = None) -> jax.Array:
        c = self.config
        return RMSNorm(c.norm_eps, c.norm_offset, dtype or self.options.numerics.result, name=name)(x)
