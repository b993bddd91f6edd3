"""Mixtures of gated experts as parts of a layer: router, top-k, gated FFNs and blocks that every
token passes.

    y = experts(x)                                   Mixtral, OLMoE, Qwen3-MoE, gpt-oss, LFM2-MoE
    y = experts(x) + shared(x)                       GLM-4.5, DeepSeek-V3
    y = experts(x) + sigmoid(x w) * shared(x)        Qwen2-MoE, Qwen3-Next
    y = norm(dense(n(x))) + norm(experts(norm(x)))   Gemma 4; n: the norm of the stream x

On a mesh every device routes its own tokens, in training and in evaluation. The axis "tensor"
splits the channels of every expert, so that all devices have the same work for any routing. "fsdp"
splits the experts: they are gathered for the layer, or rows are sent to them, whichever moves fewer
bytes. The arithmetic is in `nalora_jax.models.experts`.

A layer of experts with another block has two gates: ``ffn/experts_ffn`` (channels ``[experts,
d_ff]``), and ``ffn/shared_ffn`` or ``ffn/dense_ffn`` (``[width]``), each with separate adapters,
masks and statistics. Both names end in "ffn", so that the rule ``ffn/gate_proj`` matches both, and
the gates of dense layers. Gemma 4's router reads a third norm of x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common.devices import FSDP, TENSOR
from nalora_jax.method import statistics
from nalora_jax.method.measurement import SampledWeights
from nalora_jax.models.blocks import GatedBlock
from nalora_jax.models.config import FeedForward, Gates, ModelConfig, ParamShapes
from nalora_jax.models.experts import (
    ExpertProjection,
    Layer,
    RoutedConfig,
    exchanges_less,
    map_projections,
    routed_ffn,
)
from nalora_jax.models.parts import PartOptions, RMSNorm, adapters_below, scales_below
from nalora_jax.models.replay import ROUTING
from nalora_jax.models.routing import RouterSpec
from nalora_jax.ops.quantize import Coded
from nalora_jax.ops.reductions import count, first_alone
from nalora_jax.ops.shardings import RowSharding
from nalora_jax.ops.storage import Kernel, restore_layout, round_and_save


class MoEFFN(nn.Module):
    """A top-k mixture of gated FFNs with the call signature of `GatedFFN`."""

    config: ModelConfig  # uniform, of the layer's stack
    routing: RouterSpec
    options: PartOptions

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scales: Mapping[str, jax.Array | float] | None = None,
        *,
        token_weights: jax.Array | SampledWeights | None = None,
        deterministic: bool = True,
        routed_by: jax.Array | None = None,
        replayed: jax.Array | None = None,
    ) -> jax.Array:
        """Returns ``[batch, seq, d_model]`` as ``x``.

        ``routed_by`` is the input of the router, ``x`` by default, and ``replayed`` int ``[batch,
        seq, top_k]`` are experts in place of its choice. The experts of every token are written to
        the collection `ROUTING`, if a caller asks for it (``mutable``).
        """
        c = self.config
        options = self.options
        keys = None
        taps = {}  # zeros whose gradients are the statistics; none at initialization
        if not self.is_initializing():
            taps = self.variables.get("gate_taps", {})
        router = Router(c.n_experts, c.router_bias, self.routing, name="router")
        kernel, bias, *of_experts = router(c.d_model)
        mask = self.get_variable("gate_mask", "mask")
        layer = Layer(
            kernel,
            bias,
            self._experts("gate_proj", c.d_model, c.d_ff, scales, mask),
            self._experts("up_proj", c.d_model, c.d_ff, scales),
            self._experts("down_proj", c.d_ff, c.d_model, scales),
            {name: taps[name] for name in statistics.cotangent(taps)},
            *of_experts,
        )
        length = x.shape[1]
        split_length = 0  # tokens of a whole row, if the mesh splits rows; otherwise 0
        if isinstance(token_weights, SampledWeights):
            length = split_length = token_weights.length
            token_weights = token_weights.every
        config = RoutedConfig(
            c,
            self.routing,
            options.numerics,
            options.stats.of_rows(length),
            names=statistics.forward(taps),
            dropout=options.adapters.dropout,
            split_length=split_length,
            records=self.is_mutable_collection(ROUTING) and not self.is_initializing(),
        )
        weights = jnp.ones(x.shape[:2], jnp.float32)
        if token_weights is not None:
            weights = jnp.broadcast_to(token_weights, x.shape[:2])
        # One key per sequence: the mask does not depend on the mesh.
        if config.dropout > 0 and not deterministic:
            keys = jax.random.split(self.make_rng("dropout"), x.shape[0])
        y, measured, chosen = route_on_mesh(
            options.shardings.routed,
            x,
            weights,
            keys,
            layer,
            config,
            routed_by,
            replayed,
            experts=options.experts,
        )
        if chosen is not None:
            self.sow(ROUTING, "chosen", chosen, reduce_fn=lambda _, newest: newest)
        if not measured:
            return y
        return statistics.emit_measured(y, taps, measured)

    def _experts(
        self,
        name: str,
        d_in: int,
        d_out: int,
        scales: Mapping[str, Any] | None,
        mask: jax.Array | None = None,
    ) -> ExpertProjection:
        """Returns the arrays of one projection of all experts, with its adapter if it has one."""
        c = self.config
        adapters = self.options.adapters
        dense = adapters.dense(
            name, d_in, d_out, scales, bias=c.ffn_bias, experts=c.n_experts, mask=mask
        )
        adapter = dense.adapter
        if adapter is not None:
            adapter = adapter._replace(scale=jnp.asarray(adapter.scale, jnp.float32))
        return ExpertProjection(dense.kernel, adapter, dense.bias)


class Router(nn.Module):
    """The frozen arrays of a router."""

    n_experts: int
    use_bias: bool = False
    spec: RouterSpec = RouterSpec()

    @nn.compact
    def __call__(self, d_model: int) -> tuple[jax.Array, *tuple[jax.Array | None, ...]]:
        """Returns the kernel ``[d_model, experts]``; bias, correction and scale ``[experts]`` or
        None."""
        kernel: jax.Array = self.param(
            "kernel", nn.initializers.lecun_normal(), (d_model, self.n_experts)
        )
        zeros = nn.initializers.zeros_init()
        ones = nn.initializers.ones_init()
        optional = (
            ("bias", zeros, self.use_bias),
            ("correction", zeros, self.spec.correction),
            ("scale", ones, self.spec.expert_scale),
        )
        of_experts = (
            self.param(name, init, (self.n_experts,)) if exists else None
            for name, init, exists in optional
        )
        return (kernel, *of_experts)


def route_on_mesh(
    sharding: RowSharding,
    x: jax.Array,
    weights: jax.Array,
    keys: jax.Array | None,
    layer: Layer,
    config: RoutedConfig,
    routed_by: jax.Array | None = None,
    replayed: jax.Array | None = None,
    *,
    experts: str = "auto",
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array | None]:
    """Runs `routed_ffn` on every device's own tokens.

    Without the mapping the compiler makes each device route the tokens of all devices.

    Args:
      sharding: of x; None on one device. If it does not divide the batch, every device computes all
        of it.
      x, keys, layer, config, routed_by, replayed: as for `routed_ffn`; if ``config.stats`` has a
        sharding, taps have a leading axis ``[shards]``.
      weights: ``token_weights`` of `routed_ffn`.
      experts: how rows meet the experts of other devices (`nalora_jax.config.ComputeConfig`); with
        dropout, experts are gathered.

    Returns:
      As `routed_ffn`; the statistics are by shard if ``config.stats`` has a sharding.
    """
    by_shard = count(config.stats.sharding) > 1
    if sharding is None or sharding.mesh.size == 1 or x.shape[0] % count(sharding):
        alone = _of_shard(layer, config)
        y, measured, chosen = routed_ffn(
            x, weights, keys, alone, config, routed_by, replayed
        )
        by_name = {
            name: first_alone(value, config.stats.sharding)
            for name, value in measured.items()
        }
        return y, by_name, chosen
    rows = sharding.spec[0]
    mesh = sharding.mesh
    axis = None
    if _splits(layer, mesh.shape.get(TENSOR, 1)):
        axis = TENSOR
    devices = mesh.shape.get(FSDP, 1)  # that hold the same number of experts each
    shares = devices > 1 and layer.gate.kernel.shape[0] % devices == 0 and FSDP in rows
    over = None
    if shares:
        over = FSDP
    sends = shares and keys is None and _sends(sharding, x, layer, config, experts)

    def local(
        x: jax.Array,
        weights: jax.Array,
        keys: jax.Array | None,
        layer: Layer,
        routed_by: jax.Array | None,
        replayed: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, jax.Array], jax.Array | None]:
        """Computes `routed_ffn` of a device's rows; statistics get a leading axis of length 1."""
        x = restore_layout(x, config.numerics)
        layer = _of_shard(layer, config)
        split = replace(config, axis=axis)
        y, measured, chosen = routed_ffn(
            x, weights, keys, layer, split, routed_by, replayed, over=over, sends=sends
        )
        by_name = {name: value[None] for name, value in measured.items()}
        return restore_layout(y, config.numerics), by_name, chosen

    names = config.measured
    taps: tuple[Any, ...] = ()
    if by_shard:
        taps = (rows,)
    y, parts, chosen = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            P(rows),
            P(rows),
            P(rows),
            _specs(layer, axis, taps, over),
            P(rows),
            P(rows),
        ),
        out_specs=(
            P(rows),
            {name: P(rows, *_by_channel(name, axis)) for name in names},
            P(rows),
        ),
        # An axis that splits no array is left to the compiler: mapping it would split cotangents
        # into partial sums, and their statistics are not linear.
        axis_names={*rows, axis} - {None},
        check_vma=False,
    )(x, weights, keys, layer, routed_by, replayed)
    if by_shard:
        return y, parts, chosen
    merge = {
        name: jnp.max if name.startswith(statistics.CHECK) else jnp.sum
        for name in names
    }
    merged = {name: merge[name](arrays, axis=0) for name, arrays in parts.items()}
    return y, merged, chosen


def _sends(
    sharding: NamedSharding,
    x: jax.Array,
    layer: Layer,
    config: RoutedConfig,
    experts: str,
) -> bool:
    """Returns True if rows are sent to experts, False if experts are gathered."""
    if experts != "auto":
        return experts == "send"
    rows = x.shape[0] // count(sharding) * x.shape[1] * config.top_k
    kernels = jax.tree.leaves([e.kernel for e in (layer.gate, layer.up, layer.down)])
    size = sum(leaf.nbytes for leaf in kernels) / sharding.mesh.shape.get(TENSOR, 1)
    return exchanges_less(
        rows, x.shape[-1], size, x.dtype.itemsize, sharding.mesh.shape[FSDP]
    )


def _of_shard(layer: Layer, config: RoutedConfig) -> Layer:
    """Returns ``layer`` with one shard's taps and with kernels in the layout of their stack."""

    def stored(experts: ExpertProjection) -> ExpertProjection:
        """Returns a projection whose kernel has the layout of the stack it was sliced from."""
        kernel = jax.tree.map(
            lambda x: restore_layout(x, config.numerics), experts.kernel
        )
        return experts._replace(kernel=kernel)

    taps = layer.taps
    if count(config.stats.sharding) > 1:  # on a device these are the first
        taps = {name: tap[0] for name, tap in taps.items()}
    return map_projections(layer._replace(taps=taps), stored)


def _splits(layer: Layer, parts: int) -> bool:
    """Returns True if the channels of every projection, as stored, can be split into ``parts``."""

    def divides(kernel: Kernel, place: int) -> bool:
        """Returns True if ``parts`` divides axis ``place`` of a stored kernel."""
        if isinstance(kernel, Coded):
            return kernel.splits(place, parts)
        return kernel.shape[place] % parts == 0

    places = (layer.gate, 2), (layer.up, 2), (layer.down, 1)
    return parts > 1 and all(
        divides(experts.kernel, place) for experts, place in places
    )


def _specs(
    layer: Layer, axis: str | None, taps: tuple[Any, ...], over: str | None
) -> Any:
    """Returns the partition specs of a layer's arrays.

    Channels are split over ``axis``, experts over ``over`` and taps by shard over ``taps``; all
    other axes are replicated.
    """

    def spec(path: tuple[Any, ...], leaf: jax.Array) -> P:
        """Returns the partition spec of the array at ``path``."""
        name, *inner = (getattr(key, "name", getattr(key, "key", None)) for key in path)
        if name == "taps":
            return P(*taps, *_by_channel(path[1].key, axis))
        if name not in ("gate", "up", "down") or leaf.ndim == 0:
            return P()
        # The paths are (projection, "kernel"), (projection, "adapter", "a") and the like.
        array = inner[-1] if inner[0] == "adapter" else inner[0]
        if array is None:  # of the pair `Adapter.start`
            array = ("a", "b")[path[-1].idx]
        names: list[str | None] = [over, *[None] * (leaf.ndim - 1)]
        if name == "down" and array in ("kernel", "a"):
            names[1] = axis
        # The last axis of all arrays but A is the outputs.
        elif name != "down" and array != "a":
            names[-1] = axis
        # Scales for all inputs or all outputs are not split.
        return P(
            *(
                None if size == 1 else name
                for size, name in zip(leaf.shape, names, strict=True)
            )
        )

    return jax.tree_util.tree_map_with_path(spec, layer)


def _by_channel(name: str, axis: str | None) -> P:
    """Returns the spec of a statistic ``[experts, ...]``; counts and checks have no channels."""
    if name in statistics.COUNTS or name.startswith(statistics.CHECK):
        return P()
    rank = len(statistics.get_statistic(name).shape((1, 1)))
    return P(*[None] * (rank - 1), axis)


# ---------------------------------------------------------------- parts of a layer


@dataclass(frozen=True)
class Mixture(FeedForward):
    """A mixture of experts; number, width and biases of the experts are fields of the config."""

    router: RouterSpec
    name: ClassVar[str] = "ffn"

    def arrays(self, config: ModelConfig) -> ParamShapes:
        """Returns the router."""
        shapes: ParamShapes = {"router/kernel": (config.d_model, config.n_experts)}
        optional = {
            "bias": config.router_bias,
            "correction": self.router.correction,
            "scale": self.router.expert_scale,
        }
        return shapes | {
            f"router/{name}": (config.n_experts,) for name in optional if optional[name]
        }

    def projections(self, config: ModelConfig) -> ParamShapes:
        """See `Part`."""
        n = config.n_experts
        d = config.d_model
        f = config.d_ff
        return {"gate_proj": (n, d, f), "up_proj": (n, d, f), "down_proj": (n, f, d)}

    def saved(self, config: ModelConfig) -> float:
        """See `Part`."""
        return 2.0 * config.experts_per_token * config.d_ff

    def gates(self, config: ModelConfig) -> Gates:
        """See `Part`."""
        return {"": ((config.n_experts, config.d_ff), config.activation)}

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """See `Part`."""
        return MoEFFN(config, self.router, options, name=options.part)


@dataclass(frozen=True)
class WithExperts(FeedForward):
    """A mixture of experts, ``experts_ffn``, with a gated block that every token passes.

    Number and width of the experts are fields of the config.
    """

    width: int  # of the gated block
    router: RouterSpec
    name: ClassVar[str] = "ffn"
    block: ClassVar[str]  # name of the gated block
    kind: ClassVar[Any]  # of the module

    def branches(
        self, config: ModelConfig
    ) -> dict[str, tuple[FeedForward, ModelConfig]]:
        """Returns both blocks with their configs, by name."""
        return {
            "experts_ffn": (Mixture(self.router), config),
            self.block: (GatedBlock(), replace(config, d_ff=self.width)),
        }

    def arrays(self, config: ModelConfig) -> ParamShapes:
        """Returns the router."""
        arrays = Mixture(self.router).arrays(config)
        return {f"experts_ffn/{name}": shape for name, shape in arrays.items()}

    def projections(self, config: ModelConfig) -> ParamShapes:
        """See `Part`."""
        return {
            f"{name}/{projection}": shape
            for name, (part, of_part) in self.branches(config).items()
            for projection, shape in part.projections(of_part).items()
        }

    def saved(self, config: ModelConfig) -> float:
        """See `Part`."""
        return sum(
            part.saved(of_part) for part, of_part in self.branches(config).values()
        )

    def gates(self, config: ModelConfig) -> Gates:
        """See `Part`."""
        branches = sorted(self.branches(config).items())
        return {name: part.gates(of_part)[""] for name, (part, of_part) in branches}

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """See `Part`."""
        return self.kind(config, self, options, name=self.name)


class _WithExpertsFFN(nn.Module):
    """The mixture and the gated block, with the call signature of `GatedFFN`."""

    config: ModelConfig
    part: WithExperts
    options: PartOptions

    def _branches(
        self, scales: Mapping[str, Any] | None
    ) -> list[Callable[..., jax.Array]]:
        """Returns the mixture and the gated block as functions of their input."""
        calls: list[Callable[..., jax.Array]] = []
        for name, (part, of_part) in self.part.branches(self.config).items():
            adapters = adapters_below(self.options.adapters, f"{name}/")
            module: Any = part.module(
                of_part, replace(self.options, part=name, adapters=adapters)
            )
            calls.append(partial(module, scales=scales_below(scales, f"{name}/")))
        return calls


class SharedExpertsFFN(_WithExpertsFFN):
    """The mixture and the shared expert."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scales: Mapping[str, jax.Array | float] | None = None,
        *,
        replayed: jax.Array | None = None,
        **inputs: Any,
    ) -> jax.Array:
        """Returns ``[batch, seq, d_model]`` as ``x``; for ``replayed`` see `MoEFFN`, for
        ``inputs`` `GatedFFN`."""
        experts, shared = self._branches(scales)
        y = shared(x, **inputs)
        assert isinstance(self.part, SharedExperts)
        if self.part.gated:
            y = y * TokenGate(name="shared_gate")(x).astype(y.dtype)
        return experts(x, replayed=replayed, **inputs) + y


@dataclass(frozen=True)
class SharedExperts(WithExperts):
    """Experts and one or several shared experts, which are one gated block."""

    gated: bool = False  # sigmoid(x w) multiplies the shared expert's output
    block: ClassVar[str] = "shared_ffn"
    kind: ClassVar[Any] = SharedExpertsFFN

    def arrays(self, config: ModelConfig) -> ParamShapes:
        """Returns the router, and the gate of the shared expert."""
        if self.gated:
            gate: ParamShapes = {"shared_gate/kernel": (config.d_model, 1)}
        else:
            gate = {}
        return super().arrays(config) | gate


class TokenGate(nn.Module):
    """A frozen gate per token."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., d]`` -> float32 ``[..., 1]``, ``sigmoid(x w)``."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 1))
        frozen = lax.stop_gradient(kernel).astype(jnp.float32)
        return jax.nn.sigmoid(
            jnp.dot(x.astype(jnp.float32), frozen, precision=lax.Precision.HIGHEST)
        )


class DenseAndExpertsFFN(_WithExpertsFFN):
    """Both branches with their norms; the module also gets the residual stream."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scales: Mapping[str, jax.Array | float] | None = None,
        *,
        stream: jax.Array,
        replayed: jax.Array | None = None,
        **inputs: Any,
    ) -> jax.Array:
        """Returns ``[batch, seq, d_model]`` of ``x``, the layer's norm of ``stream``."""
        experts, dense = self._branches(scales)
        stream = round_and_save(stream, self.options.numerics)
        routed_by = (
            self._norm("router_norm", stream, "float32") * self.config.d_model**-0.5
        )
        of_dense = dense(x, **inputs)
        of_experts = experts(
            self._norm("experts_norm", stream),
            routed_by=routed_by,
            replayed=replayed,
            **inputs,
        )
        return self._norm("dense_norm", of_dense) + self._norm(
            "experts_post_norm", of_experts
        )

    def _norm(self, name: str, x: jax.Array, dtype: str | None = None) -> jax.Array:
        """Returns the norm ``name`` of ``x [..., d_model]``, by default in the result's dtype."""
        c = self.config
        return RMSNorm(
            c.norm_eps, c.norm_offset, dtype or self.options.numerics.result, name=name
        )(x)


_SCALED = RouterSpec(expert_scale=True)


@dataclass(frozen=True)
class DenseAndExperts(WithExperts):
    """Experts and a dense block with separate norms, whose outputs are added."""

    router: RouterSpec = _SCALED
    block: ClassVar[str] = "dense_ffn"
    kind: ClassVar[Any] = DenseAndExpertsFFN
    reads_stream: ClassVar[bool] = True

    def arrays(self, config: ModelConfig) -> ParamShapes:
        """Returns the scales of norms, and the router."""
        names = ("dense_norm", "experts_norm", "experts_post_norm", "router_norm")
        shapes: ParamShapes = {f"{name}/scale": (config.d_model,) for name in names}
        return shapes | super().arrays(config)
