"""Adapters around an unmodified Flax model: one call for Linen and NNX.

    # Linen
    adapted, mechanisms = adapt(model, layers, gates, variables=variables, example=(x,))
    # NNX
    model, mechanisms = adapt(model, layers, gates)

``layers`` is ``{"mlp/": 8}``, ranks by layer, and ``gates`` ``{"mlp/gate": "silu"}``.

A layer is an einsum of its input and its kernel, which its class states: ``...i,io->...o`` for a
dense layer. Its output becomes ``y + s (x A) B``. Adapters of gates also have the leaves with which
the rules work (`nalora_jax.method.transform.gate_leaves`), so a training loop is that of plain LoRA
with the optimizer `nalora_jax.method.transform.nalora`.

Linen adapters are a tree next to the variables. During a call they are placed next to their
kernels, so that they pass through all transformations of parameters (``nn.scan``, ``nn.remat``,
``nn.vmap``). NNX adapters are `nnx.LoRAParam` variables of the layers.
"""

from __future__ import annotations

import functools
import math
import re
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import unfreeze

from nalora_jax.common import trees
from nalora_jax.errors import NaloraError
from nalora_jax.method import activations, applied
from nalora_jax.method.low_rank import init_a, low_rank
from nalora_jax.method.rules import Mechanism
from nalora_jax.method.statistics import observe
from nalora_jax.method.transform import (
    DEFAULT,
    MASK,
    TAPS,
    Mechanisms,
    gate_leaves,
    make_mechanisms,
)

_DENSE = "...i,io->...o"
# An einsum, the name of the layer's attribute with it, or a function of the layer.
_Form = str | Callable[[Any], str]
Classes = Mapping[type, _Form]


class Contraction(NamedTuple):
    """The einsum of a layer: labels of its input, its kernel and its output."""

    x: str
    kernel: str
    out: str
    inner: str  # the contracted labels
    outer: str  # the kernel's labels in the output
    batch: str  # the other labels of the input

    @classmethod
    def parse(cls, text: str, where: str) -> Contraction:
        """Returns the contraction of an einsum such as ``"BTNH,NHD->BTD"``.

        Raises:
          NaloraError: not an einsum of two operands, or an axis that all three have.
        """
        match = re.fullmatch(r"([\w.]+),(\w+)->([\w.]+)", text.replace(" ", ""))
        x = kernel = out = ""
        if match is not None:
            x, kernel, out = match.groups()
        in_all_three = set(x) & set(kernel) & set(out)
        if match is None or in_all_three:
            raise NaloraError(
                where,
                expected="an einsum of the input and the kernel "
                "without a label that all three have",
                found=text,
                remedy="leave the layer out",
            )
        inner = "".join(label for label in x if label in kernel)
        outer = "".join(label for label in out if label in kernel)
        batch = "".join(label for label in x if label not in kernel)
        return cls(x, kernel, out, inner, outer, batch)


@dataclass(frozen=True)
class Projection:
    """An adapted layer of a model."""

    path: str
    contraction: Contraction
    parameter: str  # name of its kernel
    shape: tuple[int, ...]  # of its kernel, stacked axes included
    rank: int = 0
    scale: float = 1.0
    activation: str = ""  # of a gate

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes that the model stacks (scanned layers, mapped experts)."""
        return self.shape[: len(self.shape) - len(self.contraction.kernel)]

    def sizes(self, labels: str) -> tuple[int, ...]:
        """Returns the sizes of the kernel's axes with these ``labels``, in their order."""
        shape = self.shape[len(self.lead) :]
        size_of = dict(zip(self.contraction.kernel, shape, strict=True))
        return tuple(size_of[label] for label in labels)

    @property
    def widths(self) -> tuple[int, int]:
        """``d_in`` and ``d_out`` of the flattened kernel."""
        d_in = math.prod(self.sizes(self.contraction.inner))
        d_out = math.prod(self.sizes(self.contraction.outer))
        return d_in, d_out

    def init(self, key: jax.Array, mechanisms: Mechanisms) -> dict[str, Any]:
        """Returns a fresh adapter: A random, B zero, float32, and the leaves of a gate."""
        d_in, d_out = self.widths
        a = init_a(key, (*self.lead, d_in, self.rank))
        b = jnp.zeros((*self.lead, self.rank, d_out), jnp.float32)
        leaves: dict[str, Any] = {"a": a, "b": b}
        if self.activation:
            leaves |= gate_leaves(mechanisms, (*self.lead, d_out))
        return leaves

    def output(
        self, x: jax.Array, y: jax.Array, leaves: Mapping[str, Any]
    ) -> jax.Array:
        """Returns the layer's output ``y`` for ``x``, with the adapter's output added."""
        x_labels, _, out, inner, outer, batch = self.contraction
        # Contracted axes last: [batch axes, inner axes] -> [batch axes, d_in].
        rows = jnp.einsum(f"{x_labels}->{batch}{inner}", x)
        lead = rows.shape[: rows.ndim - len(inner)]
        rows = rows.reshape(*lead, -1)
        mask = leaves.get(MASK)
        dz = low_rank(rows, leaves["a"], leaves["b"], self.scale, mask)
        dz = dz.astype(y.dtype)
        base = jnp.einsum(f"{out}->{batch}{outer}", y)
        z = base.reshape(dz.shape) + dz  # [..., d_out]
        if leaves.get(TAPS):
            z = observe(z, dz, leaves[TAPS], self.activation)
        # [batch axes, d_out] -> [batch axes, outer axes]
        lead = z.shape[:-1]
        z = z.reshape(*lead, *self.sizes(outer))
        return jnp.einsum(f"{batch}{outer}->{out}", z)

    def merged(self, kernel: jax.Array, leaves: Mapping[str, Any]) -> jax.Array:
        """Returns the kernel with its adapter added, computed in float32.

        Raises:
          NaloraError: an optimizer without `nalora_jax.method.transform.nalora` moved the taps.
        """
        _require_zero_taps(self.path, leaves)
        _, labels, _, inner, outer, _ = self.contraction
        delta = self.scale * jnp.matmul(
            leaves["a"], leaves["b"], precision=jax.lax.Precision.HIGHEST
        )
        # [lead, d_in, d_out] -> [lead, inner axes, outer axes]
        delta = delta.reshape(*self.lead, *self.sizes(inner), *self.sizes(outer))
        delta = jnp.einsum(f"...{inner}{outer}->...{labels}", delta)
        return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)


def _require_zero_taps(path: str, leaves: Mapping[str, Any]) -> None:
    """Raises a NaloraError if an optimizer has changed the taps of the layer at ``path``.

    Such an optimizer also took the statistics for gradients, and decayed the mask. Within jit the
    values of the taps are unknown and not checked.
    """
    for name, tap in leaves.get(TAPS, {}).items():
        if isinstance(tap, jax.core.Tracer) or not np.any(tap):
            continue
        where = f"lora: {path}/{TAPS}/{name}"
        raise NaloraError(
            where,
            expected="zeros, which `nalora` keeps",
            found="other values: the optimizer trained them",
            remedy="wrap the optimizer: nalora(optax.adamw(...), mechanisms)",
        )


def adapt(
    model: Any,
    layers: Mapping[str, int],
    gates: Mapping[str, str],
    *,
    rules: Sequence[str | Mechanism] = DEFAULT,
    alpha: float | None = None,
    classes: Classes = types.MappingProxyType({}),
    variables: Any = None,
    example: Sequence[Any] = (),
    total_steps: int = 0,
    seed: int = 0,
) -> tuple[Any, Mechanisms]:
    """Returns a model with low-rank adapters, and its rules for the optimizer.

    Layers are `Dense`, `DenseGeneral` and `Einsum` of Linen, `Linear`, `LinearGeneral` and `Einsum`
    of NNX, their subclasses, and ``classes``.

    Args:
      model: a Linen module, which stays unmodified, or an NNX module, of which a copy is adapted.
      layers: ordered pairs of a regular expression and a rank. The expression is searched in a
        layer's path in the model, the first match applies; rank 0 leaves a layer out.
      gates: pairs of a regular expression and the activation after the layer, ``{"wi_0": "silu"}``.
      rules: of the gates, as in ``RunConfig.mechanisms``; ``()`` for plain LoRA.
      alpha: the adapters' scale times their rank; by default twice the rank.
      classes: further classes of layers: ``{MyDense: "...i,io->...o", MyEinsum: "einsum_str"}``
        maps a class to its einsum of input and kernel, or to the attribute with it.
      variables: of a Linen module: arrays or shapes.
      example: arguments of a call of a Linen module; the call is traced to find the layers.
      total_steps: of the run, for rules that depend on its progress.
      seed: of the run: of rules that draw, and of NNX adapters.

    Returns:
      A `LinenAdapters`, or the NNX model; and the argument of `nalora_jax.method.transform.nalora`.

    Raises:
      NaloraError: a pattern without a match, an impossible rank or alpha, an unknown activation or
        rule, an activation that a Linen module does not apply to its gate, or a layer whose einsum
        cannot have an adapter.

    Example:
      >>> gates = {"wi_0": "silu"}
      >>> adapted, mechanisms = adapt(model, {"mlp": 8}, gates, variables=v, example=(x,))
      >>> lora = adapted.init(jax.random.key(0))
      >>> optimizer = nalora(optax.adamw(1e-3), mechanisms)
    """
    chosen = functools.partial(_chosen, layers=layers, gates=gates, alpha=alpha)
    settings = {"total_steps": total_steps, "seed": seed}
    if isinstance(model, nn.Module):
        layers_of_model, program = _linen_layers(model, variables, example, classes)
        projections = chosen(layers_of_model)
        of_gates = {p.path: p.activation for p in projections if p.activation}
        for path, activation in of_gates.items():
            applied.require_activation(program, path, activation)
        mechanisms = _mechanisms(rules, of_gates, settings)
        return LinenAdapters(model, projections, mechanisms), mechanisms
    if not isinstance(model, nnx.Module):
        raise NaloraError(
            "adapt",
            expected="a module of flax.linen or flax.nnx",
            found=type(model).__name__,
        )
    model = nnx.merge(*nnx.split(model), copy=True)
    projections = chosen(_nnx_layers(model, classes))
    _require_one_place(model, projections)
    of_gates = {f"{p.path}/{_LORA}": p.activation for p in projections if p.activation}
    mechanisms = _mechanisms(rules, of_gates, settings)
    keys = jax.random.split(jax.random.key(seed), len(projections))
    for projection, key in zip(projections, keys, strict=True):
        layer = _child(model, projection.path)
        kind: Any = type(layer)
        layer.__class__ = _adapted_class(kind)
        layer.lora = LoRA(projection, projection.init(key, mechanisms))
    return model, mechanisms


def _mechanisms(
    rules: Sequence[str | Mechanism],
    gates: Mapping[str, str],
    settings: Mapping[str, int],
) -> Mechanisms:
    """Returns the rules of a run; ``gates`` are the activations by path of the gates."""
    activation = next(iter(gates.values()))
    others = tuple((path, name) for path, name in gates.items() if name != activation)
    mechanisms = make_mechanisms(rules, activation=activation, **settings)
    return replace(mechanisms, others=others)


# ---------------------------------------------------------------- the choice of layers


def _chosen(
    candidates: Iterable[Projection],
    layers: Mapping[str, int],
    gates: Mapping[str, str],
    alpha: float | None,
) -> tuple[Projection, ...]:
    """Returns the layers that have an adapter, with rank, scale and activation."""
    found = {layer.path: layer for layer in candidates}
    _require_matches("layers", layers, found)
    adapted: dict[str, Projection] = {}
    for path, layer in found.items():
        matching = (pattern for pattern in layers if re.search(pattern, path))
        pattern = next(matching, None)
        if pattern is None or layers[pattern] == 0:
            continue
        rank = layers[pattern]
        most = min(layer.widths)
        scaled = alpha  # the adapter's scale times its rank
        if scaled is None:
            scaled = 2.0 * rank
        if not 0 < rank <= most:
            raise NaloraError(
                f"layers: {pattern!r}",
                expected=f"a rank from 0 to {most}, the smaller side of {path}",
                found=rank,
            )
        if not (math.isfinite(scaled) and scaled > 0):
            raise NaloraError("alpha", expected="a number above 0", found=alpha)
        adapted[path] = replace(layer, rank=rank, scale=scaled / rank)
    _require_matches("gates", gates, adapted)
    if not gates:
        raise NaloraError(
            "gates",
            expected="a pattern and an activation, such as {'gate_proj': 'silu'}",
            found={},
        )
    for gate, activation in gates.items():
        activations.get_activation(activation)
        for path in adapted:
            if re.search(gate, path) and not adapted[path].activation:
                adapted[path] = replace(adapted[path], activation=activation)
                _require_whole_gate(adapted[path], found.values())
    return tuple(adapted[path] for path in sorted(adapted))


def _require_matches(
    where: str, patterns: Mapping[str, Any], found: Mapping[str, Projection]
) -> None:
    """Raises a NaloraError if a pattern matches none of the paths ``found``; ``where`` names the
    patterns' argument of `adapt`."""
    expected = f"a part of one of the paths {', '.join(sorted(found)) or '(none)'}"
    remedy = (
        "a layer of another class needs its einsum: classes={MyDense: '...i,io->...o'}"
    )
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in found):
            raise NaloraError(
                f"{where}: {pattern!r}",
                expected=expected,
                found="no match",
                remedy=remedy,
            )


def _require_whole_gate(gate: Projection, layers: Iterable[Projection]) -> None:
    """Raises a NaloraError if a gate's output has two halves, gate and up: only one half is a gate.

    Such a layer is recognized by the layer next to it that leads back to the gate's input, and has
    half as many inputs as the gate has outputs.
    """
    parent = gate.path.rpartition("/")[0]
    d_model, width = gate.widths
    inputs = []  # widths of the layers that lead back to d_model
    for layer in layers:
        if layer.path == gate.path or layer.path.rpartition("/")[0] != parent:
            continue
        d_in, d_out = layer.widths
        if d_out == d_model:
            inputs.append(d_in)
    if width not in inputs and width / 2 in inputs:
        expected = f"a layer with {width // 2} outputs, the inputs of the layer after the product"
        raise NaloraError(
            f"gates: {gate.path}",
            expected=expected,
            found=f"{width} outputs: gate and up projection in one layer",
            remedy="split the layer in two, or leave it out of the gates",
        )


def _contraction(layer: Any, path: str, classes: Classes) -> Contraction | None:
    """Returns the einsum of a layer by its class; None for other classes."""
    for kind, form in (*classes.items(), *_CLASSES.items()):
        if not isinstance(layer, kind):
            continue
        if callable(form):
            form = form(layer)
        # The value of the attribute with this name, or the einsum itself.
        text = getattr(layer, form, form)
        return Contraction.parse(text, path)
    return None


def _general(outputs: Any, axis: Any, batch: Any) -> str:
    """Returns the einsum of a dense layer with several contracted axes, the last ones of its input.

    For other axes it returns a description, which `Contraction.parse` refuses.
    """
    axis = _as_tuple(axis)
    outputs = _as_tuple(outputs)
    if axis != tuple(range(-len(axis), 0)) or batch:
        return f"axis={axis}, batch axes {batch}"
    inner = "abcdef"[: len(axis)]
    outer = "uvwxyz"[: len(outputs)]
    return f"...{inner},{inner}{outer}->...{outer}"


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """Returns a sequence as a tuple, and another value as a tuple of one."""
    if isinstance(value, Sequence):
        return tuple(value)
    return (value,)


_CLASSES: Classes = {
    nn.Dense: _DENSE,
    nn.DenseGeneral: lambda m: _general(m.features, m.axis, m.batch_dims),
    nn.Einsum: "einsum_str",
    nnx.Linear: _DENSE,
    nnx.LinearGeneral: lambda m: _general(m.out_features, m.axis, m.batch_axis),
    nnx.Einsum: "einsum_str",
}


def _kernel(params: Mapping[str, Any], contraction: Contraction, path: str) -> str:
    """Returns the name of a layer's kernel: ``kernel``, or its only parameter with as many axes as
    the einsum has labels."""
    axes = len(contraction.kernel)
    names = [
        name for name, leaf in params.items() if len(getattr(leaf, "shape", ())) >= axes
    ]
    if "kernel" in names:
        return "kernel"
    if len(names) != 1:
        raise NaloraError(
            path,
            expected=f"one parameter with {axes} axes, or one called kernel",
            found=", ".join(names) or "none",
        )
    return names[0]


# ---------------------------------------------------------------- Linen

_NODE = "nalora"  # name of the adapter's leaves next to a kernel during one call


@dataclass(frozen=True)
class LinenAdapters:
    """A Linen module with adapters.

    Attributes:
      module: the model.
      projections: its adapted layers.
      mechanisms: the rules of its gates.
    """

    module: nn.Module
    projections: tuple[Projection, ...]
    mechanisms: Mechanisms

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns fresh adapters, nested by the layers' paths."""
        keys = jax.random.split(key, len(self.projections))
        leaves = {}
        for projection, key_of_layer in zip(self.projections, keys, strict=True):
            leaves[projection.path] = projection.init(key_of_layer, self.mechanisms)
        return trees.unflatten(leaves)

    def apply(self, variables: Any, lora: Any, *args: Any, **options: Any) -> Any:
        """Returns ``module.apply(variables, *args, **options)`` with the adapters ``lora``.

        Raises:
          NaloraError: the call does not reach a layer with an adapter.
        """
        by_path = {p.path: p for p in self.projections}
        reached = set()
        params = unfreeze(variables["params"])
        for path in by_path:
            params = _with(params, f"{path}/{_NODE}", _node(lora, path))

        def add(module: nn.Module, path: str, x: Any, y: jax.Array) -> jax.Array:
            """Returns the layer's output with that of its adapter, if it has one."""
            if path not in by_path:
                return y
            reached.add(path)
            return by_path[path].output(x, y, module.get_variable("params", _NODE))

        with nn.intercept_methods(_on_calls(add)):
            result = self.module.apply(
                {**variables, "params": params}, *args, **options
            )
        missed = sorted(by_path.keys() - reached)
        if missed:
            raise NaloraError(
                missed[0], expected="a call, as with the example", found="none"
            )
        return result

    def merge(self, variables: Any, lora: Any) -> Any:
        """Returns the variables with every adapter folded into its kernel, for serving."""
        params = unfreeze(variables["params"])
        for p in self.projections:
            # A parameter may be in a box with its sharding.
            boxed = _node(params, p.path)[p.parameter]
            kernel = p.merged(nn.meta.unbox(boxed), _node(lora, p.path))
            merged = nn.meta.replace_boxed(boxed, kernel)
            params = _with(params, f"{p.path}/{p.parameter}", merged)
        return {**variables, "params": params}


def _linen_layers(
    module: nn.Module, variables: Any, example: Sequence[Any], classes: Classes
) -> tuple[list[Projection], Any]:
    """Returns the layers of a call that can have an adapter, and the program of the call."""
    if variables is None:
        where = "adapt(..., variables=)"
        raise NaloraError(
            where, expected="the variables of the Linen module", found=None
        )
    stored = nn.meta.unbox(unfreeze(variables["params"]))
    found = {}

    def record(layer: nn.Module, path: str, x: Any, y: Any) -> Any:
        """Adds the layer to ``found`` at its first call; returns ``y``, tagged with its path."""
        contraction = None
        if path:
            contraction = _contraction(layer, path, classes)
        if contraction is None:
            return y
        if path not in found:
            params = nn.meta.unbox(unfreeze(layer.variables)).get("params", {})
            name = _kernel(params, contraction, path)
            shape = _node(stored, path)[name].shape
            found[path] = Projection(path, contraction, name, shape)
        return applied.tag(y, path)

    def call(variables: Any, example: Any) -> Any:
        with nn.intercept_methods(_on_calls(record)):
            return module.apply(variables, *example)

    program = jax.make_jaxpr(call)(variables, tuple(example))
    return list(found.values()), program


def _on_calls(function: Callable[..., Any]) -> Any:
    """Returns an interceptor that passes ``(module, path, x, y)`` of every call to a function."""
    inside: list[str] = []  # paths of the calls that have not returned

    def intercept(call: Any, args: Any, options: Any, context: Any) -> Any:
        """Calls the method, and ``function`` with its input and output if it is the call of a
        layer."""
        path = "/".join(context.module.path)
        # A transformed class (nn.remat(nn.Dense)) calls itself again under the same path.
        if context.method_name != "__call__" or path in inside or not args:
            return call(*args, **options)
        inside.append(path)
        try:
            y = call(*args, **options)
        finally:
            inside.pop()
        return function(context.module, path, args[0], y)

    return intercept


def _node(tree: Mapping[str, Any], path: str) -> Any:
    """Returns the node at a path such as "layers/ffn"."""
    return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


def _with(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Returns ``tree`` with another value at a path; nodes off the path are shared."""
    first, _, below = path.partition("/")
    if below:
        value = _with(tree[first], below, value)
    return {**tree, first: value}


# ---------------------------------------------------------------- NNX

_LORA = "lora"  # attribute of an adapted layer


class LoRAFactor(nnx.LoRAParam):
    """A or B of an adapter."""


class GateLeaf(nnx.LoRAParam):
    """A tap or the mask of a gate, which `nalora_jax.method.transform.nalora` sets."""


class LoRA(nnx.Module):
    """The adapter of an NNX layer: ``a``, ``b``, and of a gate ``taps`` and maybe ``mask``."""

    def __init__(self, projection: Projection, leaves: Mapping[str, Any]) -> None:
        """Makes variables of the ``leaves`` of a fresh adapter, from `Projection.init`."""
        self.projection = projection
        self.a = LoRAFactor(leaves["a"])
        self.b = LoRAFactor(leaves["b"])
        if TAPS in leaves:
            taps = {name: GateLeaf(tap) for name, tap in leaves[TAPS].items()}
            self.taps = nnx.data(taps)
        if MASK in leaves:
            self.mask = GateLeaf(leaves[MASK])

    @property
    def leaves(self) -> dict[str, Any]:
        """The arrays, as `Projection.output` takes them."""
        leaves = {"a": self.a[...], "b": self.b[...]}
        if hasattr(self, TAPS):
            leaves[TAPS] = {name: tap[...] for name, tap in self.taps.items()}
        if hasattr(self, MASK):
            leaves[MASK] = self.mask[...]
        return leaves


def merge_nnx(model: Any) -> Any:
    """Returns a copy of an adapted NNX model with its adapters merged into the kernels."""
    model = nnx.merge(*nnx.split(model), copy=True)
    for _, layer in list(nnx.iter_modules(model)):
        adapter = vars(layer).get(_LORA)
        if not isinstance(adapter, LoRA):
            continue
        kernel = getattr(layer, adapter.projection.parameter)
        kernel[...] = adapter.projection.merged(kernel[...], adapter.leaves)
        del layer.lora
        # the class that `_adapted_class` derived from
        layer.__class__ = type(layer).__bases__[0]
    return model


def _nnx_layers(model: Any, classes: Classes) -> list[Projection]:
    """Returns the layers of a model that can have an adapter."""
    found = []
    for keys, layer in nnx.iter_modules(model):
        path = "/".join(map(str, keys))
        contraction = _contraction(layer, path, classes)
        if not path or contraction is None:
            continue
        params = {
            name: leaf
            for name, leaf in vars(layer).items()
            if isinstance(leaf, nnx.Param)
        }
        name = _kernel(params, contraction, path)
        found.append(Projection(path, contraction, name, params[name].shape))
    return found


def _require_one_place(model: Any, projections: Sequence[Projection]) -> None:
    """Raises an error if the model has an adapted layer, or its kernel, at two places."""
    places: Counter[int] = Counter()
    for _, module in nnx.iter_modules(model):
        places.update(id(child) for _, child in nnx.iter_children(module))
    for p in projections:
        layer = _child(model, p.path)
        kernel = getattr(layer, p.parameter)
        if places[id(layer)] > 1 or places[id(kernel)] > 1:
            raise NaloraError(
                p.path, expected="a layer with one place in the model", found="two"
            )


def _child(model: Any, path: str) -> Any:
    """Returns the module at a path such as "layers/0/mlp" (attributes, indices or keys)."""

    def step(node: Any, name: str) -> Any:
        """Returns the attribute ``name`` of a node, or its item with that index or key."""
        if hasattr(node, name):
            return getattr(node, name)
        if name.isdigit():
            return node[int(name)]
        return node[name]

    return functools.reduce(step, path.split("/"), model)


@functools.cache
def _adapted_class(kind: Any) -> Any:
    """Returns a subclass of a layer's class, which adds the output of its adapter ``lora`` to the
    layer's."""

    def call(self: Any, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        y = kind.__call__(self, x, *args, **options)
        return self.lora.projection.output(x, y, self.lora.leaves)

    return types.new_class(
        f"LoRA{kind.__name__}", (kind,), {}, lambda body: body.update(__call__=call)
    )
