"""Families with experts: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, GLM-4.5 and gpt-oss."""

from __future__ import annotations

from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.method.activations import clamped_swish
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.dense import QWEN
from nalora_jax.models.family import (
    GATED,
    GGUF,
    GGUF_ATTENTION,
    GGUF_EXPERTS,
    GGUF_PAIRED,
    GGUF_PRE,
    GGUF_QK,
    HF_ATTENTION,
    HF_DENSE_LAYERS,
    HF_ENDS,
    HF_PRE_NORMS,
    HF_QK_NORMS,
    HF_SINKS,
    Family,
    Metadata,
    TensorRow,
    gguf_ends,
    gguf_norms,
    hf_dense,
    hf_experts,
    hf_kernel,
    hf_row,
)
from nalora_jax.models.moe import SharedExperts
from nalora_jax.models.readers import (
    Overrides,
    attention_bias,
    base_config,
    expert_counts,
    expert_fields,
    fields_of_layers,
    first_present,
    layer_count,
    optional_windows,
    periodic,
    same_window,
    windows_of,
)
from nalora_jax.models.routing import RouterSpec

# ---------------------------------------------------------------- Mixtral


def _mixtral(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, windows=same_window(f), **expert_counts(f, "num_local_experts"))


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _mixtral,
    (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *hf_experts("block_sparse_moe", ("w1", "w3", "w2"))),
    {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 131_072,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    GGUF(
        "llama",
        (*gguf_ends(), *gguf_norms(GGUF_PRE), *GGUF_PAIRED, *GGUF_EXPERTS),
        lambda r: {
            "num_local_experts": r.get("expert_count", int),
            "num_experts_per_tok": r.get("expert_used_count", int),
            "sliding_window": None,
        },
        lambda r: bool(r.get("expert_count", int, 0)),
    ),
)


# ---------------------------------------------------------------- OLMoE


def _olmoe(f: Fields, name: str) -> ModelConfig:
    f.refuse("clip_qkv")
    return base_config(
        f,
        name,
        qk_norm="projection",
        norm_topk=f.flag("norm_topk_prob"),
        **expert_counts(f, "num_experts", "num_local_experts"),
        **attention_bias(f),
    )


OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    _olmoe,
    (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *HF_QK_NORMS, *hf_experts("mlp")),
    {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
)


# ---------------------------------------------------------------- Qwen2-MoE and Qwen3-MoE


def qwen_experts(f: Fields) -> tuple[dict[str, Any], list[Overrides]]:
    """See `expert_fields`."""
    n_layers, step = layer_count(f), f.integer("decoder_sparse_step")
    listed = f.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < n_layers for i in listed):
        raise f.error("mlp_only_layers", f"numbers of layers from 0 to {n_layers - 1}", repr(listed)[:60])
    counts = expert_counts(f, "num_experts", "num_local_experts")
    return expert_fields(f, counts, [i in listed or (i + 1) % step != 0 for i in range(n_layers)])


def _qwen3_moe(f: Fields, name: str) -> ModelConfig:
    experts, layers = qwen_experts(f)
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
        "moe_intermediate_size": r.get("expert_feed_forward_length", int),
        "num_experts": r.get("expert_count", int),
        "num_experts_per_tok": r.get("expert_used_count", int),
        "norm_topk_prob": True,  # not stored: llama.cpp always does
    }


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _qwen3_moe,
    (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *HF_QK_NORMS, *hf_experts("mlp"), *HF_DENSE_LAYERS),
    QWEN
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
    experts, layers = qwen_experts(f)
    experts["ffn"] = SharedExperts(f.integer("shared_expert_intermediate_size"), router, gated=True)
    return base_config(
        f,
        name,
        windows=optional_windows(f, lambda i: i % 2 == 0 and i < first),
        qkv_bias=f.flag("qkv_bias"),
        **(experts | fields_of_layers(layers)),
    )


QWEN_SHARED = (
    *hf_experts("mlp", GATED, "ffn/experts_ffn"),
    *hf_dense("mlp.shared_expert", "ffn/shared_ffn", GATED),
    hf_kernel("mlp.shared_expert_gate", "ffn/shared_gate"),
    *HF_DENSE_LAYERS,
)
QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _qwen2_moe,
    (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *QWEN_SHARED),
    QWEN
    | {
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "qkv_bias": True,
    },
)


# ---------------------------------------------------------------- GLM-4.5 and GLM-4.6


def _glm4_moe(f: Fields, name: str) -> ModelConfig:
    mtp = f.integer(first_present(f, "num_nextn_predict_layers", "num_mtp_layers"), low=0, default=1)
    if mtp > 1:  # `ignored` leaves out one layer
        raise f.error(
            "num_nextn_predict_layers", "0 or 1: a layer that predicts further tokens is not loaded", mtp
        )
    first = f.integer("first_k_dense_replace", low=0, high=2**10)
    counts = expert_counts(f, "n_routed_experts", "num_local_experts")
    d_shared = f.integer("n_shared_experts", high=2**10) * f.integer("moe_intermediate_size")
    features, layers = expert_fields(f, counts, [i < first for i in range(layer_count(f))])
    features |= {
        "qkv_bias": f.flag("attention_bias"),
        "qk_norm": "head" if f.flag("use_qk_norm") else "",
        "ffn": SharedExperts(d_shared, _sigmoid_router(f, **counts)),
    }
    return base_config(f, name, **(features | fields_of_layers(layers)))


def _sigmoid_router(f: Fields, n_experts: int, experts_per_token: int) -> RouterSpec:
    groups = f.integer("n_group", high=2**12)
    if n_experts % groups or n_experts // groups < 2:
        raise f.error("n_group", f"equal groups of 2 or more of the {n_experts} experts", groups)
    top_groups = f.integer("topk_group", high=2**12)
    if top_groups > groups or top_groups * (n_experts // groups) < experts_per_token:
        expected = f"at most {groups} groups that hold num_experts_per_tok ({experts_per_token}) experts"
        raise f.error("topk_group", expected, top_groups)
    scale = f.number("routed_scaling_factor")
    return RouterSpec("sigmoid", f.flag("norm_topk_prob"), True, groups, top_groups, scale)


GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    _glm4_moe,
    (
        *HF_ENDS,
        *HF_PRE_NORMS,
        *HF_ATTENTION,
        *HF_QK_NORMS,
        *hf_experts("mlp", folder="ffn/experts_ffn"),
        hf_row("mlp.gate.e_score_correction_bias", "ffn/experts_ffn/router/correction"),
        *hf_dense("mlp.shared_experts", "ffn/shared_ffn", GATED),
        *HF_DENSE_LAYERS,
    ),
    {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
    },
    ignored=(r"^model\.layers\.{n_layers}\.",),  # the layer that predicts further tokens
)


# ---------------------------------------------------------------- gpt-oss
#
# Attention has a sink per head, biases and alternating windows. Experts and router have biases; the gate
# is the clamped swish, and its factor is ``1 + clip(x W_up)``. The released files store the experts'
# kernels in MXFP4 (`nalora_jax.weights.model_files`).

_GPT_OSS: dict[str, Any] = {
    "head_dim": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "rope_theta": 150_000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}


def _gpt_oss(f: Fields, name: str) -> ModelConfig:
    _check_quantization(f)
    if f.text("hidden_act") != "silu":
        raise f.error(
            "hidden_act", "'silu': the gate follows from swiglu_alpha and swiglu_limit", f.get("hidden_act")
        )
    limit = f.number("swiglu_limit")
    return base_config(
        f,
        name,
        activation=clamped_swish(f.number("swiglu_alpha"), limit).name,
        up_limit=limit,
        attn_sinks=True,
        ffn_bias=True,
        router_bias=True,
        windows=windows_of(f, periodic(f, 2)),
        **expert_counts(f, "num_local_experts", "num_experts", default=128),
        **attention_bias(f),
    )


def _check_quantization(f: Fields) -> None:
    """Refuses any quantization except the released files': MXFP4 experts, all others floats."""
    stored = Fields(f.mapping("quantization_config"), {}, f"{f.where}: quantization_config")
    if not stored.raw:
        return
    if stored.get("quant_method") != "mxfp4":
        remedy = "load the unquantized model"
        raise stored.error(
            "quant_method", "'mxfp4', or no quantization_config", repr(stored.get("quant_method")), remedy
        )
    for key in sorted(stored.raw.keys() - {"quant_method", "modules_to_not_convert", "dequantize"}):
        stored.refuse(key)
    listed = stored.get("modules_to_not_convert")
    if not isinstance(listed, list | None) or any("experts" in str(module) for module in listed or ()):
        raise stored.error(
            "modules_to_not_convert", "a list of modules other than the experts", repr(listed)[:60]
        )


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    _gpt_oss,
    (
        *HF_ENDS,
        *HF_PRE_NORMS,
        *HF_ATTENTION,
        HF_SINKS,
        hf_kernel("mlp.router", "ffn/router"),
        hf_row("mlp.router.bias", "ffn/router/bias"),
        *(
            TensorRow(
                f"model.layers.{{layer}}.mlp.experts.gate_up_proj{theirs}",
                (f"layers/ffn/gate_proj/{ours}", f"layers/ffn/up_proj/{ours}"),
                "columns",
            )
            for ours, theirs in {"kernel": "", "bias": "_bias"}.items()
        ),
        hf_row("mlp.experts.down_proj", "ffn/down_proj/kernel"),
        hf_row("mlp.experts.down_proj_bias", "ffn/down_proj/bias"),
    ),
    _GPT_OSS,
    checks=("quantization_config",),
)

FAMILIES = (MIXTRAL, OLMOE, QWEN3_MOE, QWEN2_MOE, GLM4_MOE, GPT_OSS)
