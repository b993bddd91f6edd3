"""Adapters of layers whose values are the keys' projection (Gemma 4), in vLLM's form.

vLLM loads the weight of ``k_proj`` into the slots of keys and of values, but an adapter only into
the slot of its name: without a copy named ``v_proj`` it would serve values of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from nalora_jax.models.config import ModelConfig
from nalora_jax.weights.peft_files import Entry
from nalora_jax.weights.peft_modules import ModuleLayout, layers_with

_KEYS, _VALUES = "layers/attn/k_proj", "layers/attn/v_proj"


def copies_for_values(entries: list[Entry], config: ModelConfig) -> list[Entry]:
    """Returns the adapters of ``k_proj`` under the name ``v_proj``, in layers without a ``v_proj``."""
    layers = _layers(config)
    keys = [entry for entry in entries if entry.module.parts == (_KEYS,) and entry.layer in layers]
    return [replace(entry, name=_values_name(entry.name)) for entry in keys]


def without_copies(
    modules: Mapping[str, dict[str, np.ndarray]], config: ModelConfig, layout: ModuleLayout
) -> dict[str, dict[str, np.ndarray]]:
    """Returns a file's modules without the copies of `copies_for_values`, which equal their original."""
    names = [
        layout.full_name(layer, module)
        for module in layout.modules
        if module.parts == (_KEYS,)
        for layer in _layers(config)
    ]
    copies = {_values_name(name) for name in names if _equal(modules, name, _values_name(name))}
    return {name: tensors for name, tensors in modules.items() if name not in copies}


def _layers(config: ModelConfig) -> frozenset[int]:
    return layers_with(config, _KEYS, experts=False) - layers_with(config, _VALUES, experts=False)


def _values_name(name: str) -> str:
    return f"{name.removesuffix('k_proj')}v_proj"


def _equal(modules: Mapping[str, dict[str, Any]], name: str, other: str) -> bool:
    """Returns True if both modules are in the file with the same tensors."""
    first, second = modules.get(name, {}), modules.get(other, {})
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)
