"""Several adapters on one base: stacked and selected per example, or combined into one.

A bank has a fixed number of slots of a fixed rank, so that loading, replacing and unloading
adapters never changes a shape, and one compiled program serves all of them:

    bank = AdapterBank.empty(config, slots=4, rank=16)
    bank = bank.load("legal", lora, spec).load("chat", other, other_spec)
    model = Decoder(config, bank.spec, ...)
    variables = {"params": params, "lora": bank.lora}
    model.apply(variables, tokens, adapter_ids=bank.ids(["chat", None, "legal"]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from nalora_jax import trees
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import depths, projection_shapes
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.weights.saved_modules import refuse_saved

Adapter = tuple[Mapping[str, Any], AdapterSpec]  # a lora tree and its spec


@dataclass(frozen=True)
class AdapterBank:
    """Slots for adapters of one base; immutable, every change returns a new bank.

    Attributes:
      config: the base.
      names: name of the adapter in each slot, None if it is empty.
      spec: of the stack, for the decoder; scales are folded into B, so every scale is 1.
      lora: the stack, ``layers/ffn/gate_proj/a [layers, slots, d_in, rank]`` and ``b [layers,
        slots, rank, d_out]``.
    """

    config: ModelConfig
    names: tuple[str | None, ...]
    spec: AdapterSpec
    lora: dict[str, Any]

    @staticmethod
    def empty(
        config: ModelConfig, *, slots: int, rank: int, targets: Sequence[str] | None = None
    ) -> AdapterBank:
        """Returns a bank without adapters.

        Args:
          config: the base model.
          slots: number of adapters that fit.
          rank: the largest rank that fits; smaller ones are zero-padded.
          targets: stacked paths that can be adapted, by default every projection.

        Raises:
          NaloraError: no slot, a rank out of range, an unknown target, or a mixture of experts.
        """
        shapes = projection_shapes(config)
        paths = sorted(shapes if targets is None else targets)
        unknown = sorted(set(paths) - set(shapes))
        if unknown:
            raise NaloraError(
                "targets", expected=f"some of {', '.join(sorted(shapes))}", found=", ".join(unknown)
            )
        if config.n_experts:
            experts, remedy = f"{config.n_experts} experts", "merge, or switch trees"
            raise NaloraError("adapter bank", expected="a dense model", found=experts, remedy=remedy)
        if slots < 1 or rank < 1:
            actual = f"{slots} of rank {rank}"
            raise NaloraError("adapter bank", expected="at least one slot of rank 1", found=actual)
        layers, leaves = depths(config), {}
        for path in paths:
            d_in, d_out = shapes[path]
            leaves[f"{path}/a"] = jnp.zeros((layers[path], slots, d_in, rank), jnp.float32)
            leaves[f"{path}/b"] = jnp.zeros((layers[path], slots, rank, d_out), jnp.float32)
        spec = AdapterSpec(tuple((path, TargetSpec.even(rank, layers[path])) for path in paths))
        return AdapterBank(config, (None,) * slots, spec, trees.unflatten(leaves))

    def load(self, name: str, lora: Mapping[str, Any], spec: AdapterSpec) -> AdapterBank:
        """Returns the bank with an adapter in the slot of ``name``, or in the first empty slot.

        Raises:
          NaloraError: no slot is free, the rank is too large, a target is missing in the bank, or
            the adapter is DoRA.
        """
        usable = [occupant for occupant in (name, None) if occupant in self.names]
        if not usable:
            names = ", ".join(str(occupant) for occupant in self.names)
            raise NaloraError(
                "adapter bank", expected="a free slot", found=names, remedy="unload one first"
            )
        where, remedy = f"adapter {name}", "merge it instead"
        if spec.dora:
            raise NaloraError(where, expected="a linear adapter", found="DoRA", remedy=remedy)
        refuse_saved(spec, where, remedy)
        slot = self.names.index(usable[0])
        bank = self._with_slot(slot, folded_scales(lora, spec), where)
        return replace(bank, names=(*self.names[:slot], name, *self.names[slot + 1 :]))

    def unload(self, name: str) -> AdapterBank:
        """Returns the bank without ``name``; its slot computes the base again."""
        slot = self._slot(name)
        return replace(
            self._with_slot(slot, {}, name),
            names=(*self.names[:slot], None, *self.names[slot + 1 :]),
        )

    def ids(self, names: Sequence[str | None]) -> jnp.ndarray:
        """Returns ``adapter_ids`` of a batch: each example's slot, -1 for the base."""
        slots: dict[str | None, int] = {name: self._slot(name) for name in names if name is not None}
        return jnp.asarray([slots.get(name, -1) for name in names], jnp.int32)

    def _slot(self, name: str) -> int:
        if name not in self.names:
            held = ", ".join(str(n) for n in self.names if n is not None) or "an empty bank"
            raise NaloraError("adapter", expected=f"one of: {held}", found=repr(name))
        return self.names.index(name)

    def _with_slot(self, slot: int, adapter: Mapping[str, tuple[Any, Any]], where: str) -> AdapterBank:
        stack = trees.flatten(self.lora)
        missing = sorted(path for path in adapter if f"{path}/a" not in stack)
        if missing:
            held = ", ".join(path for path, _ in self.spec.targets)
            raise NaloraError(where, expected=f"adapters on {held}", found=f"one on {', '.join(missing)}")
        for path, target in self.spec.targets:
            empty = [jnp.zeros_like(stack[f"{path}/{factor}"][:, slot]) for factor in "ab"]
            for factor, value, zeros, axis in zip(
                "ab", adapter.get(path, empty), empty, (-1, -2), strict=True
            ):
                leaf, filled = f"{path}/{factor}", padded(value, target.rank, axis, f"{where}: {path}")
                if filled.shape != zeros.shape:
                    expected = f"shape {zeros.shape}"
                    raise NaloraError(f"{where}: {leaf}", expected=expected, found=filled.shape)
                stack[leaf] = stack[leaf].at[:, slot].set(filled)
        return replace(self, lora=trees.unflatten(stack))


def combine_adapters(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[dict[str, Any], AdapterSpec]:
    """Returns one adapter whose update is the exact weighted sum of several; ranks add up.

    Args:
      adapters: trees and specs on the same base.
      weights: one factor each, any sign.

    Returns:
      Tree and spec; alpha equals rank everywhere, because the scales are folded into B.

    Raises:
      NaloraError: there are no adapters, another number of weights, or DoRA (whose update is not
        linear).
    """
    if not adapters or len(adapters) != len(weights):
        counts = f"{len(adapters)} adapters and {len(weights)} weights"
        raise NaloraError("combine_adapters", expected="one weight per adapter, at least one", found=counts)
    if any(spec.dora for _, spec in adapters):
        raise NaloraError(
            "combine_adapters", expected="linear adapters", found="DoRA", remedy="merge it instead"
        )
    for _, spec in adapters:
        refuse_saved(spec, "combine_adapters", "merge it instead")
    folded = [folded_scales(lora, spec) for lora, spec in adapters]
    leaves: dict[str, Any] = {}
    targets = []
    for path in sorted({path for adapter in folded for path in adapter}):
        parts = [
            (*adapter[path], weight)
            for adapter, weight in zip(folded, weights, strict=True)
            if path in adapter
        ]
        leaves[f"{path}/a"] = jnp.concatenate([a for a, _, _ in parts], axis=-1)
        leaves[f"{path}/b"] = jnp.concatenate([b * weight for _, b, weight in parts], axis=-2)
        layers, rank = leaves[f"{path}/a"].shape[0], leaves[f"{path}/a"].shape[-1]
        targets.append((path, TargetSpec((rank,) * layers, (float(rank),) * layers)))
    return trees.unflatten(leaves), AdapterSpec(tuple(targets))


def folded_scales(lora: Mapping[str, Any], spec: AdapterSpec) -> dict[str, tuple[Any, Any]]:
    """Returns A and ``s B`` by path, ``[layers, ...]`` each."""
    flat = trees.flatten(lora)
    folded = {}
    for path, _ in spec.targets:
        b = jnp.asarray(flat[f"{path}/b"], jnp.float32)
        scales = np.reshape(spec.scales(path), (-1,) + (1,) * (b.ndim - 1))
        folded[path] = (jnp.asarray(flat[f"{path}/a"], jnp.float32), b * scales)
    return folded


def padded(value: Any, rank: int, axis: int, where: str) -> Any:
    """Zero-pads ``value`` to ``rank`` along its rank axis."""
    if value.shape[axis] > rank:
        remedy = "make the bank with a larger rank"
        raise NaloraError(
            f"{where}: rank", expected=f"at most {rank}", found=value.shape[axis], remedy=remedy
        )
    widths = [(0, 0)] * value.ndim
    widths[axis] = (0, rank - value.shape[axis])
    return jnp.pad(value, widths)
