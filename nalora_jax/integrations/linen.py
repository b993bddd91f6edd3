"""Adapters for Flax Linen modules of other libraries, through ``nn.intercept_methods``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze

from nalora_jax import trees
from nalora_jax.config import LoRAConfig
from nalora_jax.errors import NaloraError
from nalora_jax.integrations.layers import (
    ROWS,
    Contraction,
    Unfit,
    arrangements,
    examine,
    no_product,
    randomised,
)
from nalora_jax.integrations.model import Foreign, folded
from nalora_jax.integrations.targets import Keymap, Projection, choose_targets
from nalora_jax.measurement import GateStatsConfig

_ADAPTER = "nalora"  # name of the adapter's leaves next to a kernel during one call


@dataclass(frozen=True)
class ForeignLinen(Foreign):
    """An adapted Linen module; see `adapt_linen`."""

    module: nn.Module
    example: tuple[tuple[Any, ...], dict[str, Any]]  # arguments and options of a call

    def _call(
        self, variables: Any, leaves: Mapping[str, Mapping[str, Any]], args: Any, options: Any
    ) -> Any:
        by_own = {target.projection.own: target for target in self.targets}
        reached: set[str] = set()

        def add(module: nn.Module, path: str, args: Any, options: Any, base: jax.Array) -> jax.Array:
            del options
            if path not in by_own:
                return base
            reached.add(path)
            return self._adapted(by_own[path], args[0], base, module.get_variable("params", _ADAPTER))

        variables = dict(variables)
        variables["params"] = _with_leaves(unfreeze(variables["params"]), leaves)
        with nn.intercept_methods(_on_layers(add)):
            out = self.module.apply(variables, *args, **options)
        missed = sorted(set(by_own) - reached)
        if missed:
            expected = "a call, as with the example"
            raise NaloraError(missed[0], expected=expected, found="none: its adapter did nothing")
        return out

    def _plain(self, variables: Any, args: Any, options: Any) -> Any:
        return self.module.apply(variables, *args, **options)

    def _merged(self, variables: Any, lora: Any) -> Any:
        params, flat = unfreeze(variables["params"]), trees.flatten(lora)
        for target in self.targets:
            path, name = target.projection.own, target.projection.dense.parameter
            stored = _node(params, path)[name]
            kernel = folded(nn.meta.unbox(stored), target, flat)
            params = _set(params, path, name, nn.meta.replace_boxed(stored, kernel))
        return dict(variables) | {"params": params}

    @property
    def _example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.example


def adapt_linen(
    module: nn.Module,
    variables: Any,
    example: Sequence[Any],
    *,
    keymap: Keymap = (),
    lora: LoRAConfig | None = None,
    activation: str = "silu",
    stats: GateStatsConfig | None = None,
    **options: Any,
) -> ForeignLinen:
    """Adds low-rank adapters to the dense layers of a Linen module, which stays unmodified.

    A dense layer is any submodule that computes ``x @ kernel`` or ``x @ kernel.T``, with or without
    a bias, for any class and any parameter names: `nn.Dense`, `nn.DenseGeneral`, and most custom
    layers. Each is run once on random numbers to detect this. Layers may be unrolled, scanned,
    mapped or rematerialized.

    Args:
      module: the model.
      variables: its variables, as ``module.apply`` takes them; arrays or shapes.
      example: arguments of a call; tracing it finds the layers, and ``merge`` compares results on
        it.
      keymap: ordered pairs (regular expression of a dense layer's full path, name); the first match
        applies, and the name may use its groups, e.g.
        ``(r"blocks_(\\d+)/mlp/w1", r"layers/\\1/ffn/gate_proj")``. A layer named ``.../gate_proj``
        (or ``in_proj``, in a block that is not gated) is a gate, to which the mechanisms apply.
        Layers without a match keep their names.
      lora: rules searched in these names, first match wins (default: all of ``ffn/``), and
        ``rslora``.
      activation: the activation function after the gates.
      stats: strides of the statistics.
      options: passed to ``module.apply``, e.g. ``rngs``.

    Raises:
      NaloraError: see `nalora_jax.integrations.targets.choose_targets`.

    Example:
      >>> adapted = adapt_linen(module, variables, (tokens,), keymap=[(r"(.*)/w1", r"\\1/gate_proj")], lora=rules)
      >>> lora = adapted.init(jax.random.key(0))
      >>> logits = adapted.apply(variables, lora, tokens)
    """
    projections = _projections(module, variables, example, options)
    targets = choose_targets(projections, keymap, lora or LoRAConfig(), activation)
    return ForeignLinen(targets, stats or GateStatsConfig(), module, (tuple(example), options))


@dataclass(frozen=True)
class _Seen:
    """A layer of the model and its call, as shapes."""

    layer: nn.Module  # unbound
    variables: Any
    args: Any
    options: Any
    out: Any

    @property
    def own_params(self) -> dict[str, Any]:
        """The layer's parameters, sublayers excluded."""
        return {name: leaf for name, leaf in self.variables["params"].items() if hasattr(leaf, "shape")}


def _projections(
    module: nn.Module, variables: Any, example: Sequence[Any], options: Any
) -> list[Projection]:
    """Returns all layers with a matrix that a call of the module reaches."""
    params = nn.meta.unbox(unfreeze(variables["params"]))
    calls: dict[str, _Seen] = {}

    def record(module: nn.Module, path: str, args: Any, options: Any, out: Any) -> Any:
        if path and path not in calls:
            inner = nn.meta.unbox(unfreeze(module.variables))
            calls[path] = _Seen(
                module.clone(parent=None, name=None), *map(_shapes, (inner, args, options, out))
            )
        return out

    def call(variables: Any, example: Any) -> Any:
        with nn.intercept_methods(_on_layers(record)):
            return module.apply(variables, *example, **options)

    jax.eval_shape(call, variables, tuple(example))
    results: dict[Any, Contraction | Unfit] = {}  # equal layers are run once
    projections = []
    for path in sorted(calls):
        layer = _examined(calls[path], results)
        name = layer.parameter if isinstance(layer, Contraction) else next(iter(calls[path].own_params))
        stored, shape = _node(params, path)[name].shape, calls[path].own_params[name].shape
        projections.append(Projection(path, stored[: len(stored) - len(shape)], layer))
    return projections


def _examined(call: _Seen, results: dict[Any, Contraction | Unfit]) -> Contraction | Unfit:
    """Returns a layer's contraction, or the reason why it has none.

    The layer is run on a few rows of random numbers, unless an equal layer has been run before.
    """
    x, out, layer_params = call.args[0], call.out, call.own_params
    if not hasattr(x, "shape") or not jnp.issubdtype(x.dtype, jnp.floating):
        return Unfit("its input is not an array of real numbers")
    if not hasattr(out, "shape"):
        return Unfit(f"it returns {type(out).__name__}, not one array")
    shapes = {name: leaf.shape for name, leaf in layer_params.items()}
    possible = arrangements(shapes, x.shape, out.shape)
    if not possible:
        return Unfit(no_product(shapes, x.shape, out.shape))
    # Other arrays might need the same number of rows.
    if len(jax.tree.leaves((call.args, call.options))) == 1:
        rows = x.ndim - max(len(contraction.inputs) for contraction in possible)
        x = jax.ShapeDtypeStruct((*(min(n, ROWS) for n in x.shape[:rows]), *x.shape[rows:]), x.dtype)
    try:
        key = (call.layer, x.shape, x.dtype, str(call.variables), str(call.args), str(call.options))
        if key in results:
            return results[key]
    except TypeError:  # a field of the layer that cannot be hashed
        key = None
    values, first, other_args, options = randomised((call.variables, x, call.args[1:], call.options))
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}

    def run(x: Any) -> Any:
        return call.layer.apply(values, x, *other_args, rngs=rngs, mutable=True, **options)[0]

    layer = examine(run, {name: values["params"][name] for name in layer_params}, first)
    if key is not None:
        results[key] = layer
    return layer


def _shapes(tree: Any) -> Any:
    """Returns ``tree`` with arrays replaced by their shapes."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf,
        tree,
    )


def _on_layers(function: Any) -> Any:
    """Returns an interceptor that passes the calls of every layer with a matrix to a function.

    The function receives ``(module, path, args, options, out)`` and returns the layer's new output.
    """
    inside: list[str] = []

    def intercept(call: Any, args: Any, options: Any, context: Any) -> Any:
        module, path = context.module, "/".join(context.module.path)
        # A transformed class (nn.remat(nn.Dense)) calls itself again under the same path.
        if context.method_name != "__call__" or path in inside or not args or not _has_matrix(module):
            return call(*args, **options)
        inside.append(path)
        try:
            out = call(*args, **options)
        finally:
            inside.pop()
        return function(module, path, args, options, out)

    return intercept


def _has_matrix(module: nn.Module) -> bool:
    params = nn.meta.unbox(unfreeze(module.variables)).get("params", {})
    return any(len(getattr(leaf, "shape", ())) > 1 for name, leaf in params.items() if name != _ADAPTER)


def _with_leaves(params: dict[str, Any], leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    for path, adapter in leaves.items():
        params = _set(params, path, _ADAPTER, dict(adapter))
    return params


def _node(params: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    for name in path.split("/"):
        params = params[name]
    return params


def _set(params: Mapping[str, Any], path: str, name: str, value: Any) -> dict[str, Any]:
    """Returns ``params`` with ``own/name`` set.

    Nodes on the path are copied, the rest is shared.
    """
    first, _, below = path.partition("/")
    child = params[first]
    if not below:
        return {**params, first: {**child, name: value}}
    return {**params, first: _set(child, below, name, value)}
