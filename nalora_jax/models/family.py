"""Families of models: the record of one ``model_type``, and the reading of a ``config.json``.

Both forms of ``config.json`` are read: transformers 4 (``rope_theta``, ``rope_scaling``) and 5
(``rope_parameters``). Features that are not implemented raise an error that names them.
`nalora_jax.models.families` has this library's records.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from nalora_jax.common.fields import Fields
from nalora_jax.common.registry import Registry
from nalora_jax.config.rope_scaling import ORIGINAL
from nalora_jax.errors import NaloraError
from nalora_jax.models.readers import base_values, fields_of_layers
from nalora_jax.models.ropes import RopeRules
from nalora_jax.models.tensor_rows import Rows

if TYPE_CHECKING:
    from nalora_jax.models.vision.patch_config import PatchSpec
    from nalora_jax.models.vision.vision_config import VisionSpec


class Architecture(Protocol):
    """A `ModelConfig`, of which only the names and values of its fields are read here."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Features = dict[str, Any]  # fields of `ModelConfig`
Reader = Callable[[Fields, str], Architecture]
# from the file's fields, and the width of the text model
VisionReader = Callable[[Fields, int], "VisionSpec | PatchSpec"]


class Metadata:
    """Metadata of a GGUF file, by the part of a key after a prefix such as the name of the
    architecture.

    Args:
      values: numbers, strings, numpy arrays, or lists of strings by key.
      prefix: what precedes a key and its dot.
      where: the file.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str, where: str) -> None:
        self.values = values
        self.prefix = prefix
        self.where = where

    def error(
        self, key: str, expected: object, found: object, remedy: str = ""
    ) -> NaloraError:
        """Returns an error that names the key."""
        return NaloraError(
            f"{self.where}: {self.prefix}.{key}",
            expected=expected,
            found=found,
            remedy=remedy,
        )

    def has(self, key: str) -> bool:
        """Returns True if the file has the key."""
        return f"{self.prefix}.{key}" in self.values

    def get(self, key: str, kind: type[Any], default: Any = None) -> Any:
        """Returns the value of ``key`` as ``kind``; an int is accepted as a float.

        A list with one value per layer counts as this value if all are equal.

        Raises:
          NaloraError: the key is missing and has no default, its value has another type, or layers
            differ.
        """
        value = self.values.get(f"{self.prefix}.{key}", default)
        if isinstance(value, np.ndarray) and kind is not np.ndarray:
            if value.size == 0 or (value != value[0]).any():
                remedy = "models whose layers differ in shape are not supported"
                raise self.error(
                    key, "the same value for every layer", value[:8].tolist(), remedy
                )
            value = value[0].item()
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            if value is None:
                actual = "no such key"
            else:
                actual = f"{type(value).__name__} {str(value)[:40]}"
            raise self.error(key, {np.ndarray: "list"}.get(kind, kind.__name__), actual)
        return value

    def flags(self, key: str, length: int) -> list[bool]:
        """Returns a list of ``length`` booleans."""
        value = self.get(key, np.ndarray)
        if value.dtype != bool or value.shape != (length,):
            raise self.error(key, f"{length} booleans", str(value)[:60])
        return value.tolist()

    def scaling(self) -> dict[str, Any] | None:
        """Returns the scaling of RoPE that the file names, or None."""
        kind = self.get("rope.scaling.type", str, "none")
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": self.get("rope.scaling.factor", float)}
        if kind == "yarn":
            scaling[ORIGINAL] = self.get("rope.scaling.original_context_length", int)
            for key in ("beta_fast", "beta_slow"):
                if self.has(f"rope.scaling.yarn_{key}"):
                    scaling[key] = self.get(f"rope.scaling.yarn_{key}", float)
            # llama.cpp assumes mscale 1
            if self.has("rope.scaling.yarn_log_multiplier"):
                all_dim = self.get("rope.scaling.yarn_log_multiplier", float)
                scaling |= {"mscale": 1.0, "mscale_all_dim": all_dim}
        return scaling


def refuse_window(r: Metadata) -> dict[str, Any]:
    """Returns no further settings; a sliding window is refused."""
    if window := r.get("attention.sliding_window", int, 0):
        expected = "no sliding window for this architecture"
        remedy = "this variant is not supported"
        raise r.error("attention.sliding_window", expected, window, remedy)
    return {}


@dataclass(frozen=True)
class GGUF:
    """A family's files for llama.cpp."""

    architecture: str
    tensors: Rows  # llama.cpp's names
    # Returns fields of config.json that other architectures do not store, or that llama.cpp
    # hard-codes.
    settings: Callable[[Metadata], dict[str, Any]] = refuse_window
    # True if a file of the architecture, which several families may share, is of this one.
    matches: Callable[[Metadata], bool] = lambda r: True
    # Uniform paths of projections whose adapters llama.cpp ignores or refuses.
    unserved: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """The facts of one ``model_type``."""

    name: str  # the ``model_type``
    class_name: str  # of transformers' causal model; "" if unknown
    # Returns the fields of the config that differ from `base_values`.
    features: Callable[[Fields], Features]
    tensors: Rows  # transformers' names; PEFT's names follow from them
    # transformers' defaults of fields that a file may omit.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    gguf: GGUF | None = None  # None: llama.cpp's names are not known here
    checks: tuple[
        str, ...
    ] = ()  # fields that other families must not use and that `features` checks
    ignored: tuple[
        str, ...
    ] = ()  # expressions of further tensors; "{n_layers}" is the number of layers
    ropes: RopeRules = field(default_factory=RopeRules)
    experts: str = "mlp.experts"  # transformers' module of all experts of a layer
    # ``model_type`` of multimodal models, of which without images only this text model is read
    multimodal: str = ""
    # Returns `RopeSpec.axes` of this number of rotated pairs, in a model with images only.
    image_axes: Callable[[Fields, int], tuple[int, ...]] | None = None
    reader: Reader | None = (
        None  # of a family from outside the package, in place of ``features``
    )
    stacks_in_vllm: bool = (
        False  # vLLM reads adapters of such a model's experts as stacks, not one by one
    )
    # Uniform paths of projections whose adapters vLLM loads and never applies.
    unserved_in_vllm: tuple[str, ...] = ()


# transformers' names of fields that `ModelConfig` names otherwise.
_THEIRS = {
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "n_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
}


def hf_defaults(**fields: Any) -> dict[str, Any]:
    """Returns `Family.defaults` of fields by the names of `ModelConfig`, or by transformers'."""
    return {_THEIRS.get(name, name): value for name, value in fields.items()}


# Families by ``model_type``: this library's, which `nalora_jax.models.families` enters, and those
# from outside the package, added by `register_family` or by an entry point, whose module calls it.
BUILT_IN: dict[str, Family] = {}
REGISTERED: Registry[Family] = Registry("family", "nalora_jax.families")
# Multimodal models by ``model_type``: the reader of tower and projector, and defaults of fields of
# the file and of its text model.
MULTIMODAL: dict[str, tuple[VisionReader, dict[str, Any], dict[str, Any]]] = {}
_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}
# Features that no family has, except those that check the field; with the remedy.
_REFUSED = {
    "use_bidirectional_attention": "",
    "output_router_logits": "",
    "router_jitter_noise": "",
}
# Families whose attention is not implemented, by ``model_type``; with the remedy.
_SPARSE = "its attention to selected tokens (a sparse index) is not implemented"
_UNSUPPORTED = dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), _SPARSE)
UNQUANTIZED = "load the unquantized model"
# Quantized files (``quant_method``) that all families read, with `nalora_jax.weights.quantized`.
QUANTIZED = (
    "awq",
    "compressed-tensors",
    "fbgemm_fp8",
    "fp8",
    "gptq",
    "modelopt",
    "quark",
)


def family_of(model_type: str) -> Family:
    """Returns the record of a family, built-in or registered."""
    if model_type in BUILT_IN:
        return BUILT_IN[model_type]
    return REGISTERED.get(model_type)


def supported() -> tuple[str, ...]:
    """Returns the supported values of ``model_type``."""
    return tuple(sorted({*BUILT_IN, *REGISTERED.names()}))


def nearest(name: object, names: Mapping[str, Any] | tuple[str, ...]) -> str:
    """Returns the remedy of an error on a name that is not in a table: the three nearest names."""
    near = difflib.get_close_matches(str(name), list(names), 3, 0.0)
    return (
        f"no model is loaded as a similar one; the nearest names are {', '.join(near)}"
    )


def read(raw: Mapping[str, Any], where: str, images: bool = False) -> Features:
    """Returns the fields of the `ModelConfig` of a parsed ``config.json``; see
    `ModelConfig.from_hf`."""
    if not isinstance(raw, Mapping):
        raise NaloraError(where, expected="a JSON object", found=type(raw).__name__)
    f = Fields(raw, {}, where)
    name = raw.get("model_type")
    # If it is false or null, transformers attends in both directions.
    if raw.get("is_causal", True) is not True:
        expected = (
            "true, or no such field: attention to later tokens is not implemented"
        )
        raise f.error(
            "is_causal",
            expected,
            repr(raw["is_causal"])[:60],
            "use a causal language model",
        )
    if contains_text_model(name, images=images):  # the text model is one of its parts
        part = text_part(raw, where)
        where_text = f"{where}: text_config"
        text = read(part, where_text)
        if not images:
            return text
        text |= _with_image_axes(text, Fields(part, {}, where_text))
        vision = _read_vision(raw, text, where)
        return text | {"vision": vision} | _with_deepstack(text, len(vision.taps))
    if images:
        expected = f"a vision-language model: one of {', '.join(MULTIMODAL)}"
        remedy = "use such a model, or leave --vision.task (or --image) out"
        raise f.error("model_type", expected, repr(name), remedy)
    if not isinstance(name, str) or (name not in BUILT_IN and name not in REGISTERED):
        names = supported()
        remedy = _UNSUPPORTED.get(str(name)) or nearest(name, names)
        raise f.error("model_type", f"one of {', '.join(names)}", repr(name), remedy)
    family = family_of(name)
    f = Fields(raw, {**_COMMON, **family.defaults}, where)
    for feature, remedy in _REFUSED.items():
        if feature not in family.checks:
            f.refuse(feature, remedy)
    stored = f.mapping("quantization_config")
    if stored and "quantization_config" not in family.checks:
        method = stored.get("quant_method")
        if method not in QUANTIZED:
            expected = f"one of {', '.join(QUANTIZED)}"
            where = "quantization_config: quant_method"
            raise f.error(where, expected, repr(method)[:60], UNQUANTIZED)
    if family.reader:
        values = vars(family.reader(f, name))
    else:
        values = base_values(f, name, family.features(f))
    _check(values, f)
    return values


def _with_image_axes(text: Features, f: Fields) -> Features:
    """Returns the rotary embeddings of a text model that reads rows and columns of images, unless
    its family's have such axes without images, too.

    Args:
      text: the text model's fields of `ModelConfig`.
      f: its ``config.json``.
    """
    axes_of = family_of(text["model_type"]).image_axes
    if axes_of is None:
        return {}
    specs = [replace(spec, axes=axes_of(f, spec.dim // 2)) for spec in text["ropes"]]
    return {"ropes": tuple(specs)}


def _with_deepstack(text: Features, layers: int) -> Features:
    """Returns the fields of a text model to whose first ``layers`` layers image features are
    added."""
    if not layers:
        return {}
    numbers = text.get("layer_kinds") or (0,) * text["n_layers"]
    kinds = text.get("kinds") or ((),)
    by_layer = []
    for layer, number in enumerate(numbers):
        more = (("deepstack", True),) if layer < layers else ()
        by_layer.append((*kinds[number], *more))
    return fields_of_layers(by_layer)


def _check(values: Features, f: Fields) -> None:
    """Refuses head counts, dropout rates and expert counts that no model can have."""
    heads = values["n_heads"]
    kv_heads = values["n_kv_heads"]
    experts = values.get("n_experts", 0)
    chosen = values.get("experts_per_token", 0)
    if heads % kv_heads:
        raise f.error(
            "num_key_value_heads",
            f"a divisor of num_attention_heads ({heads})",
            kv_heads,
        )
    if values["attn_dropout"] >= 1:
        raise f.error("attention_dropout", "a rate in [0, 1)", values["attn_dropout"])
    if experts * values["n_layers"] > 2**16:
        expected = "at most 65,536 experts in all layers"
        raise f.error("num_experts", expected, experts * values["n_layers"])
    if chosen > experts:
        raise f.error("num_experts_per_tok", f"at most {experts} experts", chosen)


def _read_vision(
    raw: Mapping[str, Any], text: Features, where: str
) -> VisionSpec | PatchSpec:
    """Returns the image tower and projector that a multimodal ``config.json`` describes."""
    reader, defaults, _ = MULTIMODAL[raw["model_type"]]
    f = Fields(raw, defaults, where)
    vision = reader(f, text["d_model"])
    if not 0 <= vision.image_token < text["vocab_size"]:
        expected = f"a token below {text['vocab_size']}, the rows of the embedding"
        raise f.error("image_token_index", expected, "another")
    return vision


# ---------------------------------------------------------------- text models of multimodal models


def _text_only() -> dict[str, Family]:
    """Returns the text model's family of multimodal models of which only the text model is
    supported."""
    return {
        family.multimodal: family for family in BUILT_IN.values() if family.multimodal
    }


def contains_text_model(name: object, *, images: bool) -> bool:
    """Returns True for the ``model_type`` of a multimodal model, with ``images`` only if they are
    supported."""
    return isinstance(name, str) and (
        name in MULTIMODAL or (name in _text_only() and not images)
    )


def text_part(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the ``config.json`` of the text model within a multimodal one.

    A multimodal file lists only the differences from the text model's defaults.
    """
    name = raw["model_type"]
    if family := _text_only().get(name):
        tie = family.defaults.get("tie_word_embeddings", False)
        defaults = {"model_type": family.name, "tie_word_embeddings": tie}
    else:
        defaults = MULTIMODAL[name][2]
    text_config = Fields(raw, {}, where).mapping("text_config")
    tied = raw.get("tie_word_embeddings")
    # Qwen3-VL's and Qwen3.5's own field decides if it is there; others also tie if the text model
    # does.
    overruled = tied is False and not str(name).startswith(("qwen3_vl", "qwen3_5"))
    if tied is None or (overruled and text_config.get("tie_word_embeddings")):
        tied = text_config.get("tie_word_embeddings", defaults["tie_word_embeddings"])
    if name == "gemma3":
        text_config["model_type"] = defaults["model_type"]
        tied = raw.get("tie_word_embeddings", True)
    return {**defaults, **text_config, "tie_word_embeddings": tied}


# ---------------------------------------------------------------- families from outside the package


def register_family(
    model_type: str,
    *,
    defaults: Mapping[str, Any] | None = None,
    tensors: str | Rows = "llama",
) -> Callable[[Reader], Reader]:
    """Returns a decorator that registers a reader of configs for a ``model_type``.

    The reader receives the file's `nalora_jax.common.fields.Fields` and the name, and returns a
    `ModelConfig`; `nalora_jax.models.families.base_config` reads the fields that all families
    share.

    Args:
      model_type: the value in the ``config.json``.
      defaults: values of fields that a file may omit.
      tensors: the built-in family whose tensor names its files use, or rows of its own.

    Raises:
      NaloraError: the name is a built-in family.
    """

    def register(reader: Reader) -> Reader:
        """Adds the family with this reader; a family registered under the same name is replaced."""
        if model_type in BUILT_IN:
            where = f"family {model_type!r}"
            expected = "a name that is free"
            raise NaloraError(where, expected=expected, found="one of this library's")
        rows = tensors
        form = None
        if isinstance(rows, str):
            like = family_of(rows)
            rows = like.tensors
            form = like.gguf
        family = Family(
            model_type,
            "",
            lambda _: {},
            tuple(rows),
            dict(defaults or {}),
            form,
            reader=reader,
        )
        REGISTERED.add(model_type, family, replace=True)
        return reader

    return register
