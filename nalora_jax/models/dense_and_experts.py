"""A gated block and a mixture of experts whose normalized outputs are added (Gemma 4).

    y = norm(dense(n(x))) + norm(experts(norm(x)))        n: the layer's norm of the residual stream x

The router reads a third norm of x. A layer has two gates, ``ffn/dense_ffn`` and ``ffn/experts_ffn``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax

from nalora_jax.method.ffn import GatedFFN
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.layers import RMSNorm
from nalora_jax.models.moe import MoEFFN
from nalora_jax.models.parts import FeedForward, PartOptions, Shapes, adapters_below, scales_below
from nalora_jax.models.router import RouterSpec
from nalora_jax.ops.storage import round_and_save

_DENSE, _EXPERTS = "dense_ffn/", "experts_ffn/"
_NORMS = ("dense_norm", "experts_norm", "experts_post_norm", "router_norm")


@dataclass(frozen=True)
class DenseAndExperts(FeedForward):
    """Sizes of the part; number and width of the experts are fields of the config."""

    d_dense: int
    name: ClassVar[str] = "ffn"
    reads_stream: ClassVar[bool] = True

    def param_shapes(self, config: ModelConfig) -> Shapes:
        """See `Part`."""
        shapes: Shapes = {f"{name}/scale": (config.d_model,) for name in _NORMS}
        shapes["experts_ffn/router/kernel"] = (config.d_model, config.n_experts)
        shapes["experts_ffn/router/scale"] = (config.n_experts,)
        return shapes | {f"{name}/kernel": shape for name, shape in self.projections(config).items()}

    def projections(self, config: ModelConfig) -> Shapes:
        """See `Part`."""
        experts = {
            _EXPERTS + name: (config.n_experts, *s)
            for name, s in _gated(config.d_model, config.d_ff).items()
        }
        return experts | {_DENSE + name: s for name, s in _gated(config.d_model, self.d_dense).items()}

    def flops(self, config: ModelConfig, seq: int) -> float:
        """Returns 0: routers are counted with the weights."""
        return 0.0

    def saved(self, config: ModelConfig) -> float:
        """See `Part`."""
        return 2.0 * (config.experts_per_token * config.d_ff + self.d_dense)

    def gates(self, config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `FeedForward`."""
        experts = (config.n_experts, config.d_ff)
        return {
            "dense_ffn": ((self.d_dense,), config.activation),
            "experts_ffn": (experts, config.activation),
        }

    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """See `FeedForward`."""
        return DenseAndExpertsFFN(config, self, options, name=self.name)


def _gated(d_model: int, d_ff: int) -> Shapes:
    return {"gate_proj": (d_model, d_ff), "up_proj": (d_model, d_ff), "down_proj": (d_ff, d_model)}


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
        common = {
            "d_model": c.d_model,
            "activation": c.activation,
            "numerics": options.numerics,
            "stats": options.stats,
        }
        dense = GatedFFN(
            d_ff=self.part.d_dense,
            adapters=adapters_below(options.adapters, _DENSE),
            name="dense_ffn",
            **common,
        )
        experts = MoEFFN(
            d_ff=c.d_ff,
            n_experts=c.n_experts,
            top_k=c.experts_per_token,
            routing=RouterSpec(expert_scale=True),
            sharding=options.routing,
            experts=options.experts,
            adapters=adapters_below(options.adapters, _EXPERTS),
            name="experts_ffn",
            **common,
        )
        stream = round_and_save(stream, options.numerics)
        routed_by = self._norm("router_norm", stream, "float32") * c.d_model**-0.5
        of_dense = dense(x, scales_below(scales, _DENSE), **inputs)
        normed = self._norm("experts_norm", stream)
        of_experts = experts(normed, scales_below(scales, _EXPERTS), routed_by=routed_by, **inputs)
        return self._norm("dense_norm", of_dense) + self._norm("experts_post_norm", of_experts)

    def _norm(self, name: str, x: jax.Array, dtype: str | None = None) -> jax.Array:
        c = self.config
        return RMSNorm(c.norm_eps, c.norm_offset, dtype or self.options.numerics.result, name=name)(x)
