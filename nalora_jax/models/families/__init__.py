"""Readers of each family's ``config.json``: one small function per ``model_type``.

Both forms are read: transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``).
Features that are not implemented raise an error that names them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nalora_jax.errors import NaloraError
from nalora_jax.fields import Fields
from nalora_jax.models import qwen_hybrid, recent_families, registered
from nalora_jax.models.config import ModelConfig, activation_name
from nalora_jax.models.families import lfm2, llama, olmo
from nalora_jax.models.families.record import Family
from nalora_jax.models.families.shared import (
    FULL,
    GRANITE,
    SLIDING,
    alternating,
    attention_bias,
    first_present,
    granite_scales,
    head_dim_of,
    layer_types,
    optional_windows,
    same_window,
    windows_of,
)
from nalora_jax.models.families.shared import base_config as base_config
from nalora_jax.models.gemma4 import DEFAULTS as GEMMA4
from nalora_jax.models.gemma4 import read_gemma4
from nalora_jax.models.gpt_oss import DEFAULTS as GPT_OSS
from nalora_jax.models.gpt_oss import read_gpt_oss
from nalora_jax.models.mixture_families import (
    GLM4_MOE,
    QWEN2_MOE,
    QWEN3_MOE,
    read_glm4_moe,
    read_qwen2_moe,
    read_qwen3_moe,
)
from nalora_jax.models.registered import register_family as register_family
from nalora_jax.models.ropes import read_ropes
from nalora_jax.models.vision.sight import MULTIMODAL, contains_text_model, read_sight, text_part

_COMMON: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
# Nested text configs list only the differences from these defaults.
_GEMMA3: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}


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
    if not isinstance(name, str) or (name not in built_in() and name not in registered.FAMILIES):
        near = difflib.get_close_matches(str(name), supported(), 3, 0.0)
        raise NaloraError(
            f"{where}: model_type",
            expected=f"one of {', '.join(supported())}",
            found=repr(name),
            remedy=f"no model is loaded as a similar one; the nearest names are {', '.join(near)}",
        )
    if name in BUILT_IN:
        reader, defaults = BUILT_IN[name].read, BUILT_IN[name].defaults
    elif name in _READERS:
        reader, defaults = _READERS[name]
    else:
        family = registered.FAMILIES.get(name)
        reader, defaults = family.reader, dict(family.defaults)
    fields = Fields(raw, {**_COMMON, **defaults}, where)
    if name not in GEMMA4 or fields.get("use_bidirectional_attention") != "vision":  # of image tokens only
        fields.refuse("use_bidirectional_attention")
    for feature in ("output_router_logits", "router_jitter_noise"):
        fields.refuse(feature)
    if name != "gpt_oss":  # whose reader accepts the released form
        fields.refuse("quantization_config", "load the unquantized model")
    config = reader(fields, name)
    _check(config, fields)
    return config


def built_in() -> tuple[str, ...]:
    """Returns the values of ``model_type`` that this package reads."""
    return (*_READERS, *BUILT_IN)


def supported() -> tuple[str, ...]:
    """Returns the supported values of ``model_type``."""
    return tuple(sorted({*built_in(), *registered.FAMILIES.names()}))


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


# ---------------------------------------------------------------- families


def _llama(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, ffn_bias=f.flag("mlp_bias"), **attention_bias(f))


def _mistral(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, windows=same_window(f))


def _qwen2(f: Fields, name: str) -> ModelConfig:
    first = f.integer("max_window_layers", low=0)
    return base_config(f, name, windows=optional_windows(f, lambda i: i >= first), qkv_bias=True)


def _qwen3(f: Fields, name: str) -> ModelConfig:
    first = f.integer("max_window_layers", low=0)
    windows = optional_windows(f, lambda i: i >= first)
    return base_config(f, name, windows=windows, qk_norm="head", **attention_bias(f))


def _gemma(f: Fields, name: str) -> ModelConfig:
    activation = activation_name(f, first_present(f, "hidden_activation", "hidden_act"))
    if activation == "gelu":  # the first releases wrote "gelu" and meant the tanh form
        activation = activation_name(Fields({}, _GELU, f.where), "hidden_act")
    return base_config(f, name, activation=activation, **_gemma_traits(f), **attention_bias(f))


def _gemma_traits(f: Fields) -> dict[str, float]:
    return {"norm_offset": 1.0, "embed_scale": f.integer("hidden_size") ** 0.5}


def _gemma2(f: Fields, name: str) -> ModelConfig:
    return base_config(
        f,
        name,
        activation=activation_name(f, "hidden_activation"),
        windows=_gemma_windows(f, 2),
        post_norm=True,
        query_scale=f.number("query_pre_attn_scalar") ** -0.5,
        attn_softcap=f.number("attn_logit_softcapping", default=0.0, zero=True),
        final_softcap=f.number("final_logit_softcapping", default=0.0, zero=True),
        **_gemma_traits(f),
        **attention_bias(f),
    )


def _gemma3(f: Fields, name: str) -> ModelConfig:
    f.refuse("attn_logit_softcapping")
    pattern = f.integer("sliding_window_pattern", default=f.integer("_sliding_window_pattern", default=6))
    n_layers = f.integer("num_hidden_layers", high=2**10)
    kinds = layer_types(f, n_layers) or alternating(n_layers, pattern)
    local = {SLIDING: {"rope_theta": f.number("rope_local_base_freq", default=10_000.0)}}
    ropes, index = read_ropes(
        f, f.integer("head_dim", high=2**16), kinds, {FULL: {"rope_theta": 1e6}} | local
    )
    return base_config(
        f,
        name,
        activation=activation_name(f, "hidden_activation"),
        ropes=ropes,
        rope_index=index,
        windows=_gemma_windows(f, pattern),
        qk_norm="head",
        post_norm=True,
        query_scale=f.number("query_pre_attn_scalar") ** -0.5,
        final_softcap=f.number("final_logit_softcapping", default=0.0, zero=True),
        **_gemma_traits(f),
        **attention_bias(f),
    )


def _gemma_windows(f: Fields, pattern: int) -> tuple[int, ...]:
    n_layers = f.integer("num_hidden_layers", high=2**10)
    return windows_of(f, layer_types(f, n_layers) or alternating(n_layers, pattern))


def _phi3(f: Fields, name: str) -> ModelConfig:
    for feature in ("resid_pdrop", "embd_pdrop"):
        f.refuse(feature, "set it to 0: only attention and adapter dropout exist")
    return base_config(f, name, windows=same_window(f))


def _olmo2(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, qk_norm="projection", pre_norm=False, post_norm=True, **attention_bias(f))


def _smollm3(f: Fields, name: str) -> ModelConfig:
    n_layers = f.integer("num_hidden_layers", high=2**10)
    interval = f.integer("no_rope_layer_interval")
    rotates = f.items("no_rope_layers", n_layers, int, longer=True)
    if rotates is None:
        rotates = [(i + 1) % interval != 0 for i in range(n_layers)]
    ropes, _ = read_ropes(f, head_dim_of(f), layer_types(f, n_layers))
    return base_config(
        f,
        name,
        ropes=ropes,
        rope_index=tuple(0 if rotate else -1 for rotate in rotates),
        windows=optional_windows(f, lambda i: not rotates[i]),
        ffn_bias=f.flag("mlp_bias"),
        **attention_bias(f),
    )


def _granite(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, **granite_scales(f), **attention_bias(f))


def _mixtral(f: Fields, name: str) -> ModelConfig:
    return base_config(
        f,
        name,
        windows=same_window(f),
        n_experts=f.integer("num_local_experts", high=2**12),
        experts_per_token=f.integer("num_experts_per_tok", high=2**12),
    )


_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_GEMMA = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_QWEN = {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32_768}

_READERS: dict[str, tuple[Callable[[Fields, str], ModelConfig], dict[str, Any]]] = {
    "llama": (_llama, {}),
    "mistral": (
        _mistral,
        {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    ),
    "qwen2": (_qwen2, _QWEN),
    "qwen3": (_qwen3, _QWEN | {"head_dim": 128}),
    "gemma": (_gemma, _GEMMA | {"hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192}),
    "gemma2": (
        _gemma2,
        _GEMMA
        | _GELU
        | {
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
    ),
    "gemma3_text": (_gemma3, _GEMMA | _GELU | _GEMMA3),
    **{name: (read_gemma4, defaults) for name, defaults in GEMMA4.items()},
    "phi3": (_phi3, {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}),
    "olmo2": (_olmo2, {"rms_norm_eps": 1e-5}),
    "smollm3": (
        _smollm3,
        {
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "max_position_embeddings": 32_768,
        },
    ),
    "granite": (_granite, GRANITE),
    "mixtral": (
        _mixtral,
        {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131_072,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "gpt_oss": (read_gpt_oss, GPT_OSS),
    "qwen3_moe": (read_qwen3_moe, _QWEN | QWEN3_MOE),
    "qwen2_moe": (read_qwen2_moe, _QWEN | QWEN2_MOE),
    "glm4_moe": (read_glm4_moe, GLM4_MOE),
}

_READERS |= recent_families.READERS | qwen_hybrid.READERS

BUILT_IN: dict[str, Family] = {
    family.name: family for family in (*llama.FAMILIES, *olmo.FAMILIES, *lfm2.FAMILIES)
}
