"""Families from outside the package, added by `register_family` or by an entry point.

The module of an entry point calls `register_family`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.common.registry import Registry
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """A family from outside the package."""

    reader: Callable[[Fields, str], ModelConfig]
    defaults: Mapping[str, Any]
    # The built-in family whose tensor names its safetensors files use, or rows of a custom table
    # (`nalora_jax.weights.keytables.Row`).
    tensors: Any


def register_family(
    model_type: str, *, defaults: Mapping[str, Any] | None = None, tensors: Any = "llama"
) -> Callable[[Callable[[Fields, str], ModelConfig]], Callable[[Fields, str], ModelConfig]]:
    """Returns a decorator that registers a reader of configs for a ``model_type``.

    The reader receives the file's `nalora_jax.common.fields.Fields` and the name, and returns a
    `ModelConfig`; `base_config` reads the fields that all families share.

    Args:
      model_type: the value in the ``config.json``.
      defaults: values of fields that a file may omit.
      tensors: see `Family`.

    Raises:
      NaloraError: the name is a built-in family.
    """

    def register(reader: Callable[[Fields, str], ModelConfig]) -> Callable[[Fields, str], ModelConfig]:
        families = import_module("nalora_jax.models.families")  # which imports this module
        if model_type in families.built_in():
            raise NaloraError(
                f"family {model_type!r}", expected="a name that is free", found="one of this library's"
            )
        FAMILIES.add(model_type, Family(reader, dict(defaults or {}), tensors), replace=True)
        return reader

    return register


def tensors_of(model_type: str) -> Any:
    """Returns `Family.tensors` of a registered family; None if there is no such family."""
    if model_type not in FAMILIES:
        return None
    return FAMILIES.get(model_type).tensors


FAMILIES: Registry[Family] = Registry("family", "nalora_jax.families")
