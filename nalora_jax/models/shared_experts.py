"""Mixtures of experts with a gated block that every token passes.

    y = experts(x) + shared(x)                       GLM-4.5, DeepSeek-V3
    y = experts(x) + sigmoid(x w) * shared(x)        Qwen2-MoE, Qwen3-Next
    y = norm(dense(n(x))) + norm(experts(norm(x)))   Gemma 4; n: the layer's norm of the residual stream x

A layer has two gates: ``ffn/experts_ffn`` (channels ``[experts, d_ff]``), and ``ffn/shared_ffn`` or
``ffn/dense_ffn`` (``[width]``), each with separate adapters, masks and statistics. Both names end in
"ffn", so that the rule ``ffn/gate_proj`` matches both, and the gates of dense layers. Gemma 4's
router reads a third norm of x.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.method.ffn import GatedFFN
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.layers import RMSNorm
from nalora_jax.models.moe import MoEFFN
from nalora_jax.models.parts import FeedForward, PartOptions, Shapes, adapters_below, scales_below
from nalora_jax.models.routing import RouterSpec
from nalora_jax.ops.storage import round_and_save


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

    def gates(self, config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `FeedForward`."""
        channels = {"experts_ffn": (config.n_experts, config.d_ff), self.block: (self.width,)}
        return {name: (channels[name], config.activation) for name in sorted(channels)}

    def modules(self, config: ModelConfig, options: PartOptions, routing: RouterSpec) -> tuple[Any, Any]:
        """Returns the mixture and the gated block."""
        common: dict[str, Any] = {
            "d_model": config.d_model,
            "activation": config.activation,
            "numerics": options.numerics,
            "stats": options.stats,
        }
        experts = MoEFFN(
            d_ff=config.d_ff,
            n_experts=config.n_experts,
            top_k=config.experts_per_token,
            routing=routing,
            sharding=options.routing,
            experts=options.experts,
            adapters=adapters_below(options.adapters, "experts_ffn/"),
            name="experts_ffn",
            **common,
        )
        adapters = adapters_below(options.adapters, f"{self.block}/")
        return experts, GatedFFN(d_ff=self.width, adapters=adapters, name=self.block, **common)


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

    def param_shapes(self, config: ModelConfig) -> Shapes:
        """See `Part`."""
        shapes: Shapes = {"experts_ffn/router/kernel": (config.d_model, config.n_experts)}
        if self.router.correction:
            shapes["experts_ffn/router/correction"] = (config.n_experts,)
        if self.gated:
            shapes["shared_gate/kernel"] = (config.d_model, 1)
        return shapes | {f"{name}/kernel": shape for name, shape in self.projections(config).items()}

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """See `FeedForward`."""
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
            y = y * Gate(name="shared_gate")(x).astype(y.dtype)
        return experts(x, scales_below(scales, "experts_ffn/"), **inputs) + y


class Gate(nn.Module):
    """A frozen gate per token."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., d]`` -> float32 ``[..., 1]``, ``sigmoid(x w)``."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 1))
        frozen = lax.stop_gradient(kernel).astype(jnp.float32)
        return jax.nn.sigmoid(jnp.dot(x.astype(jnp.float32), frozen, precision=lax.Precision.HIGHEST))


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

    def param_shapes(self, config: ModelConfig) -> Shapes:
        """See `Part`."""
        shapes: Shapes = {f"{name}/scale": (config.d_model,) for name in _NORMS}
        shapes["experts_ffn/router/kernel"] = (config.d_model, config.n_experts)
        shapes["experts_ffn/router/scale"] = (config.n_experts,)
        return shapes | {f"{name}/kernel": shape for name, shape in self.projections(config).items()}

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """See `FeedForward`."""
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
        experts, dense = self.part.modules(c, options, RouterSpec(expert_scale=True))
        stream = round_and_save(stream, options.numerics)
        routed_by = self._norm("router_norm", stream, "float32") * c.d_model**-0.5
        of_dense = dense(x, scales_below(scales, "dense_ffn/"), **inputs)
        normed = self._norm("experts_norm", stream)
        of_experts = experts(normed, scales_below(scales, "experts_ffn/"), routed_by=routed_by, **inputs)
        return self._norm("dense_norm", of_dense) + self._norm("experts_post_norm", of_experts)

    def _norm(self, name: str, x: jax.Array, dtype: str | None = None) -> jax.Array:
        c = self.config
        return RMSNorm(c.norm_eps, c.norm_offset, dtype or self.options.numerics.result, name=name)(x)
