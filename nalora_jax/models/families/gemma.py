"""Gemma 1 to 3: norms of 1 + w, scaled embeddings, windows."""

from __future__ import annotations

from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.models.config import ModelConfig, activation_name
from nalora_jax.models.families.record import GGUF, Family, Metadata
from nalora_jax.models.families.shared import (
    FULL,
    SLIDING,
    alternating,
    attention_bias,
    base_config,
    first_present,
    layer_types,
    windows_of,
)
from nalora_jax.models.families.tensors import (
    GGUF_ATTENTION,
    GGUF_FFN,
    GGUF_POST,
    GGUF_PRE,
    GGUF_QK,
    HF_ATTENTION,
    HF_ENDS,
    HF_FFN,
    HF_FOUR_NORMS,
    HF_LLAMA,
    HF_QK_NORMS,
    Rows,
    gguf_ends,
    gguf_norms,
)
from nalora_jax.models.ropes import read_ropes

_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_DEFAULTS = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}


def _gguf_rows(norms: dict[str, str]) -> Rows:
    """Returns llama.cpp's names; its files store 1 + w."""
    return (*gguf_ends("minus_one"), *gguf_norms(norms, "minus_one"), *GGUF_ATTENTION, *GGUF_FFN)


def _query_scalar(r: Metadata, *, largest: int) -> int:
    """Returns query_pre_attn_scalar, which is not stored.

    llama.cpp uses the head's width or, in the family's 27B model, the model's width per head.
    """
    if r.number("block_count", int) == largest:
        return int(r.number("embedding_length", int) // r.number("attention.head_count", int))
    return int(r.number("attention.key_length", int))


def _gemma(f: Fields, name: str) -> ModelConfig:
    activation = activation_name(f, first_present(f, "hidden_activation", "hidden_act"))
    if activation == "gelu":  # the first releases wrote "gelu" and meant the tanh form
        activation = activation_name(Fields({}, _GELU, f.where), "hidden_act")
    return base_config(f, name, activation=activation, **_traits(f), **attention_bias(f))


def _traits(f: Fields) -> dict[str, float]:
    return {"norm_offset": 1.0, "embed_scale": f.integer("hidden_size") ** 0.5}


GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    _gemma,
    HF_LLAMA,
    _DEFAULTS | {"hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192},
    GGUF("gemma", _gguf_rows(GGUF_PRE)),
)


def _windows(f: Fields, pattern: int) -> tuple[int, ...]:
    n_layers = f.integer("num_hidden_layers", high=2**10)
    return windows_of(f, layer_types(f, n_layers) or alternating(n_layers, pattern))


def _gemma2(f: Fields, name: str) -> ModelConfig:
    return base_config(
        f,
        name,
        activation=activation_name(f, "hidden_activation"),
        windows=_windows(f, 2),
        post_norm=True,
        query_scale=f.number("query_pre_attn_scalar") ** -0.5,
        attn_softcap=f.number("attn_logit_softcapping", default=0.0, zero=True),
        final_softcap=f.number("final_logit_softcapping", default=0.0, zero=True),
        **_traits(f),
        **attention_bias(f),
    )


def _gemma2_settings(r: Metadata) -> dict[str, Any]:
    return {
        "sliding_window": r.number("attention.sliding_window", int, 4096),
        "query_pre_attn_scalar": _query_scalar(r, largest=46),
        "attn_logit_softcapping": r.number("attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": r.number("final_logit_softcapping", float, 30.0),
    }


GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    _gemma2,
    (*HF_ENDS, *HF_FOUR_NORMS, *HF_ATTENTION, *HF_FFN),
    _DEFAULTS
    | _GELU
    | {
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    GGUF("gemma2", _gguf_rows(GGUF_PRE | GGUF_POST), _gemma2_settings),
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
        windows=_windows(f, pattern),
        qk_norm="head",
        post_norm=True,
        query_scale=f.number("query_pre_attn_scalar") ** -0.5,
        final_softcap=f.number("final_logit_softcapping", default=0.0, zero=True),
        **_traits(f),
        **attention_bias(f),
    )


def _gemma3_settings(r: Metadata) -> dict[str, Any]:
    return {
        "sliding_window": r.number("attention.sliding_window", int),
        "rope_local_base_freq": r.number("rope.freq_base_swa", float, 10_000.0),
        "query_pre_attn_scalar": _query_scalar(r, largest=62),
    }


GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _gemma3,
    (*HF_ENDS, *HF_FOUR_NORMS, *HF_ATTENTION, *HF_QK_NORMS, *HF_FFN),
    # Nested text configs list only the differences from these defaults.
    _DEFAULTS
    | _GELU
    | {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
    },
    GGUF("gemma3", _gguf_rows(GGUF_PRE | GGUF_POST | GGUF_QK), _gemma3_settings),
)

FAMILIES = (GEMMA, GEMMA2, GEMMA3)
