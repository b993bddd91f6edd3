"""Families from outside the package: by `register_family`, or an entry point whose module uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nalora_jax.errors import NaloraError
from nalora_jax.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.registry import Registry

# Names of this library's own families (`nalora_jax.models.families`).
RESERVED: set[str] = set()


@dataclass(frozen=True)
class Family:
    """A family from outside."""

    reader: Callable[[Fields, str], ModelConfig]
    defaults: Mapping[str, Any]
    # The family of this library whose tensors' names it shares in safetensors files, or rows of its own
    # (`nalora_jax.weights.keytables.Row`).
    tensors: Any


def register_family(
    model_type: str, *, defaults: Mapping[str, Any] | None = None, tensors: Any = "llama"
) -> Callable[[Callable[[Fields, str], ModelConfig]], Callable[[Fields, str], ModelConfig]]:
    """A decorator that makes a reader of configs selectable by a config.json's ``model_type``.

    The reader gets the file's `nalora_jax.fields.Fields` and the name, and returns a `ModelConfig`;
    `base_config` reads what every family has.

    Args:
      model_type: as the file has it.
      defaults: values of fields that a file may leave out.
      tensors: see `Family`.

    Raises:
      NaloraError: the name is one of this library's families.
    """

    def register(reader: Callable[[Fields, str], ModelConfig]) -> Callable[[Fields, str], ModelConfig]:
        if model_type in RESERVED:
            raise NaloraError(f"family {model_type!r}", expected="a name that is free", found="one of this library's")
        FAMILIES.add(model_type, Family(reader, dict(defaults or {}), tensors), replace=True)
        return reader

    return register


def tensors_of(model_type: str) -> Any:
    """Where a family from outside says that its tensors' names are (`Family.tensors`); None if there is no such one."""
    return FAMILIES.get(model_type).tensors if model_type in FAMILIES else None


FAMILIES: Registry[Family] = Registry("family", "nalora_jax.families")
