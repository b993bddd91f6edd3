"""A mixture of experts with a shared expert: a gated block that every token passes.

    y = experts(x) + shared(x)                       GLM-4.5, DeepSeek-V3
    y = experts(x) + sigmoid(x w) * shared(x)        Qwen2-MoE, Qwen3-Next

A layer has two gates, ``ffn/experts_ffn`` (channels ``[experts, d_ff]``) and ``ffn/shared_ffn``
(``[d_shared]``), each with separate adapters, masks and statistics. Both names end in "ffn", so that
the rule ``ffn/gate_proj`` matches both, and the gates of dense layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nalora_jax.method.ffn import GatedFFN
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.moe import MoEFFN
from nalora_jax.models.parts import FeedForward, PartOptions, Shapes, adapters_below, scales_below
from nalora_jax.models.router import RouterSpec

_EXPERTS, _SHARED = "experts_ffn/", "shared_ffn/"


@dataclass(frozen=True)
class SharedExperts(FeedForward):
    """Sizes of the part; number and width of the experts are fields of the config."""

    d_shared: int
    router: RouterSpec
    gated: bool = False  # sigmoid(x w) multiplies the shared expert's output
    name: ClassVar[str] = "ffn"

    def param_shapes(self, config: ModelConfig) -> Shapes:
        """See `Part`."""
        shapes: Shapes = {"experts_ffn/router/kernel": (config.d_model, config.n_experts)}
        if self.router.correction:
            shapes["experts_ffn/router/correction"] = (config.n_experts,)
        if self.gated:
            shapes["shared_gate/kernel"] = (config.d_model, 1)
        return shapes | {f"{name}/kernel": shape for name, shape in self.projections(config).items()}

    def projections(self, config: ModelConfig) -> Shapes:
        """See `Part`."""
        experts = {
            _EXPERTS + name: (config.n_experts, *s)
            for name, s in _gated(config.d_model, config.d_ff).items()
        }
        return experts | {_SHARED + name: s for name, s in _gated(config.d_model, self.d_shared).items()}

    def flops(self, config: ModelConfig, seq: int) -> float:
        """Returns 0: routers are counted with the weights."""
        return 0.0

    def saved(self, config: ModelConfig) -> float:
        """See `Part`."""
        return 2.0 * (config.experts_per_token * config.d_ff + self.d_shared)

    def gates(self, config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `FeedForward`."""
        experts = (config.n_experts, config.d_ff)
        return {
            "experts_ffn": (experts, config.activation),
            "shared_ffn": ((self.d_shared,), config.activation),
        }

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """See `FeedForward`."""
        return SharedExpertsFFN(config, self, options, name=self.name)


def _gated(d_model: int, d_ff: int) -> Shapes:
    return {"gate_proj": (d_model, d_ff), "up_proj": (d_model, d_ff), "down_proj": (d_ff, d_model)}


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
        c, numerics = self.config, self.options.numerics
        common = {
            "d_model": c.d_model,
            "activation": c.activation,
            "numerics": numerics,
            "stats": self.options.stats,
        }
        experts = MoEFFN(
            d_ff=c.d_ff,
            n_experts=c.n_experts,
            top_k=c.experts_per_token,
            routing=self.part.router,
            sharding=self.options.routing,
            experts=self.options.experts,
            adapters=adapters_below(self.options.adapters, _EXPERTS),
            name="experts_ffn",
            **common,
        )
        shared_adapters = adapters_below(self.options.adapters, _SHARED)
        shared = GatedFFN(d_ff=self.part.d_shared, adapters=shared_adapters, name="shared_ffn", **common)
        y = shared(x, scales_below(scales, _SHARED), **inputs)
        if self.part.gated:
            y = y * Gate(name="shared_gate")(x).astype(y.dtype)
        return experts(x, scales_below(scales, _EXPERTS), **inputs) + y


class Gate(nn.Module):
    """A frozen gate per token."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., d]`` -> float32 ``[..., 1]``, ``sigmoid(x w)``."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 1))
        frozen = lax.stop_gradient(kernel).astype(jnp.float32)
        return jax.nn.sigmoid(jnp.dot(x.astype(jnp.float32), frozen, precision=lax.Precision.HIGHEST))
