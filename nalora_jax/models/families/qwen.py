"""Qwen2 to Qwen3.5: biases, norms of queries and keys, experts, Gated DeltaNet with gated attention."""

from __future__ import annotations

from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.record import GGUF, Family, Metadata
from nalora_jax.models.families.shared import (
    FULL,
    Overrides,
    attention_bias,
    base_config,
    expert_fields,
    fields_of_layers,
    first_present,
    head_dim_of,
    optional_windows,
)
from nalora_jax.models.families.tensors import (
    GATED,
    GGUF_ATTENTION,
    GGUF_EXPERTS,
    GGUF_PRE,
    GGUF_QK,
    GGUF_QWEN2,
    HF_ATTENTION,
    HF_DENSE_LAYERS,
    HF_ENDS,
    HF_FFN,
    HF_LLAMA,
    HF_PRE_NORMS,
    HF_QK_NORMS,
    TensorRow,
    gguf_ends,
    gguf_norms,
    hf_dense,
    hf_experts,
    hf_kernel,
)
from nalora_jax.models.gated_delta_net import GatedDeltaNet
from nalora_jax.models.ropes import read_ropes
from nalora_jax.models.routing import RouterSpec
from nalora_jax.models.shared_experts import SharedExperts

_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32_768}


def _qwen2(f: Fields, name: str) -> ModelConfig:
    first = f.integer("max_window_layers", low=0)
    return base_config(f, name, windows=optional_windows(f, lambda i: i >= first), qkv_bias=True)


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _qwen2, HF_LLAMA, _DEFAULTS, GGUF("qwen2", GGUF_QWEN2))


def _qwen3(f: Fields, name: str) -> ModelConfig:
    first = f.integer("max_window_layers", low=0)
    windows = optional_windows(f, lambda i: i >= first)
    return base_config(f, name, windows=windows, qk_norm="head", **attention_bias(f))


QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _qwen3,
    (*HF_LLAMA, *HF_QK_NORMS),
    _DEFAULTS | {"head_dim": 128},
    GGUF("qwen3", (*GGUF_QWEN2, *gguf_norms(GGUF_QK))),
)

# ---------------------------------------------------------------- experts


def _experts(f: Fields) -> tuple[dict[str, Any], list[Overrides]]:
    """See `expert_fields`."""
    n_layers, step = f.integer("num_hidden_layers", high=2**10), f.integer("decoder_sparse_step")
    listed = f.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < n_layers for i in listed):
        raise f.error("mlp_only_layers", f"numbers of layers from 0 to {n_layers - 1}", repr(listed)[:60])
    n_experts = f.integer(first_present(f, "num_experts", "num_local_experts"), high=2**12)
    return expert_fields(f, n_experts, [i in listed or (i + 1) % step != 0 for i in range(n_layers)])


def _qwen3_moe(f: Fields, name: str) -> ModelConfig:
    experts, layers = _experts(f)
    return base_config(
        f,
        name,
        windows=optional_windows(f, lambda _: True),
        qk_norm="head",
        norm_topk=f.flag("norm_topk_prob"),
        **(experts | fields_of_layers(layers)),
        **attention_bias(f),
    )


def _qwen3_moe_settings(r: Metadata) -> dict[str, Any]:
    return {
        "moe_intermediate_size": r.number("expert_feed_forward_length", int),
        "num_experts": r.number("expert_count", int),
        "num_experts_per_tok": r.number("expert_used_count", int),
        "norm_topk_prob": True,  # not stored: llama.cpp always does
    }


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _qwen3_moe,
    (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *HF_QK_NORMS, *hf_experts("mlp"), *HF_DENSE_LAYERS),
    _DEFAULTS
    | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
    },
    GGUF(
        "qwen3moe",
        (*gguf_ends(), *gguf_norms(GGUF_PRE | GGUF_QK), *GGUF_ATTENTION, *GGUF_EXPERTS),
        _qwen3_moe_settings,
    ),
)


def _qwen2_moe(f: Fields, name: str) -> ModelConfig:
    first = f.integer("max_window_layers", low=0)
    router = RouterSpec(normalize=f.flag("norm_topk_prob"))
    experts, layers = _experts(f)
    experts["ffn"] = SharedExperts(f.integer("shared_expert_intermediate_size"), router, gated=True)
    return base_config(
        f,
        name,
        windows=optional_windows(f, lambda i: i % 2 == 0 and i < first),
        qkv_bias=f.flag("qkv_bias"),
        **(experts | fields_of_layers(layers)),
    )


_SHARED = (
    *hf_experts("mlp", GATED, "ffn/experts_ffn"),
    *hf_dense("mlp.shared_expert", "ffn/shared_ffn", GATED),
    hf_kernel("mlp.shared_expert_gate", "ffn/shared_gate"),
    *HF_DENSE_LAYERS,
)
QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _qwen2_moe,
    (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *_SHARED),
    _DEFAULTS
    | {
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "qkv_bias": True,
    },
)

# ---------------------------------------------------------------- linear attention

_LINEAR = "linear_attention"


def _qwen3_5(f: Fields, name: str) -> ModelConfig:
    features, layers = _mixers(f)
    return base_config(f, name, **features, **fields_of_layers(layers))


def _qwen3_5_moe(f: Fields, name: str) -> ModelConfig:
    f.refuse("mlp_only_layers", "every layer of this family has experts")
    for field in ("decoder_sparse_step", "norm_topk_prob"):
        if f.get(field) not in (None, 1):
            raise f.error(field, "1: the only choice of this family", f.get(field))
    return _with_experts(f, name, normalize=True)


def _qwen3_next(f: Fields, name: str) -> ModelConfig:
    return _with_experts(f, name, normalize=f.flag("norm_topk_prob"), fused=True)


def _with_experts(f: Fields, name: str, *, normalize: bool, fused: bool = False) -> ModelConfig:
    """Returns the config of a model with experts and a gated shared expert, or dense layers."""
    features, mixers = _mixers(f, fused=fused)
    experts, ffns = _experts(f)
    shared = SharedExperts(
        f.integer("shared_expert_intermediate_size"), RouterSpec(normalize=normalize), gated=True
    )
    layers = [(*mixer, *ffn) for mixer, ffn in zip(mixers, ffns, strict=True)]
    return base_config(f, name, **(features | experts | {"ffn": shared} | fields_of_layers(layers)))


def _mixers(f: Fields, *, fused: bool = False) -> tuple[dict[str, Any], list[Overrides]]:
    """Returns the fields of attention, and of every layer: of attention or of linear attention."""
    if f.get("attn_output_gate") is False:
        raise f.error("attn_output_gate", "true: attention of this family has output gates", False)
    n_layers = f.integer("num_hidden_layers", high=2**10)
    kinds = f.items("layer_types", n_layers, str)
    if kinds is None:
        interval = f.integer("full_attention_interval")
        kinds = [_LINEAR if (i + 1) % interval else FULL for i in range(n_layers)]
    if unknown := set(kinds) - {FULL, _LINEAR}:
        raise f.error("layer_types", f"{FULL!r} or {_LINEAR!r}", repr(min(unknown)))
    # Sections of MRoPE have no effect on text, whose three positions are equal.
    ropes, _ = read_ropes(f, head_dim_of(f), None, further=("mrope_section", "mrope_interleaved"))
    features = {"qk_norm": "head", "norm_offset": 1.0, "attn_gate": True, **attention_bias(f)}
    linear = (("mixer", _delta_net(f, fused)),)
    return features | {"ropes": ropes}, [linear if kind == _LINEAR else () for kind in kinds]


def _delta_net(f: Fields, fused: bool) -> GatedDeltaNet:
    keys, values = (f.integer(f"linear_num_{name}_heads", high=2**16) for name in ("key", "value"))
    if values % keys:
        raise f.error("linear_num_value_heads", f"a multiple of linear_num_key_heads ({keys})", values)
    return GatedDeltaNet(
        keys,
        values,
        f.integer("linear_key_head_dim", high=2**16),
        f.integer("linear_value_head_dim", high=2**16),
        f.integer("linear_conv_kernel_dim", high=2**10),
        fused,
    )


def _delta_net_rows(*inputs: str) -> tuple[TensorRow, ...]:
    """Returns the tensors of Gated DeltaNet, with the names of the projections of its input."""
    names = {"A_log": "a_log", "dt_bias": "dt_bias"}
    names |= {"conv1d.weight": "conv/weight", "norm.weight": "norm/scale"}
    rows = (
        TensorRow(f"model.layers.{{layer}}.linear_attn.{theirs}", (f"layers/linear_attn/{ours}",))
        for theirs, ours in names.items()
    )
    return (*hf_dense("linear_attn", "linear_attn", (*inputs, "out_proj")), *rows)


_HYBRID_ROWS = (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *HF_QK_NORMS)
_QWEN3_5_ROWS = (*_HYBRID_ROWS, *_delta_net_rows("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"))
# The image tower, and heads that predict several tokens.
_UNUSED = (r"^(model\.)?visual\.", r"^mtp\.")
_HYBRID: dict[str, Any] = {
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
# Nested text configs list only the differences from these defaults.
_QWEN3_5_DEFAULTS = _HYBRID | {
    "vocab_size": 248_320,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
_MOE = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "decoder_sparse_step": 1}
_QWEN3_5_MOE_DEFAULTS = _QWEN3_5_DEFAULTS | _MOE
_QWEN3_5_MOE_DEFAULTS |= {
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "num_experts": 256,
    "num_experts_per_tok": 8,
}
_QWEN3_NEXT_DEFAULTS = (
    _HYBRID | _MOE | {"num_key_value_heads": 2, "num_experts_per_tok": 10, "norm_topk_prob": True}
)
QWEN3_5 = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    _qwen3_5,
    (*_QWEN3_5_ROWS, *HF_FFN),
    _QWEN3_5_DEFAULTS,
    ignored=_UNUSED,
    multimodal="qwen3_5",
)
QWEN3_5_MOE = Family(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    _qwen3_5_moe,
    (*_QWEN3_5_ROWS, *_SHARED),
    _QWEN3_5_MOE_DEFAULTS,
    ignored=_UNUSED,
    multimodal="qwen3_5_moe",
    stacks_in_vllm=True,
)
QWEN3_NEXT = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    _qwen3_next,
    (*_HYBRID_ROWS, *_delta_net_rows("in_proj_qkvz", "in_proj_ba"), *_SHARED),
    _QWEN3_NEXT_DEFAULTS,
    ignored=_UNUSED,
)

FAMILIES = (QWEN2, QWEN3, QWEN3_MOE, QWEN2_MOE, QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT)
