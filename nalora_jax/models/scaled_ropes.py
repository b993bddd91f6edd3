"""Changes the RoPE scaling in a ``config.json``, to train and run beyond the model's context.

The result is an ordinary ``config.json``: `ModelConfig.from_hf` reads it, a merged model is
written with it, and transformers computes the same from it.

    {"max_position_embeddings": 32768,
     "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        yarn:factor=4 ->
    {"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6,
     "factor": 4.0, "original_max_position_embeddings": 32768}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nalora_jax.config.rope_scaling import (
    FIELDS,
    FLAG,
    ORIGINAL,
    WITH_ORIGINAL,
    parse_rope_scaling,
)
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import GLOBAL_WINDOW, ModelConfig
from nalora_jax.models.family import contains_text_model, family_of, text_part
from nalora_jax.models.ropes import ROPE_KINDS, RopeSpec
from nalora_jax.models.stacks import stacks

_FULL = "full_attention"
_SCALING = {"type", "rope_type", ORIGINAL, "short_factor", "long_factor"}.union(
    *FIELDS.values()
)
_GROWTH = "llama_4_scaling_beta"
# These follow from the factor if they are absent.
_DERIVED = {"factor", "attention_factor"}


def set_rope_scaling(raw: Mapping[str, Any], text: str, where: str) -> dict[str, Any]:
    """Returns a ``config.json`` with another RoPE scaling and the context length that follows from
    it.

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
        changed = set_rope_scaling(text_model, text, f"{where}: text_config")
        differing = {
            name: value
            for name, value in changed.items()
            if value != text_model.get(name)
        }
        return {**raw, "text_config": {**(raw.get("text_config") or {}), **differing}}
    base = ModelConfig.from_hf(raw, where)
    spec = _rescalable(base, text, where)
    of_kind = {
        "linear": round(base.max_positions / spec.factor),
        "default": base.max_positions,
    }
    # the context without its present scaling
    unscaled = of_kind.get(spec.kind, spec.max_positions)
    if settings["rope_type"] in WITH_ORIGINAL:
        settings = {ORIGINAL: unscaled} | settings
    factor = settings["factor"]
    original = settings.get(ORIGINAL, unscaled)
    context = int(original * factor)
    if context < base.max_positions:
        expected = f"a context of at least {base.max_positions} tokens, the model's"
        least = f"{base.max_positions / original:g}"
        remedy = f"a factor above {least}: it multiplies the context before any scaling"
        found = f"{context}, {factor:g} times {original}"
        raise NaloraError(
            f"{FLAG} {text}", expected=expected, found=found, remedy=remedy
        )
    changed = _changed(raw, settings)
    # transformers computes dynamic scaling from max_position_embeddings.
    if settings["rope_type"] == "dynamic":
        changed["max_position_embeddings"] = unscaled
    else:
        changed["max_position_embeddings"] = context
    ModelConfig.from_hf(changed, f"{FLAG} {text}")
    return changed


def rope_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a ``config.json`` that hold its RoPE and its context length."""
    if isinstance(raw.get("text_config"), Mapping):
        text = raw["text_config"]
    else:
        text = raw
    names = ("rope_scaling", "rope_parameters", "rope_theta", "max_position_embeddings")
    return {name: text[name] for name in names if text.get(name)}


def _rescalable(base: ModelConfig, text: str, where: str) -> RopeSpec:
    """Returns the RoPE of the layers with full attention, or of all layers if every layer has a
    window."""
    layers = []
    for stack in stacks(base):
        config = stack.config
        if not config.attends:
            continue
        for window, rope in zip(config.layer_windows, config.layer_ropes, strict=True):
            if rope < len(config.ropes):
                layers.append((window == GLOBAL_WINDOW, config.ropes[rope]))
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
    scalings = ", ".join(("default", *FIELDS))
    expected = f"a model whose full-attention layers have one RoPE of {scalings}"
    remedy = "leave the flag out and keep --data.max-length within the model's context"
    raise NaloraError(
        f"{FLAG} {text}", expected=expected, found=f"{problem} ({where})", remedy=remedy
    )


def _changed(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the file with the scaling in the field that the file uses."""
    flat = bool(raw.get("rope_parameters")) and not raw.get("rope_scaling")
    name = "rope_parameters" if flat else "rope_scaling"
    held = dict(raw.get(name) or {})
    nested = isinstance(held.get(_FULL), Mapping)
    if nested:
        rope = dict(held[_FULL])
    else:
        rope = dict(held)
    scaling = {field: rope.pop(field) for field in _SCALING & rope.keys()}
    kind = settings["rope_type"]
    if (scaling.get("rope_type") or scaling.get("type")) == kind:
        same = [field for field in FIELDS[kind] if field in scaling.keys() - _DERIVED]
        rope |= {field: scaling[field] for field in same}
    # Ministral 3's queries grow from the original context
    if ORIGINAL in scaling and _GROWTH in rope:
        rope[ORIGINAL] = scaling[ORIGINAL]
    rope |= settings
    if nested:
        rope = held | {_FULL: rope}
    changed = {**raw, name: rope}
    if ORIGINAL in raw and ORIGINAL in settings:  # outside of the scaling, it would win
        changed[ORIGINAL] = settings[ORIGINAL]
    return changed
