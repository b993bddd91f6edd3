"""A family of models as one record: every fact that distinguishes it from other families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nalora_jax.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.tensors import Rows

Reader = Callable[[Fields, str], ModelConfig]


@dataclass(frozen=True)
class Family:
    """The facts of one ``model_type``."""

    name: str  # the ``model_type``
    class_name: str  # of transformers' causal model
    read: Reader  # returns the config of the fields of a config.json
    tensors: Rows  # transformers' names; PEFT's names follow from them
    # transformers' defaults of fields that a file may omit.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    experts: str = "mlp.experts"  # transformers' module of all experts of a layer
