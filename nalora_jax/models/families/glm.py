"""GLM-4.5 and GLM-4.6: corrected sigmoid scores of experts, shared experts, dense first layers."""

from __future__ import annotations

from nalora_jax.common.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.record import Family
from nalora_jax.models.families.shared import base_config, expert_fields, fields_of_layers, first_present
from nalora_jax.models.families.tensors import (
    GATED,
    HF_ATTENTION,
    HF_DENSE_LAYERS,
    HF_ENDS,
    HF_PRE_NORMS,
    HF_QK_NORMS,
    hf_dense,
    hf_experts,
    hf_row,
)
from nalora_jax.models.routing import RouterSpec
from nalora_jax.models.shared_experts import SharedExperts


def _glm4_moe(f: Fields, name: str) -> ModelConfig:
    n_layers = f.integer("num_hidden_layers", high=2**10)
    mtp = f.integer(first_present(f, "num_nextn_predict_layers", "num_mtp_layers"), low=0, default=1)
    if mtp > 1:  # `ignored` leaves out one layer
        raise f.error(
            "num_nextn_predict_layers", "0 or 1: a layer that predicts further tokens is not loaded", mtp
        )
    first = f.integer("first_k_dense_replace", low=0, high=2**10)
    n_experts = f.integer(first_present(f, "n_routed_experts", "num_local_experts"), high=2**12)
    d_shared = f.integer("n_shared_experts", high=2**10) * f.integer("moe_intermediate_size")
    features, layers = expert_fields(f, n_experts, [i < first for i in range(n_layers)])
    features |= {
        "qkv_bias": f.flag("attention_bias"),
        "qk_norm": "head" if f.flag("use_qk_norm") else "",
        "ffn": SharedExperts(d_shared, _sigmoid_router(f, n_experts)),
    }
    return base_config(f, name, **(features | fields_of_layers(layers)))


def _sigmoid_router(f: Fields, n_experts: int) -> RouterSpec:
    groups, top_k = f.integer("n_group", high=2**12), f.integer("num_experts_per_tok", high=2**12)
    if n_experts % groups or n_experts // groups < 2:
        raise f.error("n_group", f"equal groups of 2 or more of the {n_experts} experts", groups)
    top_groups = f.integer("topk_group", high=2**12)
    if top_groups > groups or top_groups * (n_experts // groups) < top_k:
        expected = f"at most {groups} groups that hold num_experts_per_tok ({top_k}) experts"
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

FAMILIES = (GLM4_MOE,)
