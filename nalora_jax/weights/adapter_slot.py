"""A slot whose adapter can be exchanged, up to the slot's rank, without a new program.

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
import numpy as np

from nalora_jax.common import trees
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import pad_rank
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import depths, projection_shapes
from nalora_jax.models.targets import TABLES, AdapterSpec, TargetSpec
from nalora_jax.weights.peft_tables import with_whole_tables


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
            targets.append((path, TargetSpec.even(min(rank, *shape[-2:]), depths(config)[path])))
        return AdapterSlot(config, AdapterSpec(tuple(targets)))

    @staticmethod
    def rank_of(spec: AdapterSpec) -> int:
        """Returns the slot rank that an adapter needs."""
        return max((target.rank for _, target in spec.targets), default=0)

    def fill(
        self,
        lora: Mapping[str, Any] | None,
        spec: AdapterSpec | None,
        params: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Returns the adapter in the slot's shapes; zeros if there is no adapter.

        Fully trained tables are included; programs are compiled once with them and once without.
        Trained rows are converted to full tables, because a program would be compiled for their
        ids.

        Args:
          lora: float32 tree of the adapter.
          spec: its ranks and scales.
          params: of the base, needed if rows of its tables were trained.

        Raises:
          NaloraError: a rank is larger than the slot's, the adapter is DoRA, whose update is not
            linear, or it has trained rows and there are no ``params``.
        """
        lora, spec = lora or {}, spec or AdapterSpec()
        if spec.dora:
            remedy = "merge it instead"
            raise NaloraError("adapter", expected="a linear adapter", found="DoRA", remedy=remedy)
        if spec.token_indices:
            if params is None:
                actual = "trained rows of the base's tables"
                raise NaloraError("adapter", expected="the base's weights beside it", found=actual)
            lora, spec = with_whole_tables(self.config, params, lora, spec)
        scales = folded_scales(lora, spec)
        leaves: dict[str, Any] = {}
        for path, target in self.spec.targets:
            *lead, d_in, d_out = (len(target.ranks), *projection_shapes(self.config)[path])
            a, b = scales.get(path) or (jnp.zeros((*lead, d_in, 0)), jnp.zeros((*lead, 0, d_out)))
            if a.shape[-1] > target.rank:
                expected, remedy = f"at most {target.rank}", "make the slot with a larger rank"
                raise NaloraError(f"{path}: rank", expected=expected, found=a.shape[-1], remedy=remedy)
            leaves[f"{path}/a"], leaves[f"{path}/b"] = pad_rank(a, b, target.rank)
        tables = trees.flatten(lora)
        leaves |= {TABLES[name]: tables[TABLES[name]] for name in spec.saved}
        return trees.unflatten(leaves)


def folded_scales(lora: Mapping[str, Any], spec: AdapterSpec) -> dict[str, tuple[Any, Any]]:
    """Returns A and ``s B`` by path, ``[layers, ...]`` each."""
    flat = trees.flatten(lora)
    folded = {}
    for path, _ in spec.targets:
        b = jnp.asarray(flat[f"{path}/b"], jnp.float32)
        scales = np.reshape(spec.scales(path), (-1,) + (1,) * (b.ndim - 1))
        folded[path] = (jnp.asarray(flat[f"{path}/a"], jnp.float32), b * scales)
    return folded
