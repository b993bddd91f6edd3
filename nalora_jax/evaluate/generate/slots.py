"""Adapters in fixed shapes, so that all of them share one program.

A program is compiled for the shapes and scales of an adapter. In a slot every projection has an
adapter of one rank, zero if the current adapter has none there, with its scale folded into B:

    slot = AdapterSlot.on(config, rank=16)
    variables = {"params": params, "lora": slot.fill(None, None)}
    generator = Generator(Decoder(config, slot.spec, ...), variables, tokenizer)
    generator = generator.with_lora(slot.fill(lora, spec))  # another adapter, the same programs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import pad_rank
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import depths, projection_shapes
from nalora_jax.models.targets import TOKEN_TABLES, AdapterSpec, TargetSpec


@dataclass(frozen=True)
class AdapterSlot:
    """Fixed shapes for adapters of one base.

    Attributes:
      config: the base.
      spec: of the slot, for the decoder: every projection, every scale 1.
    """

    config: ModelConfig
    spec: AdapterSpec

    @staticmethod
    def on(config: ModelConfig, *, rank: int) -> AdapterSlot:
        """Returns the slot of a base for adapters of at most ``rank``."""
        targets = []
        for path, shape in sorted(projection_shapes(config).items()):
            largest = min(rank, *shape[-2:])
            target = TargetSpec.even(largest, depths(config)[path])
            targets.append((path, target))
        return AdapterSlot(config, AdapterSpec(tuple(targets)))

    @staticmethod
    def rank_of(spec: AdapterSpec) -> int:
        """Returns the slot rank that an adapter needs."""
        return max((target.rank for _, target in spec.targets), default=0)

    @staticmethod
    def takes(spec: AdapterSpec) -> bool:
        """Returns True for plain adapters.

        DoRA's update is not linear, and a program with trained rows is compiled for their ids.
        """
        return not spec.dora and not spec.token_indices

    def fill(
        self, lora: Mapping[str, Any] | None, spec: AdapterSpec | None
    ) -> dict[str, Any]:
        """Returns the adapter in the slot's shapes; zeros if there is no adapter.

        Fully trained tables are included; programs are compiled once with them and once without.

        Args:
          lora: float32 tree of the adapter.
          spec: its ranks and scales, which `takes` accepts.

        Raises:
          NaloraError: a rank is larger than the slot's.
        """
        lora = lora or {}
        spec = spec or AdapterSpec()
        assert self.takes(spec)
        tables = flatten(lora)
        leaves = {}
        for path, target in self.spec.targets:
            *experts, d_in, d_out = projection_shapes(self.config)[path]
            lead = (len(target.ranks), *experts)  # layers, and experts if there are any
            a = jnp.zeros((*lead, d_in, 0))  # [layers, ..., d_in, rank]
            b = jnp.zeros((*lead, 0, d_out))  # [layers, ..., rank, d_out]
            if spec.target(path) is not None:
                a = jnp.asarray(tables[f"{path}/a"], jnp.float32)
                b = jnp.asarray(tables[f"{path}/b"], jnp.float32)
                # The scales [layers] -> [layers, 1, ...], for every element of a layer's B.
                scales = jnp.expand_dims(spec.scales(path), range(1, b.ndim))
                b = b * scales
            if a.shape[-1] > target.rank:
                raise NaloraError(
                    f"{path}: rank",
                    expected=f"at most {target.rank}",
                    found=a.shape[-1],
                    remedy="make the slot with a larger rank",
                )
            a, b = pad_rank(a, b, target.rank)
            leaves[f"{path}/a"] = a
            leaves[f"{path}/b"] = b
        for name in spec.saved:
            leaves[TOKEN_TABLES[name]] = tables[TOKEN_TABLES[name]]
        return unflatten(leaves)
