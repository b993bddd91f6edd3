"""Flax NNX models of other people's: for one call, their linear layers are wrapped in the merged model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from nalora_jax import trees
from nalora_jax.config import LoRAConfig
from nalora_jax.integrations.model import Foreign, Keymap, Projection, Target, choose_targets, folded
from nalora_jax.nn.ffn import GateStatsConfig


class _Leaf(nnx.Variable):
    """An adapter's array beside a kernel, for the length of one call."""


class _Adapted(nnx.Module):
    """A linear layer of the user's with what is beside its kernel."""

    def __init__(self, foreign: ForeignNNX, target: Target, layer: nnx.Linear, leaves: Mapping[str, Any]) -> None:
        self.layer = layer
        self.leaves = nnx.data({name: _Leaf(value) for name, value in trees.flatten(dict(leaves)).items()})
        self.add = lambda x, y, leaves: foreign._adapted(target, x, y, leaves)

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        leaves = trees.unflatten({name: leaf[...] for name, leaf in self.leaves.items()})
        return self.add(x, self.layer(x, **options), leaves)


@dataclass(frozen=True)
class ForeignNNX(Foreign):
    """See `adapt_nnx`."""

    graph: Any

    def _call(self, variables: Any, leaves: Mapping[str, Mapping[str, Any]], args: Any, options: Any) -> Any:
        model = nnx.merge(self.graph, variables, copy=True)
        for target in self.targets:
            parent, name = _parent(model, target.projection.own)
            wrapped = _Adapted(self, target, _child(parent, name), leaves[target.projection.own])
            if isinstance(parent, nnx.Module) and not name.isdigit():
                setattr(parent, name, wrapped)
            else:
                parent[int(name) if name.isdigit() else name] = wrapped
        return model(*args, **options)

    def merge(self, variables: Any, lora: Any) -> Any:
        """The model's state with every adapter folded into its kernel."""
        model, flat = nnx.merge(self.graph, variables, copy=True), trees.flatten(lora)
        for target in self.targets:
            kernel = _child(*_parent(model, target.projection.own)).kernel
            kernel[...] = folded(kernel[...], target, flat)
        return nnx.state(model)


def adapt_nnx(
    graph: Any,
    state: Any,
    *,
    keymap: Keymap = (),
    lora: LoRAConfig | None = None,
    activation: str = "silu",
    stats: GateStatsConfig | None = None,
) -> ForeignNNX:
    """An NNX model of the user's with low-rank adapters on its `nnx.Linear` layers, nothing of it changed.

    Args:
      graph, state: ``nnx.split(model)``; ``state`` is what ``apply`` and ``gradients`` take as variables.
      keymap, lora, activation, stats: as in `nalora_jax.integrations.linen.adapt_linen`; paths are attribute names and
        indices, e.g. ``layers/0/mlp/gate_proj``.

    Raises:
      NaloraError: see `nalora_jax.integrations.model.choose_targets`.

    Example:
      >>> graph, state = nnx.split(model)
      >>> adapted = adapt_nnx(graph, state, keymap=[(r"layers/(\\d+)/mlp/(.*)", r"layers/\\1/ffn/\\2")])
      >>> logits = adapted.apply(state, adapted.init(jax.random.key(0)), tokens)
    """
    found = []
    for path, module in nnx.iter_modules(nnx.merge(graph, state)):
        if isinstance(module, nnx.Linear):
            shape = module.kernel[...].shape
            found.append(Projection("/".join(map(str, path)), shape[:-2], shape[-2:-1], shape[-1:]))
    targets = choose_targets(sorted(found, key=lambda p: p.own), keymap, lora or LoRAConfig(), activation)
    return ForeignNNX(targets, stats or GateStatsConfig(), graph)


def _parent(model: Any, own: str) -> tuple[Any, str]:
    *parents, name = own.split("/")
    for part in parents:
        model = _child(model, part)
    return model, name


def _child(parent: Any, name: str) -> Any:
    if name.isdigit():
        return parent[int(name)]
    return getattr(parent, name) if hasattr(parent, name) else parent[name]
