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
from nalora_jax.config.rope_scaling import FIELDS, FLAG, ORIGINAL, WITH_ORIGINAL, parse_rope_scaling
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import GLOBAL_WINDOW, ModelConfig
from nalora_jax.models.families import dense, gemma, hybrids, mixtures
from nalora_jax.models.families.record import FULL, Family, Reader
from nalora_jax.models.families.record import base_config as base_config
from nalora_jax.models.families.tensors import Rows
from nalora_jax.models.ropes import ROPE_KINDS, RopeSpec
from nalora_jax.models.stacks import stacks
from nalora_jax.models.vision.families import MULTIMODAL, read_sight

_GROUPS = (dense, mixtures, hybrids, gemma)
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


# ---------------------------------------------------------------- RoPE scaling beyond a model's context

# The changed config.json is an ordinary one: `ModelConfig.from_hf` reads it, a merged model is written
# with it, and transformers computes the same from it.
#
#   {"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
#       yarn:factor=4 ->
#   {"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6,
#    "factor": 4.0, "original_max_position_embeddings": 32768}}

_SCALING = {"type", "rope_type", ORIGINAL, "short_factor", "long_factor"}.union(*FIELDS.values())
_GROWTH = "llama_4_scaling_beta"
# These follow from the factor if they are absent.
_DERIVED = {"factor", "attention_factor"}


def with_rope_scaling(raw: Mapping[str, Any], text: str, where: str) -> dict[str, Any]:
    """Returns a ``config.json`` with another RoPE scaling and the context length that follows from it.

    Fields that ``text`` leaves out keep their value if the type stays the same. The original
    context is the model's context without its present scaling. In a model with windowed layers that
    have another RoPE, only the layers with full attention change.

    Args:
      raw: the parsed file.
      text: see `parse_rope_scaling`; "" returns the file as it is.
      where: the file's name, for messages.

    Raises:
      NaloraError: an invalid ``text``, a family that cannot be rescaled, or a context that is
        shorter than the model's.
    """
    if not text:
        return dict(raw)
    settings = parse_rope_scaling(text)
    if contains_text_model(raw.get("model_type"), images=False):
        text_model = text_part(raw, where)
        changed = with_rope_scaling(text_model, text, f"{where}: text_config")
        differing = {name: value for name, value in changed.items() if value != text_model.get(name)}
        return {**raw, "text_config": {**(raw.get("text_config") or {}), **differing}}
    base = read(raw, where)
    spec = _rescalable(base, text, where)
    unscaled = _unscaled_length(base, spec)
    if settings["rope_type"] in WITH_ORIGINAL:
        settings = {ORIGINAL: unscaled} | settings
    context = int(settings.get(ORIGINAL, unscaled) * settings["factor"])
    if context < base.max_positions:
        least = base.max_positions / settings.get(ORIGINAL, unscaled)
        raise NaloraError(
            f"{FLAG} {text}",
            expected=f"a context of at least {base.max_positions} tokens, the model's",
            found=f"{context}, {settings['factor']:g} times {settings.get(ORIGINAL, unscaled)}",
            remedy=f"a factor above {least:g}: it multiplies the context before any scaling",
        )
    changed = _changed(raw, settings)
    # transformers computes dynamic scaling from max_position_embeddings.
    changed["max_position_embeddings"] = unscaled if settings["rope_type"] == "dynamic" else context
    read(changed, f"{FLAG} {text}")
    return changed


def rope_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a ``config.json`` that hold its RoPE and its context length."""
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        text = raw
    names = ("rope_scaling", "rope_parameters", "rope_theta", "max_position_embeddings")
    return {name: text[name] for name in names if text.get(name)}


def _rescalable(base: ModelConfig, text: str, where: str) -> RopeSpec:
    """Returns the RoPE of the layers with full attention, or of all layers if every layer has a window."""
    layers = [
        (window == GLOBAL_WINDOW, stack.config.ropes[rope])
        for stack in stacks(base)
        if stack.config.attends
        for window, rope in zip(stack.config.layer_windows, stack.config.layer_ropes, strict=True)
        if rope < len(stack.config.ropes)
    ]
    full = {spec for is_full, spec in layers if is_full}
    specs = full or {spec for _, spec in layers}
    kinds = sorted({spec.kind for spec in specs})
    accepted = family_of(base.model_type).ropes.kinds
    if len(specs) == 1 and kinds[0] in ("default", *FIELDS) and accepted == ROPE_KINDS:
        return specs.pop()
    problem = "no layer with RoPE"
    if accepted != ROPE_KINDS:
        problem = f"{base.model_type}, whose files have no scaling except {', '.join(accepted[1:])}"
    elif specs:
        problem = f"{base.model_type} with {len(specs)} RoPEs of {', '.join(kinds)}"
    raise NaloraError(
        f"{FLAG} {text}",
        expected=f"a model whose full-attention layers have one RoPE of {', '.join(('default', *FIELDS))}",
        found=f"{problem} ({where})",
        remedy="leave the flag out and keep --data.max-length within the model's context",
    )


def _unscaled_length(base: ModelConfig, spec: RopeSpec) -> int:
    """Returns the context length of a model without its present scaling."""
    if spec.kind == "linear":
        return round(base.max_positions / spec.factor)
    if spec.kind == "default":
        return base.max_positions
    return spec.max_positions


def _changed(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the file with the scaling in the field that the file uses."""
    name = "rope_scaling"
    if raw.get("rope_parameters") and not raw.get("rope_scaling"):
        name = "rope_parameters"
    held = dict(raw.get(name) or {})
    nested = isinstance(held.get(FULL), Mapping)
    rope = dict(held)
    if nested:
        rope = dict(held[FULL])
    scaling = {field: rope.pop(field) for field in _SCALING & rope.keys()}
    if (scaling.get("rope_type") or scaling.get("type")) == settings["rope_type"]:
        rope |= {
            field: scaling[field]
            for field in FIELDS[settings["rope_type"]]
            if field in scaling.keys() - _DERIVED
        }
    if ORIGINAL in scaling and _GROWTH in rope:  # Ministral 3's queries grow from the original context
        rope[ORIGINAL] = scaling[ORIGINAL]
    rope |= settings
    if nested:
        rope = held | {FULL: rope}
    changed = {**raw, name: rope}
    if ORIGINAL in raw and ORIGINAL in settings:  # outside of the scaling, it would win
        changed[ORIGINAL] = settings[ORIGINAL]
    return changed
