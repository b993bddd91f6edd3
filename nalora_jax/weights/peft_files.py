"""Settings and tensors of an adapter's files, as PEFT names them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nalora_jax.models.config import ModelConfig
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.weights.peft_modules import (
    HostModule,
    ModuleAdapter,
    ModuleLayout,
    alpha_for,
    layers_with,
)
from nalora_jax.weights.token_rows import token_settings


@dataclass(frozen=True)
class Entry:
    """One module's adapter, under its full name."""

    name: str
    layer: int
    module: HostModule
    adapter: ModuleAdapter
    stacked: bool = False  # of all experts
    parameter: bool = False  # named in target_parameters


def common(values: Iterable[Any]) -> Any:
    """Returns the most frequent value; the first of them if several are equally frequent."""
    return Counter(values).most_common(1)[0][0]


def adapter_tensors(entries: list[Entry], layout: ModuleLayout) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and the array of each tensor."""
    stacks = {(entry.layer, entry.module.name) for entry in entries if entry.stacked}
    for entry in entries:
        key, a, b = entry.name, entry.adapter.a.T, entry.adapter.b.T
        if entry.stacked:
            # PEFT wraps the experts once per parameter; the last parameter registered is the
            # outermost.
            later = layout.parameters[layout.parameters.index(entry.module) + 1 :]
            depth = sum((entry.layer, module.name) in stacks for module in later)
            key = entry.name.rpartition(".")[0] + ".base_layer" * depth
            # [experts, d_in, r] -> [experts * r, d_in]; [experts, r, d_out] -> [d_out, r * experts]
            a = entry.adapter.a.transpose(0, 2, 1).reshape(-1, entry.adapter.a.shape[1])
            b = entry.adapter.b.transpose(2, 1, 0).reshape(entry.adapter.b.shape[2], -1)
        yield f"base_model.model.{key}.lora_A.weight", np.ascontiguousarray(a)
        yield f"base_model.model.{key}.lora_B.weight", np.ascontiguousarray(b)
        if entry.adapter.magnitude is not None:
            yield (
                f"base_model.model.{key}.lora_magnitude_vector",
                np.ascontiguousarray(entry.adapter.magnitude),
            )


def decoder_settings(
    entries: list[Entry], config: ModelConfig, layout: ModuleLayout, spec: AdapterSpec, *, rslora: bool
) -> dict[str, Any]:
    """Returns ``adapter_config.json`` of a decoder's adapter without the base model's name."""
    modules = [entry for entry in entries if not entry.parameter]
    parameters = [entry for entry in entries if entry.parameter]
    targets = _target_modules(modules, config, layout)
    settings = adapter_settings(entries, spec, targets, rslora=rslora)
    settings |= {"task_type": "CAUSAL_LM"} | token_settings(spec)
    if parameters:
        settings["target_parameters"] = _target_parameters(parameters, config)
    return settings


def adapter_settings(
    entries: list[Entry], spec: AdapterSpec, targets: list[str], *, rslora: bool
) -> dict[str, Any]:
    """Returns the fields of ``adapter_config.json`` that adapters of all kinds of models have."""
    ranks = {entry.name: entry.adapter.rank for entry in entries}
    alphas = {
        entry.name: _number(alpha_for(entry.adapter.scale, entry.adapter.rank, rslora=rslora))
        for entry in entries
    }
    rank, rank_pattern = _pattern(ranks, entries)
    alpha, alpha_pattern = _pattern(alphas, entries)
    return {
        "alpha_pattern": alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": list(spec.saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": targets,
        "task_type": None,
        "use_dora": spec.dora,
        "use_rslora": rslora,
    }


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _pattern(values: Mapping[str, Any], entries: list[Entry]) -> tuple[Any, dict[str, Any]]:
    """Returns a default value and a pattern for the modules with another value.

    The default is the parameters' most frequent value, otherwise the most frequent of all. Keys
    are ``mlp.up_proj`` if all layers agree, full names otherwise.
    """
    parameters = [values[entry.name] for entry in entries if entry.parameter]
    usual = common(parameters or values.values())
    modules: dict[str, list[str]] = {}
    for entry in entries:
        modules.setdefault(entry.module.name, []).append(entry.name)
    pattern = {}
    for module, names in modules.items():
        members_of = {values[name] for name in names}
        if members_of == {usual}:
            continue
        if len(members_of) == 1 and "{layer}" not in module:
            pattern[module] = members_of.pop()
        else:
            pattern |= {name: values[name] for name in names if values[name] != usual}
    return usual, dict(sorted(pattern.items()))


def _target_modules(entries: list[Entry], config: ModelConfig, layout: ModuleLayout) -> list[str]:
    """Returns short names of modules that are adapted in all layers, full names of the others."""
    adapted: dict[str, set[str]] = {}
    for entry in entries:
        adapted.setdefault(short_name(entry.name), set()).add(entry.name)
    names_of: dict[str, set[str]] = {}
    for module in layout.modules:
        for layer in layers_with(config, module.parts[0], experts=False):
            names_of.setdefault(short_name(module.name), set()).add(layout.full_name(layer, module))
    names: set[str] = set()
    for last, members in adapted.items():
        # A vision tower has modules with the same short names as the decoder.
        if config.sight is None and members >= names_of.get(last, set()):
            members = {last}
        names |= members
    return sorted(names)


def short_name(name: str) -> str:
    """Returns the last part of a module's name."""
    return name.rpartition(".")[2]


def _target_parameters(entries: list[Entry], config: ModelConfig) -> list[str]:
    """Returns names within the layer of parameters adapted in all layers, full names of the others."""
    names: set[str] = set()
    for module in {entry.module for entry in entries}:
        members = [entry for entry in entries if entry.module == module]
        stacked = members[0].stacked
        listed = {entry.name for entry in members}
        if {entry.layer for entry in members} == layers_with(config, module.parts[0], experts=stacked):
            listed = {module.name}
        weight = "" if stacked else ".weight"
        names |= {name + weight for name in listed}
    return sorted(names)
