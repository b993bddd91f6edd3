"""Gemma 1 to 4: norms of 1 + w, scaled embeddings, windows.

Layers of Gemma 4: sliding and full layers differ in head size, key/value heads and RoPE; in full layers
the values may be the unnormalized keys. Every layer ends in a scale of the residual stream. In small
models every layer has embeddings of the tokens, and the last layers read keys and values of earlier
layers; in mixtures every layer adds experts to its gated block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.models.attention import NormedAttention
from nalora_jax.models.config import ModelConfig, activation_name
from nalora_jax.models.embedding import LayerEmbeddings
from nalora_jax.models.family import (
    GATED,
    GGUF,
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
    Family,
    Metadata,
    Rows,
    TensorRow,
    gguf_ends,
    gguf_norms,
    hf_dense,
    hf_kernel,
    hf_norms,
    hf_row,
)
from nalora_jax.models.moe import DenseAndExperts
from nalora_jax.models.parts import ScaledTail
from nalora_jax.models.readers import (
    FULL,
    SLIDING,
    Overrides,
    attention_bias,
    base_config,
    first_present,
    layer_types,
    periodic,
    windows_of,
)
from nalora_jax.models.ropes import RopeSpec, read_ropes

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
    if r.get("block_count", int) == largest:
        return int(r.get("embedding_length", int) // r.get("attention.head_count", int))
    return int(r.get("attention.key_length", int))


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


def _later_traits(f: Fields) -> dict[str, Any]:
    """Returns what Gemma 2 and 3 have in common."""
    return {
        "activation": activation_name(f, "hidden_activation"),
        "post_norm": True,
        "query_scale": f.number("query_pre_attn_scalar") ** -0.5,
        "final_softcap": f.number("final_logit_softcapping", default=0.0, zero=True),
        **_traits(f),
        **attention_bias(f),
    }


def _gemma2(f: Fields, name: str) -> ModelConfig:
    softcap = f.number("attn_logit_softcapping", default=0.0, zero=True)
    windows = windows_of(f, periodic(f, 2))
    return base_config(f, name, windows=windows, attn_softcap=softcap, **_later_traits(f))


def _gemma2_settings(r: Metadata) -> dict[str, Any]:
    return {
        "sliding_window": r.get("attention.sliding_window", int, 4096),
        "query_pre_attn_scalar": _query_scalar(r, largest=46),
        "attn_logit_softcapping": r.get("attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": r.get("final_logit_softcapping", float, 30.0),
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
    kinds = periodic(f, pattern)
    local = {SLIDING: {"rope_theta": f.number("rope_local_base_freq", default=10_000.0)}}
    ropes, index = read_ropes(
        f, f.integer("head_dim", high=2**16), kinds, {FULL: {"rope_theta": 1e6}} | local
    )
    windows = windows_of(f, kinds)
    features = {"ropes": ropes, "rope_index": index, "windows": windows, "qk_norm": "head"}
    return base_config(f, name, **features, **_later_traits(f))


def _gemma3_settings(r: Metadata) -> dict[str, Any]:
    return {
        "sliding_window": r.get("attention.sliding_window", int),
        "rope_local_base_freq": r.get("rope.freq_base_swa", float, 10_000.0),
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


# ---------------------------------------------------------------- Gemma 4

_UNIFIED: dict[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 262_144,
    "tie_word_embeddings": True,
    "sliding_window": 1024,
}
_GEMMA4 = _UNIFIED | {
    "max_position_embeddings": 131_072,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
}
_ROPES: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}
_ROPE_TYPES = ("default", "linear", "proportional")


def _unified(f: Fields, name: str) -> ModelConfig:
    for feature in ("hidden_size_per_layer_input", "enable_moe_block"):
        f.refuse(feature, "this family has no such layers")
    return _gemma4(f, name)


def _gemma4(f: Fields, name: str) -> ModelConfig:
    if f.get("use_bidirectional_attention") != "vision":  # which is of image tokens only
        f.refuse("use_bidirectional_attention")
    for field in ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"):
        f.refuse(field, "rotary embeddings are read from rope_parameters")
    types = _types(f)
    layers = _layers(f, types)
    kinds = tuple(dict.fromkeys(layers))
    width = f.integer("hidden_size_per_layer_input", low=0, default=0)
    return base_config(
        f,
        name,
        **dict(kinds[0]),
        kinds=kinds,
        layer_kinds=tuple(kinds.index(layer) for layer in layers),
        activation=activation_name(f, "hidden_activation"),
        windows=windows_of(f, types),
        qk_norm="head",
        post_norm=True,
        query_scale=1.0,
        embed_scale=f.integer("hidden_size") ** 0.5,
        final_softcap=f.number("final_logit_softcapping", default=0.0, zero=True),
        tail=ScaledTail(width),
        layer_embeddings=LayerEmbeddings(_table_rows(f), width) if width else None,
        **_experts(f),
        **attention_bias(f),
    )


def _types(f: Fields) -> list[str]:
    """Returns the type of every layer; the last one attends globally."""
    types = layer_types(f)
    if types is None:
        types = [*periodic(f, 6)[:-1], FULL]
    if types[-1] != FULL:
        raise f.error("layer_types", f"{FULL!r} in the last layer", repr(types[-1]))
    return types


def _table_rows(f: Fields) -> int:
    rows, vocabulary = f.integer("vocab_size_per_layer_input"), f.integer("vocab_size")
    if rows < vocabulary:
        raise f.error("vocab_size_per_layer_input", f"vocab_size ({vocabulary}) or more", rows)
    return rows


def _layers(f: Fields, types: Sequence[str]) -> list[Overrides]:
    """Returns the fields of `ModelConfig` that depend on a layer's type and on its keys, by layer.

    The last layers read the keys and values of the last layer before them that has their type.
    """
    of_type = {kind: _features(f, kind, types) for kind in sorted(set(types))}
    reading = f.integer("num_kv_shared_layers", low=0, high=2**10, default=0)
    first, d_ff = len(types) - reading, f.integer("intermediate_size")
    if reading and set(types[: max(first, 0)]) != set(types):
        raise f.error(
            "num_kv_shared_layers", "a layer of every type before the layers without keys", reading
        )
    handing = {}
    if reading:
        last = {kind: layer for layer, kind in enumerate(types[:first])}
        handing = {layer: kind for kind, layer in last.items()}
    layers = []
    for layer, kind in enumerate(types):
        keys_as_values = f.flag("attention_k_eq_v") and kind == FULL
        mixer, width = NormedAttention(keys_as_values, hands=handing.get(layer, "")), d_ff
        if layer >= first:
            mixer = NormedAttention(reads=kind)
            width *= 1 + f.flag("use_double_wide_mlp")
        layers.append((*of_type[kind], ("mixer", mixer), *_feed_forward(f, width)))
    return layers


def _feed_forward(f: Fields, width: int) -> Overrides:
    """Returns the fields of a gated block of ``width`` channels, and of any experts."""
    if not f.flag("enable_moe_block"):
        return (("d_ff", width),)
    return ("d_ff", f.integer("moe_intermediate_size")), ("ffn", DenseAndExperts(width))


def _experts(f: Fields) -> dict[str, int]:
    if not f.flag("enable_moe_block"):
        return {}
    n_experts, chosen = f.integer("num_experts", high=2**12), f.integer("top_k_experts", high=2**12)
    if chosen > n_experts:
        raise f.error("top_k_experts", f"at most {n_experts} experts", chosen)
    return {"n_experts": n_experts, "experts_per_token": chosen}


def _features(f: Fields, kind: str, types: Sequence[str]) -> Overrides:
    head_dim, kv_heads = _heads(f, kind, types)
    heads = f.integer("num_attention_heads", high=2**16)
    if heads % kv_heads:
        raise f.error(f"key/value heads of {kind}", f"a divisor of num_attention_heads ({heads})", kv_heads)
    return ("head_dim", head_dim), ("n_kv_heads", kv_heads), ("ropes", _ropes(f, kind, head_dim))


def _heads(f: Fields, kind: str, types: Sequence[str]) -> tuple[int, int]:
    """Returns head size and key/value heads of the layers of a type.

    Released files have fields for full layers (``global_head_dim``), files that transformers wrote
    list layers that differ (``per_layer_config``).
    """
    head_dim = f.integer("head_dim", high=2**16)
    heads = f.integer("num_attention_heads", high=2**16)
    kv_heads = f.integer("num_key_value_heads", high=2**16, default=heads)
    if f.get("per_layer_config") is not None:
        return _listed_heads(f, kind, types, head_dim, kv_heads)
    if kind == FULL:
        head_dim = f.integer("global_head_dim", high=2**16)
        if f.flag("attention_k_eq_v"):
            kv_heads = f.integer("num_global_key_value_heads", high=2**16, default=kv_heads)
    return head_dim, kv_heads


def _listed_heads(
    f: Fields, kind: str, types: Sequence[str], head_dim: int, kv_heads: int
) -> tuple[int, int]:
    # transformers writes "05" for layer 5 of ten and more
    listed = {name.lstrip("0") or "0": entry for name, entry in f.mapping("per_layer_config").items()}
    unknown = listed.keys() - {str(layer) for layer in range(len(types))}
    if unknown:
        raise f.error("per_layer_config", f"layers from 0 to {len(types) - 1}", ", ".join(sorted(unknown)))
    entries = [listed.get(str(layer), {}) for layer, of_layer in enumerate(types) if of_layer == kind]
    if not isinstance(entries[0], dict) or any(entry != entries[0] for entry in entries):
        raise f.error(
            "per_layer_config", f"one JSON object for all layers of type {kind}", str(entries)[:60]
        )
    entry = Fields(entries[0], {}, f"{f.where}: per_layer_config")
    for key in sorted(entries[0].keys() - {"head_dim", "num_key_value_heads"}):
        entry.refuse(key)
    return (
        entry.integer("head_dim", high=2**16, default=head_dim),
        entry.integer("num_key_value_heads", high=2**16, default=kv_heads),
    )


def _ropes(f: Fields, kind: str, head_dim: int) -> tuple[RopeSpec, ...]:
    parameters = f.mapping("rope_parameters")
    unknown = parameters.keys() - _ROPES.keys()
    if unknown:
        raise f.error(
            "rope_parameters",
            f"one JSON object for {SLIDING} and one for {FULL}",
            ", ".join(sorted(unknown)),
        )
    if parameters and kind not in parameters:
        raise f.error("rope_parameters", f"an entry for {kind}", ", ".join(parameters))
    specs, _ = read_ropes(f, head_dim, [kind], {} if parameters else _ROPES)
    if specs[0].kind not in _ROPE_TYPES:
        raise f.error(
            f"rope_parameters: {kind}: rope_type", f"one of {', '.join(_ROPE_TYPES)}", specs[0].kind
        )
    return specs


_TENSORS = (
    *HF_ENDS,
    *HF_FOUR_NORMS,
    *HF_ATTENTION,
    *HF_QK_NORMS,
    *HF_FFN,
    *hf_dense("mlp", "ffn/dense_ffn", GATED),
    TensorRow(
        "model.layers.{layer}.experts.gate_up_proj",
        ("layers/ffn/experts_ffn/gate_proj/kernel", "layers/ffn/experts_ffn/up_proj/kernel"),
        "transpose",
    ),
    TensorRow(
        "model.layers.{layer}.experts.down_proj", ("layers/ffn/experts_ffn/down_proj/kernel",), "transpose"
    ),
    hf_kernel("router.proj", "ffn/experts_ffn/router"),
    hf_row("router.scale", "ffn/router_norm/scale"),
    hf_row("router.per_expert_scale", "ffn/experts_ffn/router/scale"),
    *hf_norms(
        {
            "ffn/dense_norm": "post_feedforward_layernorm_1",
            "ffn/experts_norm": "pre_feedforward_layernorm_2",
            "ffn/experts_post_norm": "post_feedforward_layernorm_2",
            "tail/norm": "post_per_layer_input_norm",
        }
    ),
    hf_kernel("per_layer_input_gate", "tail/gate_proj"),
    hf_kernel("per_layer_projection", "tail/down_proj"),
    hf_row("layer_scalar", "tail/scale"),
    TensorRow("model.embed_tokens_per_layer.weight", ("layer_embeddings/embedding",)),
    TensorRow(
        "model.per_layer_model_projection.weight", ("layer_embeddings/projection/kernel",), "transpose"
    ),
    TensorRow("model.per_layer_projection_norm.weight", ("layer_embeddings/norm/scale",)),
)
_COMMON: dict[str, Any] = {
    "tensors": _TENSORS,
    "checks": ("use_bidirectional_attention",),
    # Towers of images and sounds.
    "ignored": (r"^model\.(audio_tower|embed_(vision|audio)|vision_embedder)\.",),
}
FAMILIES = (
    GEMMA,
    GEMMA2,
    GEMMA3,
    Family("gemma4_text", "Gemma4ForCausalLM", _gemma4, defaults=_GEMMA4, multimodal="gemma4", **_COMMON),
    Family(
        "gemma4_unified_text",
        "Gemma4UnifiedForCausalLM",
        _unified,
        defaults=_UNIFIED,
        multimodal="gemma4_unified",
        **_COMMON,
    ),
)
