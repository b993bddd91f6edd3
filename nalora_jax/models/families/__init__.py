"""Families of models: one record per ``model_type``, in modules of related families.

Both forms of ``config.json`` are read: transformers 4 (``rope_theta``, ``rope_scaling``) and 5
(``rope_parameters``). Features that are not implemented raise an error that names them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.common.registry import Registry
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families import (
    gemma,
    gemma4,
    glm,
    gpt_oss,
    granite,
    lfm2,
    llama,
    mistral,
    olmo,
    qwen,
)
from nalora_jax.models.families.record import Family, Reader
from nalora_jax.models.families.shared import base_config as base_config
from nalora_jax.models.families.tensors import Rows
from nalora_jax.models.vision.sight import MULTIMODAL, read_sight

_GROUPS = (llama, mistral, granite, qwen, gemma, gemma4, olmo, lfm2, glm, gpt_oss)
BUILT_IN: dict[str, Family] = {family.name: family for group in _GROUPS for family in group.FAMILIES}
# Families from outside the package, added by `register_family` or by an entry point, whose module calls it.
REGISTERED: Registry[Family] = Registry("family", "nalora_jax.families")
# Multimodal models of which only the text model is supported: the text model's family.
_TEXT_ONLY = {family.multimodal: family for family in BUILT_IN.values() if family.multimodal}
_COMMON: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
# Features that no family has, except those that check the field; with the remedy.
_REFUSED = {
    "use_bidirectional_attention": "",
    "output_router_logits": "",
    "router_jitter_noise": "",
    "quantization_config": "load the unquantized model",
}


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
    return f"no model is loaded as a similar one; the nearest names are {', '.join(near)}"


def read(raw: Mapping[str, Any], where: str, images: bool = False) -> ModelConfig:
    """Returns the `ModelConfig` of a parsed ``config.json``; see `ModelConfig.from_hf`."""
    if not isinstance(raw, Mapping):
        raise NaloraError(where, expected="a JSON object", found=type(raw).__name__)
    if not raw.get("is_causal", True):  # transformers then attends in both directions, also for null
        raise NaloraError(
            f"{where}: is_causal",
            expected="true, or no such field: attention to later tokens is not implemented",
            found=repr(raw["is_causal"])[:60],
            remedy="use a causal language model",
        )
    name = raw.get("model_type")
    if contains_text_model(name, images=images):  # the text model is one of its parts
        text = read(text_part(raw, where), f"{where}: text_config", False)
        if not images:
            return text
        return replace(text, sight=read_sight(raw, text, where))
    if images:
        raise NaloraError(
            f"{where}: model_type",
            expected=f"a model that sees images: one of {', '.join(MULTIMODAL)}",
            found=repr(name),
            remedy="use such a model, or leave --vision.task (or --image) out",
        )
    if not isinstance(name, str) or (name not in BUILT_IN and name not in REGISTERED):
        raise NaloraError(
            f"{where}: model_type",
            expected=f"one of {', '.join(supported())}",
            found=repr(name),
            remedy=nearest(name, supported()),
        )
    family = family_of(name)
    fields = Fields(raw, {**_COMMON, **family.defaults}, where)
    for feature, remedy in _REFUSED.items():
        if feature not in family.checks:
            fields.refuse(feature, remedy)
    config = family.read(fields, name)
    _check(config, fields)
    return config


def _check(config: ModelConfig, f: Fields) -> None:
    if config.n_heads % config.n_kv_heads:
        raise f.error(
            "num_key_value_heads", f"a divisor of num_attention_heads ({config.n_heads})", config.n_kv_heads
        )
    if config.attn_dropout >= 1:
        raise f.error("attention_dropout", "a rate in [0, 1)", config.attn_dropout)
    if config.n_experts * config.n_layers > 2**16:
        raise f.error(
            "num_experts", "at most 65,536 experts in all layers", config.n_experts * config.n_layers
        )
    if config.experts_per_token > config.n_experts:
        raise f.error(
            "num_experts_per_tok", f"at most {config.n_experts} experts", config.experts_per_token
        )


# ---------------------------------------------------------------- text models of multimodal models


def contains_text_model(name: object, *, images: bool) -> bool:
    """Returns True for the ``model_type`` of a multimodal model, with ``images`` only if they are supported."""
    return isinstance(name, str) and (name in MULTIMODAL or (name in _TEXT_ONLY and not images))


def text_part(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the ``config.json`` of the text model within a multimodal one.

    A multimodal file lists only the differences from the text model's defaults.
    """
    name = raw["model_type"]
    if name in _TEXT_ONLY:
        family = _TEXT_ONLY[name]
        tie = family.defaults.get("tie_word_embeddings", False)
        defaults = {"model_type": family.name, "tie_word_embeddings": tie}
    else:
        defaults = MULTIMODAL[name][2]
    text_config = Fields(raw, {}, where).mapping("text_config")
    tied = raw.get("tie_word_embeddings")
    if tied is None or (tied is False and text_config.get("tie_word_embeddings")):
        tied = text_config.get("tie_word_embeddings", defaults["tie_word_embeddings"])
    if raw["model_type"] == "gemma3":
        text_config["model_type"] = defaults["model_type"]
        tied = raw.get("tie_word_embeddings", True)
    return {**defaults, **text_config, "tie_word_embeddings": tied}


# ---------------------------------------------------------------- families from outside the package


def register_family(
    model_type: str, *, defaults: Mapping[str, Any] | None = None, tensors: str | Rows = "llama"
) -> Callable[[Reader], Reader]:
    """Returns a decorator that registers a reader of configs for a ``model_type``.

    The reader receives the file's `nalora_jax.common.fields.Fields` and the name, and returns a
    `ModelConfig`; `base_config` reads the fields that all families share.

    Args:
      model_type: the value in the ``config.json``.
      defaults: values of fields that a file may omit.
      tensors: the built-in family whose tensor names its files use, or rows of its own.

    Raises:
      NaloraError: the name is a built-in family.
    """

    def register(reader: Reader) -> Reader:
        if model_type in BUILT_IN:
            raise NaloraError(
                f"family {model_type!r}", expected="a name that is free", found="one of this library's"
            )
        family = Family(model_type, "", reader, (), dict(defaults or {}))
        if isinstance(tensors, str):
            like = family_of(tensors)
            family = replace(family, tensors=like.tensors, gguf=like.gguf)
        else:
            family = replace(family, tensors=tuple(tensors))
        REGISTERED.add(model_type, family, replace=True)
        return reader

    return register
