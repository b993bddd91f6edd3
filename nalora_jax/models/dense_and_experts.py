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

from nalora_jax.models.config import ModelConfig
from nalora_jax.models.layers import RMSNorm
from nalora_jax.models.parts import PartOptions, Shapes, scales_below
from nalora_jax.models.router import RouterSpec
from nalora_jax.models.shared_experts import WithExperts
from nalora_jax.ops.storage import round_and_save

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
