"""Granite: multipliers of embeddings, residuals, scores and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.record import GGUF, Family, Metadata
from nalora_jax.models.families.shared import (
    FULL,
    SLIDING,
    attention_bias,
    base_config,
    head_dim_of,
    layer_types,
    windows_of,
)
from nalora_jax.models.families.tensors import GGUF_LLAMA, HF_LLAMA, HF_SINKS
from nalora_jax.models.layers import RopeSpec
from nalora_jax.models.ropes import read_ropes

# llama.cpp's names of the multipliers.
_MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
_DEFAULTS: dict[str, Any] = dict.fromkeys(_MULTIPLIERS, 1.0)


def _multipliers(f: Fields) -> dict[str, Any]:
    """Returns the multipliers and the bias of the feed-forward block ."""
    return {
        "ffn_bias": f.flag("mlp_bias"),
        "embed_scale": f.number("embedding_multiplier"),
        "residual_scale": f.number("residual_multiplier"),
        "query_scale": f.number("attention_multiplier"),
        "logit_scale": 1.0 / f.number("logits_scaling"),
    }


def _granite(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, **_multipliers(f), **attention_bias(f))


def _settings(r: Metadata) -> dict[str, Any]:
    return {ours: r.number(theirs, float) for ours, theirs in _MULTIPLIERS.items()}


GRANITE = Family(
    "granite", "GraniteForCausalLM", _granite, HF_LLAMA, _DEFAULTS, GGUF("granite", GGUF_LLAMA, _settings)
)


def _granite_swa(f: Fields, name: str) -> ModelConfig:
    n_layers = f.integer("num_hidden_layers", high=2**10)
    kinds = layer_types(f, n_layers) or [SLIDING if i % 4 else FULL for i in range(n_layers)]
    ropes, index = _layer_ropes(f, n_layers)
    return base_config(
        f,
        name,
        ropes=ropes,
        rope_index=index,
        windows=windows_of(f, kinds),
        attn_sinks=True,
        **_multipliers(f),
        **attention_bias(f),
    )


def _layer_ropes(f: Fields, n_layers: int) -> tuple[tuple[RopeSpec, ...], tuple[int, ...]]:
    """Returns the rotary embeddings of layers with a base each; a base of 0 means no rotation."""
    (spec,), _ = read_ropes(f, head_dim_of(f), None)
    bases = f.items("layer_rope_theta", n_layers, (int, float)) or [spec.theta] * n_layers
    for base in bases:
        if base and not 1 < base < 1e30:
            raise f.error("layer_rope_theta", "numbers above 1, or 0 for no rotation", base)
    distinct = sorted({float(base) for base in bases if base}) or [spec.theta]
    index = tuple(distinct.index(base) if base else -1 for base in bases)
    return tuple(replace(spec, theta=base) for base in distinct), index


GRANITE_SWA = Family(
    "granite_swa",
    "GraniteSWAForCausalLM",
    _granite_swa,
    (*HF_LLAMA, HF_SINKS),
    _DEFAULTS
    | {
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "sliding_window": 128,
    },
)

FAMILIES = (GRANITE, GRANITE_SWA)
