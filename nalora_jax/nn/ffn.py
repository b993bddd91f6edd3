"""Self-gated feed-forward blocks with adapters, as Linen modules over `nalora_jax.ops.gated_mlp`.

An adapter on the gate moves the selection weight rho(z), not only the feature. The block therefore reads a channel
mask (collection ``gate_mask``, optional, training only), which shapes the gradient of the gate's A, and writes the
channel statistics that the next step's mask and step scale are made of (collection ``gate_stats``, output only).
Neither touches the forward value. Statistics of the backward pass come out as gradients of the zeros in ``gate_taps``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nalora_jax import activations
from nalora_jax.nn.lora import LoRADense
from nalora_jax.nn.low_rank import TargetSpec
from nalora_jax.ops.adapted_dense import Dense
from nalora_jax.ops.gated_mlp import GateStatsConfig, Measurement, gate_statistics, gated_mlp
from nalora_jax.ops.numerics import Numerics

__all__ = ["Adapters", "GateStatsConfig", "GatedFFN", "SelfGatedFFN", "gate_statistics"]

Scales = Mapping[str, jax.Array | float]


@dataclass(frozen=True)
class Adapters:
    """The adapters of one block, by projection name, and their common options."""

    targets: tuple[tuple[str, TargetSpec], ...] = ()
    dora: bool = False
    dropout: float = 0.0

    def get(self, name: str) -> TargetSpec | None:
        """The spec of projection ``name``, or None."""
        return dict(self.targets).get(name)


class _Block(nn.Module):
    """What both kinds of block share: layers with adapters, the mask, the statistics."""

    d_model: int
    d_ff: int
    activation: str = "silu"
    adapters: Adapters = Adapters()
    use_bias: bool = False
    numerics: Numerics = Numerics()
    stats: GateStatsConfig = GateStatsConfig()

    def _dense(self, name: str, d_in: int, d_out: int, scales: Scales | None, **options: Any) -> Dense:
        adapters, scale = self.adapters, (scales or {}).get(name, 1.0)
        layer = LoRADense(
            d_out, adapters.get(name), self.use_bias, adapters.dora, adapters.dropout, self.numerics, name=name
        )
        dense: Dense = layer.dense(d_in, scale, **options)
        return dense

    def _mask(self) -> jax.Array | None:
        return self.get_variable("gate_mask", "mask") if self.has_variable("gate_mask", "mask") else None

    def _measured(
        self, x: jax.Array, gate: Dense, up: Dense | None, down: Dense, token_weights: jax.Array | None
    ) -> jax.Array:
        """The block's output; its statistics are written where ``gate_stats`` is mutable, and free where it is not."""
        measurement, sinks = None, self.variables.get("gate_taps")
        if not self.is_initializing() and (sinks or self.is_mutable_collection("gate_stats")):
            weights = jnp.ones(x.shape[:-1], bool) if token_weights is None else token_weights
            measurement = Measurement(weights, self.stats.of_rows(weights.shape[-1]), sinks)
        phi = activations.get(self.activation)
        y, statistics = gated_mlp(x, gate, up, down, phi, self.numerics, measurement)
        for name, value in (statistics or {}).items():
            self.sow("gate_stats", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
        return y


class GatedFFN(_Block):
    """``(phi(x W_gate) * x W_up) W_down`` with adapters on any of gate_proj, up_proj, down_proj."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scales: Scales | None = None,
        *,
        token_weights: jax.Array | None = None,
        deterministic: bool = True,
        adapter_ids: jax.Array | None = None,
    ) -> jax.Array:
        """``[batch, seq, d_model]`` -> ``[batch, seq, d_model]``.

        Args:
          x: input.
          scales: the adapters' ``s`` by projection name; 1 where absent.
          token_weights: ``[batch, seq]``, which tokens the statistics count.
          deterministic: no adapter dropout.
          adapter_ids: ``[batch]``, see `LoRADense`.
        """
        options: dict[str, Any] = {"deterministic": deterministic, "adapter_ids": adapter_ids}
        gate = self._dense("gate_proj", self.d_model, self.d_ff, scales, mask=self._mask(), **options)
        up = self._dense("up_proj", self.d_model, self.d_ff, scales, **options)
        down = self._dense("down_proj", self.d_ff, self.d_model, scales, **options)
        return self._measured(x, gate, up, down, token_weights)


class SelfGatedFFN(_Block):
    """``phi(x W_in) W_out`` with adapters on any of in_proj, out_proj; in_proj is the gate."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scales: Scales | None = None,
        *,
        token_weights: jax.Array | None = None,
        deterministic: bool = True,
        adapter_ids: jax.Array | None = None,
    ) -> jax.Array:
        """``[batch, seq, d_in]`` -> ``[batch, seq, d_model]``; arguments as in `GatedFFN`."""
        options: dict[str, Any] = {"deterministic": deterministic, "adapter_ids": adapter_ids}
        gate = self._dense("in_proj", x.shape[-1], self.d_ff, scales, mask=self._mask(), **options)
        down = self._dense("out_proj", self.d_ff, self.d_model, scales, **options)
        return self._measured(x, gate, None, down, token_weights)
