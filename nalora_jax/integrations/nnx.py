"""Adapters for Flax NNX models of other libraries, by wrapping their linear layers for one call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nalora_jax import trees
from nalora_jax.config import LoRAConfig
from nalora_jax.errors import NaloraError
from nalora_jax.integrations.layers import ROWS, Contraction, Unfit, examine, randomised
from nalora_jax.integrations.model import Foreign, folded
from nalora_jax.integrations.targets import Keymap, Projection, Target, choose_targets
from nalora_jax.measurement import GateStatsConfig


class _Leaf(nnx.Variable):
    """An adapter's array next to a kernel during one call."""


class _Adapted(nnx.Module):
    """A linear layer of the user with the adapter of its kernel."""

    def __init__(
        self,
        foreign: ForeignNNX,
        target: Target,
        layer: nnx.Module,
        leaves: Mapping[str, Any],
        reached: set[str],
    ) -> None:
        self.layer = layer
        self.leaves = nnx.data({name: _Leaf(value) for name, value in trees.flatten(dict(leaves)).items()})
        self.add = lambda x, y, leaves: foreign._adapted(target, x, y, leaves)
        self.reach = lambda: reached.add(target.projection.own)

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        self.reach()
        leaves = trees.unflatten({name: leaf[...] for name, leaf in self.leaves.items()})
        return self.add(x, self.layer(x, *args, **options), leaves)


@dataclass(frozen=True)
class ForeignNNX(Foreign):
    """An adapted NNX model; see `adapt_nnx`.

    ``apply`` and the function that ``gradients`` passes to the loss accept ``return_state=True``:
    then they return the model's result and its state after the call. Without it a call that changes
    the state (a dropout's counter, running statistics of a batch norm) is an error, because the
    change would be lost.
    """

    graph: Any

    def _call(
        self, variables: Any, leaves: Mapping[str, Mapping[str, Any]], args: Any, options: Any
    ) -> Any:
        options = dict(options)
        return_state = options.pop("return_state", False)
        model = nnx.merge(self.graph, variables, copy=True)
        reached: set[str] = set()
        layers = {}
        for target in self.targets:
            path = target.projection.own
            layers[path] = _child(*_parent(model, path))
            _replace(model, path, _Adapted(self, target, layers[path], leaves[path], reached))
        out = model(*args, **options)
        missed = sorted(set(layers) - reached)
        if missed:
            raise NaloraError(
                missed[0], expected="a call of this layer", found="none: its adapter did nothing"
            )
        for path, layer in layers.items():
            _replace(model, path, layer)
        after = nnx.state(model)
        if return_state:
            return out, after
        _refuse_changes(variables, after)
        return out

    def _plain(self, variables: Any, args: Any, options: Any) -> Any:
        options = dict(options)
        return_state = options.pop("return_state", False)
        model = nnx.merge(self.graph, variables, copy=True)
        out = model(*args, **options)
        if return_state:
            return out, nnx.state(model)
        return out

    def _merged(self, variables: Any, lora: Any) -> Any:
        model, flat = nnx.merge(self.graph, variables, copy=True), trees.flatten(lora)
        for target in self.targets:
            layer = _child(*_parent(model, target.projection.own))
            kernel = getattr(layer, target.projection.dense.parameter)
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
    """Adds low-rank adapters to the linear layers of an NNX model, which stays unmodified.

    A linear layer is any module that computes ``x @ kernel`` or ``x @ kernel.T``, with or without a
    bias: `nnx.Linear`, `nnx.LinearGeneral`, and most custom layers with a parameter of two axes.
    Each is run once on random numbers to detect this.

    Args:
      graph: the first result of ``nnx.split(model)``.
      state: the second result, which ``apply`` and ``gradients`` take as variables.
      keymap: as in `nalora_jax.integrations.linen.adapt_linen`; paths are attribute names and
        indices, e.g. ``layers/0/mlp/gate_proj``.
      lora: as in `adapt_linen`.
      activation: as in `adapt_linen`.
      stats: as in `adapt_linen`.

    Raises:
      NaloraError: see `nalora_jax.integrations.targets.choose_targets`; or a matched layer is used
        at two places of the model.

    Example:
      >>> graph, state = nnx.split(model)
      >>> adapted = adapt_nnx(graph, state, keymap=[(r"layers/(\\d+)/mlp/(.*)", r"layers/\\1/ffn/\\2")])
      >>> logits = adapted.apply(state, adapted.init(jax.random.key(0)), tokens)
      >>> logits, state = adapted.apply(state, lora, tokens, return_state=True)  # of a model with dropout
    """
    model = nnx.merge(graph, state)
    shared = _shared(model)
    projections = []
    for path, module in nnx.iter_modules(model):
        params = _own_params(module)
        if path and any(len(shape) > 1 for shape in params.values()):
            lead, layer = _examined(module, params)
            if shared & {id(module), *(id(getattr(module, name)) for name in params)}:
                layer = Unfit("it, or its kernel, stands at two places of the model", dense=True)
            projections.append(Projection("/".join(map(str, path)), lead, layer))
    targets = choose_targets(
        sorted(projections, key=lambda p: p.own), keymap, lora or LoRAConfig(), activation
    )
    return ForeignNNX(targets, stats or GateStatsConfig(), graph)


def _own_params(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a module's parameters, submodules excluded."""
    return {name: leaf.shape for name, leaf in vars(module).items() if isinstance(leaf, nnx.Param)}


def _shared(model: Any) -> set[int]:
    """Returns the ids of modules and parameters that are used at more than one place."""
    places: Counter[int] = Counter()
    for _, module in nnx.iter_modules(model):
        places.update(id(child) for _, child in nnx.iter_children(module))
    return {variable for variable, count in places.items() if count > 1}


def _examined(
    module: nnx.Module, params: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[int, ...], Contraction | Unfit]:
    """Returns the leading axes of a module's parameters and the contraction of one slice."""
    inputs, lead = _inputs(module, params)
    graph, state = nnx.split(module)
    reason = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[len(lead) :], leaf.dtype), state)
    values = randomised(reason)
    flat = {name: values[name][...] for name in params}
    reasons = []
    for shape in inputs:
        x = randomised(jax.ShapeDtypeStruct((ROWS, *shape), jnp.float32), seed=1)
        layer = examine(lambda x: nnx.merge(graph, values, copy=True)(x), flat, x)
        if isinstance(layer, Contraction):
            return lead, layer
        reasons.append(layer)
    return lead, next((reason for reason in reasons if reason.dense), reasons[0])


def _inputs(
    module: nnx.Module, params: Mapping[str, tuple[int, ...]]
) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Returns the input shapes to try, and the leading axes of stacked layers."""
    if isinstance(module, nnx.Linear):
        shape = params["kernel"]
        return [shape[-2:-1]], shape[:-2]
    if isinstance(module, nnx.LinearGeneral):
        inputs = tuple(np.ravel(module.in_features).tolist())
        shape = params["kernel"]
        if module.batch_axis:
            return [inputs], ()
        return [inputs], shape[: len(shape) - len(inputs) - len(np.ravel(module.out_features))]
    shape = next(shape for shape in params.values() if len(shape) > 1)
    return list(dict.fromkeys([shape[:1], shape[-1:]])), ()


def _refuse_changes(before: Any, after: Any) -> None:
    """Raises an error if a call has changed other state than parameters.

    Traced values are compared by identity only: values that pass through `nnx.remat` or `nnx.scan`
    count as changed even if they are equal.
    """
    before_state = dict(nnx.to_flat_state(before))
    changed = []
    for path, variable in nnx.to_flat_state(after):
        if isinstance(variable, nnx.Param):
            continue
        old = before_state.get(path)
        if old is None or not _same(old.get_value(), variable.get_value()):
            changed.append(f"{'/'.join(map(str, path))} ({type(variable).__name__})")
    if changed:
        raise NaloraError(
            "apply",
            expected="a model whose state no call changes",
            found=f"a call that changes, or may change, {', '.join(changed[:4])}{' ...' if len(changed) > 4 else ''}",
            remedy="call it with return_state=True, which returns (result, state), or switch the model to evaluation",
        )


def _same(first: Any, other: Any) -> bool:
    if first is other:
        return True
    if any(isinstance(value, jax.core.Tracer) or not hasattr(value, "dtype") for value in (first, other)):
        return False
    if jnp.issubdtype(first.dtype, jax.dtypes.prng_key):
        first, other = jax.random.key_data(first), jax.random.key_data(other)
    return first.shape == other.shape and bool((np.asarray(first) == np.asarray(other)).all())


def _replace(model: Any, path: str, module: nnx.Module) -> None:
    parent, name = _parent(model, path)
    if isinstance(parent, nnx.Module) and not name.isdigit():
        setattr(parent, name, module)
    else:
        parent[int(name) if name.isdigit() else name] = module


def _parent(model: Any, path: str) -> tuple[Any, str]:
    *parents, name = path.split("/")
    for part_name in parents:
        model = _child(model, part_name)
    return model, name


def _child(parent: Any, name: str) -> Any:
    if name.isdigit():
        return parent[int(name)]
    if hasattr(parent, name):
        return getattr(parent, name)
    return parent[name]
