"""Flax Linen modules of other people's, adapted through ``nn.intercept_methods``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from flax.core import unfreeze

from nalora_jax import trees
from nalora_jax.config import LoRAConfig
from nalora_jax.errors import NaloraError
from nalora_jax.integrations.model import Foreign, Keymap, Projection, choose_targets, folded
from nalora_jax.nn.ffn import GateStatsConfig

_BESIDE = "nalora"  # name of the adapter's leaves beside a kernel, for the length of one call


@dataclass(frozen=True)
class ForeignLinen(Foreign):
    """See `adapt_linen`."""

    module: nn.Module

    def _call(self, variables: Any, leaves: Mapping[str, Mapping[str, Any]], args: Any, options: Any) -> Any:
        by_own = {target.projection.own: target for target in self.targets}
        reached: set[str] = set()

        def add(module: nn.Module, own: str, x: jax.Array, base: jax.Array) -> jax.Array:
            if own not in by_own:
                return base
            reached.add(own)
            return self._adapted(by_own[own], x, base, module.get_variable("params", _BESIDE))

        variables = dict(variables)
        variables["params"] = _with_leaves(unfreeze(variables["params"]), leaves)
        with nn.intercept_methods(_on_dense(add)):
            out = self.module.apply(variables, *args, **options)
        missed = sorted(set(by_own) - reached)
        if missed:
            raise NaloraError(missed[0], expected="a call, as with the example", found="none: its adapter did nothing")
        return out

    def merge(self, variables: Any, lora: Any) -> Any:
        """The module's variables with every adapter folded into its kernel."""
        params, flat = unfreeze(variables["params"]), trees.flatten(lora)
        for target in self.targets:
            node = _node(params, target.projection.own)
            kernel = folded(nn.meta.unbox(node["kernel"]), target, flat)
            params = _set(params, target.projection.own, "kernel", nn.meta.replace_boxed(node["kernel"], kernel))
        return dict(variables) | {"params": params}


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
    """A Linen module of the user's with low-rank adapters on its dense layers, nothing of it changed.

    A dense layer is any submodule with a parameter ``kernel`` whose call contracts the last axes of its input with it:
    `nn.Dense`, `nn.DenseGeneral`, and most people's own. Layers may be unrolled, scanned, mapped or rematerialised.

    Args:
      module: the model.
      variables: its variables, as ``module.apply`` takes them; arrays or shapes.
      example: arguments of a call, by whose trace the dense layers are found; nothing is computed.
      keymap: ordered pairs (regular expression of a dense layer's whole path, name), the first that matches, with
        groups, e.g. ``(r"blocks_(\\d+)/mlp/w1", r"layers/\\1/ffn/gate_proj")``. A layer named ``.../gate_proj`` (or
        ``in_proj``, of a block that is not gated) is a gate, and the mechanisms act on it; those without a pair keep
        their names.
      lora: rules searched in these names, the first that matches (default: all of ``ffn/``), and ``rslora``.
      activation: what the gates feed.
      stats: strides of the statistics.
      options: passed on to ``module.apply``, e.g. ``rngs``.

    Raises:
      NaloraError: see `nalora_jax.integrations.model.choose_targets`.

    Example:
      >>> adapted = adapt_linen(module, variables, (tokens,), keymap=[(r"(.*)/w1", r"\\1/gate_proj")], lora=rules)
      >>> lora = adapted.init(jax.random.key(0))
      >>> logits = adapted.apply(variables, lora, tokens)
    """
    found = _projections(module, variables, example, options)
    targets = choose_targets(found, keymap, lora or LoRAConfig(), activation)
    return ForeignLinen(targets, stats or GateStatsConfig(), module)


def _projections(module: nn.Module, variables: Any, example: Sequence[Any], options: Any) -> list[Projection]:
    """Every dense layer that a call of the module reaches."""
    params = nn.meta.unbox(unfreeze(variables["params"]))
    found: dict[str, Projection] = {}

    def record(module: nn.Module, own: str, x: jax.Array, base: jax.Array) -> jax.Array:
        shape = nn.meta.unbox(module.get_variable("params", "kernel")).shape
        cut = _contracted(x.shape, base.shape, shape)
        stored = _node(params, own)["kernel"].shape
        found[own] = Projection(own, stored[: len(stored) - len(shape)], shape[:cut], shape[cut:])
        return base

    def call(variables: Any, example: Any) -> Any:
        with nn.intercept_methods(_on_dense(record)):
            return module.apply(variables, *example, **options)

    jax.eval_shape(call, variables, tuple(example))
    return [found[own] for own in sorted(found)]


def _on_dense(function: Any) -> Any:
    """An interceptor that hands input and output of every dense layer to ``function(module, path, x, y) -> y``."""
    inside: list[str] = []

    def intercept(call: Any, args: Any, options: Any, context: Any) -> Any:
        module, own = context.module, "/".join(context.module.path)
        # A transformed class (nn.remat(nn.Dense)) calls itself once more under the same path.
        if (
            context.method_name != "__call__"
            or own in inside
            or not args
            or not module.has_variable("params", "kernel")
        ):
            return call(*args, **options)
        inside.append(own)
        try:
            out = call(*args, **options)
        finally:
            inside.pop()
        x, kernel = args[0], nn.meta.unbox(module.get_variable("params", "kernel"))
        fits = hasattr(out, "shape") and _contracted(x.shape, out.shape, kernel.shape)
        return function(module, own, x, out) if fits else out

    return intercept


def _contracted(x: tuple[int, ...], out: tuple[int, ...], kernel: tuple[int, ...]) -> int:
    """How many of the kernel's axes are contracted with the last ones of x; 0 if the shapes do not say so.

    Example: x ``[2, 7, 4, 8]``, kernel ``[4, 8, 32]`` and out ``[2, 7, 32]`` give 2.
    """
    for cut in range(1, len(kernel)):
        if x[-cut:] == kernel[:cut] and out == (*x[:-cut], *kernel[cut:]):
            return cut
    return 0


def _with_leaves(params: dict[str, Any], leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    for own, beside in leaves.items():
        params = _set(params, own, _BESIDE, dict(beside))
    return params


def _node(params: Mapping[str, Any], own: str) -> Mapping[str, Any]:
    for name in own.split("/"):
        params = params[name]
    return params


def _set(params: Mapping[str, Any], own: str, name: str, value: Any) -> dict[str, Any]:
    """``params`` with ``own/name`` set; nodes on the way are copied, the rest is shared."""
    first, _, rest = own.partition("/")
    child = params[first]
    return {**params, first: _set(child, rest, name, value) if rest else {**child, name: value}}
