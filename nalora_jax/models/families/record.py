"""A family of models as one record: every fact that distinguishes it from other families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from nalora_jax.common.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.tensors import Rows
from nalora_jax.models.ropes import RopeRules

Reader = Callable[[Fields, str], ModelConfig]


class Metadata(Protocol):
    """Metadata of a GGUF file, by the part of a key after the name of the architecture."""

    def has(self, key: str) -> bool:
        """Returns True if the file has the key."""
        ...

    def number(self, key: str, kind: type[Any], default: Any = None) -> Any:
        """Returns a number or a text; a list with one value per layer counts if all values are equal."""
        ...

    def flags(self, key: str, length: int) -> list[bool]:
        """Returns a list of ``length`` booleans."""
        ...

    def scaling(self) -> dict[str, Any] | None:
        """Returns the scaling of RoPE that the file names, or None."""
        ...

    def refuse_window(self) -> None:
        """Raises an error if the file has a sliding window."""
        ...


def without_window(r: Metadata) -> dict[str, Any]:
    """Returns no further settings; a sliding window is refused."""
    r.refuse_window()
    return {}


@dataclass(frozen=True)
class GGUF:
    """A family's files for llama.cpp."""

    architecture: str
    tensors: Rows  # llama.cpp's names
    # Returns fields of config.json that other architectures do not store, or that llama.cpp hard-codes.
    settings: Callable[[Metadata], dict[str, Any]] = without_window
    # True if a file of the architecture, which several families may share, is of this one.
    matches: Callable[[Metadata], bool] = lambda r: True


@dataclass(frozen=True)
class Family:
    """The facts of one ``model_type``."""

    name: str  # the ``model_type``
    class_name: str  # of transformers' causal model; "" if unknown
    read: Reader  # returns the config of the fields of a config.json
    tensors: Rows  # transformers' names; PEFT's names follow from them
    # transformers' defaults of fields that a file may omit.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    gguf: GGUF | None = None  # None: llama.cpp's names are not known here
    checks: tuple[str, ...] = ()  # fields that other families must not use and that `read` checks
    ignored: tuple[str, ...] = ()  # expressions of further tensors; "{n_layers}" is the number of layers
    ropes: RopeRules = field(default_factory=RopeRules)
    experts: str = "mlp.experts"  # transformers' module of all experts of a layer
    multimodal: str = ""  # ``model_type`` of multimodal models of which only this text model is supported
    stacks_in_vllm: bool = False  # vLLM reads adapters of such a model's experts as stacks, not one by one
