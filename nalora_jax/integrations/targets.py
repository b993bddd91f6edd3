"""Selection of the projections of a user's model that get an adapter, and of its gates."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nalora_jax import path_rules
from nalora_jax.config import LoRAConfig
from nalora_jax.errors import NaloraError
from nalora_jax.integrations.layers import Contraction, Unfit
from nalora_jax.method import activations
from nalora_jax.method.optimizer import find_gates
from nalora_jax.models.targets import adapter_scale

log = logging.getLogger(__name__)

Keymap = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Projection:
    """A layer of the user's model with a kernel: its contraction, or why it cannot be adapted."""

    own: str  # its path in the user's model, e.g. "blocks_3/mlp/w1"
    lead: tuple[int, ...]  # axes that the model stacks (scanned layers, mapped experts)
    layer: Contraction | Unfit

    @property
    def dense(self) -> Contraction:
        """Returns the contraction; an `Unfit` layer has none."""
        assert isinstance(self.layer, Contraction)
        return self.layer

    @property
    def inputs(self) -> tuple[int, ...]:
        """The axes of the kernel that are contracted with the last axes of x."""
        return self.dense.inputs

    @property
    def outputs(self) -> tuple[int, ...]:
        """The kernel's other axes."""
        return self.dense.outputs

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of the stored kernel."""
        if self.dense.transposed:
            return (*self.lead, *self.outputs, *self.inputs)
        return (*self.lead, *self.inputs, *self.outputs)


@dataclass(frozen=True)
class Target:
    """An adapted projection."""

    projection: Projection
    path: str  # its name by the keymap, e.g. "layers/3/ffn/gate_proj"
    rank: int
    scale: float
    gate: str = ""  # the activation function after it; "" if it is not a gate


def flat_shape(projection: Projection) -> tuple[tuple[int, ...], int, int]:
    """Returns the stacked axes of a projection and its numbers of inputs and outputs."""
    return projection.lead, math.prod(projection.inputs), math.prod(projection.outputs)


def choose_targets(
    projections: Sequence[Projection], keymap: Keymap, lora: LoRAConfig, activation: str
) -> tuple[Target, ...]:
    """Returns the adapters that the rules give a model's projections.

    Args:
      projections: all projections of the model.
      keymap: see `adapt_linen`.
      lora: rules, searched in the keymap's names, and ``rslora``.
      activation: the activation function after the gates.

    Raises:
      NaloraError: a pattern of the keymap or a rule has no match, two projections have one name,
        a rank or alpha is out of range, a variant needs the layer's code, or a layer does not
        compute ``x @ kernel + bias``.
    """
    _check_variant(lora)
    activations.get(activation)  # raises an error for an unknown name, even without gates
    named = _named(projections, keymap)
    patterns = [(rule.pattern, rule) for rule in lora.rules]
    rules = path_rules.match_rules(patterns, named, where="lora.rules")
    dense = {path for path in rules if isinstance(named[path].layer, Contraction)}
    usable = {rules[path].pattern for path in dense}  # patterns that match a layer that can be adapted
    targets = []
    for path, rule in rules.items():
        where = f"lora.rules {rule.pattern!r}"
        if rule.rank == 0 or not _fits(named[path], path, where, rule.pattern in usable):
            continue
        _, d_in, d_out = flat_shape(named[path])
        alpha = 2.0 * rule.rank if rule.alpha is None else rule.alpha
        if not 0 < rule.rank <= min(d_in, d_out):
            limit = f"0 to {min(d_in, d_out)} (the smaller side of {path})"
            raise NaloraError(f"{where}: rank", expected=limit, found=rule.rank)
        if not (math.isfinite(alpha) and alpha > 0):
            raise NaloraError(f"{where}: alpha", expected="a number above 0", found=alpha)
        scale = adapter_scale(alpha, rule.rank, rslora=lora.rslora)
        gate = ""
        if find_gates({path: {"b": 0}}):
            gate = activation
            _check_gate(path, named)
        targets.append(Target(named[path], path, rule.rank, scale, gate))
    if not targets:
        raise NaloraError("lora.rules", expected="at least one adapter", found="rank 0 everywhere")
    if not any(target.gate for target in targets):
        log.warning(
            "no adapter is on a gate (gate_proj or in_proj by the keymap): the mechanisms have no effect"
        )
    return tuple(targets)


def _check_gate(path: str, named: Mapping[str, Projection]) -> None:
    """Raises an error if a gate's output consists of two halves, gate and up.

    Only one half is a gate. Such a layer is recognised by the layer that leads back to the width of
    the gate's input: it has half as many inputs as the gate has outputs.

    Raises:
      NaloraError: names both layers.
    """
    gate = named[path]
    _, d_model, width = flat_shape(gate)
    places = {path.rpartition("/")[0], gate.own.rpartition("/")[0]}
    near = [
        (each.own, *flat_shape(each)[1:])
        for name, each in named.items()
        if {name.rpartition("/")[0], each.own.rpartition("/")[0]} & places
        and isinstance(each.layer, Contraction)
    ]
    back = {
        module_path: d_in
        for module_path, d_in, d_out in near
        if d_out == d_model and module_path != gate.own
    }
    half = next((module_path for module_path, d_in in back.items() if 2 * d_in == width), None)
    if half is not None and width not in back.values():
        raise NaloraError(
            f"keymap: {gate.own}",
            expected=f"a gate with as many outputs as {half} has inputs, {width // 2}",
            found=f"{width} outputs: gate and up projection in one layer",
            remedy="split the layer in two, or give it another name, such as gate_up_proj, without the mechanisms",
        )


def _fits(projection: Projection, path: str, where: str, others_fit: bool) -> bool:
    """Returns True if a layer that a rule matches is adapted.

    A layer that only resembles a dense one is an error. Embeddings, convolutions and the like that
    a wide pattern matches together with dense layers stay unadapted, with a warning.
    """
    if isinstance(projection.layer, Contraction):
        return True
    if others_fit and not projection.layer.dense:
        log.warning("%s finds %s, which is left as it is: %s", where, path, projection.layer.reason)
        return False
    raise NaloraError(
        f"{where}: {projection.own}",
        expected="a layer that computes x @ kernel + bias",
        found=f"another one: {projection.layer.reason}",
        remedy="leave it out with a rule of rank 0 before this one",
    )


def _check_variant(lora: LoRAConfig) -> None:
    asked = {"dora": lora.dora, "dropout": lora.dropout > 0, "init": lora.init != "default"}
    asked |= {name: bool(getattr(lora, name)) for name in ("modules_to_save", "trainable_token_indices")}
    for name, on in asked.items():
        if on:
            setting = f"{name}={getattr(lora, name)!r}"
            expected = "LoRA or rsLoRA, which need a layer's input and output alone"
            raise NaloraError("lora", expected=expected, found=setting)


def _named(projections: Sequence[Projection], keymap: Keymap) -> dict[str, Projection]:
    """Returns projections by the keymap's names; unmentioned projections keep their path."""
    paths = [projection.own for projection in projections]
    path_rules.match_rules([(f"^(?:{pattern})$", to) for pattern, to in keymap], paths, where="keymap")
    named: dict[str, Projection] = {}
    for projection in projections:
        path = _renamed(projection.own, keymap)
        if path in named:
            paths_of_both = f"{named[path].own} and {projection.own}"
            raise NaloraError("keymap", expected=f"one projection called {path}", found=paths_of_both)
        named[path] = projection
    return named


def _renamed(path: str, keymap: Keymap) -> str:
    matches = ((re.fullmatch(pattern, path), to) for pattern, to in keymap)
    return next((match.expand(to) for match, to in matches if match), path)
