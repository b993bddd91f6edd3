"""Readers of mixtures whose experts are narrower than dense layers: Qwen2-MoE, Qwen3-MoE, GLM-4.5.

Dense layers are a second kind in the list of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nalora_jax.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.shared import attention_bias, base_config, first_present, optional_windows
from nalora_jax.models.router import RouterSpec
from nalora_jax.models.shared_experts import SharedExperts

QWEN3_MOE: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
}
QWEN2_MOE: dict[str, Any] = {
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "qkv_bias": True,
}
GLM4_MOE: dict[str, Any] = {
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
}


def read_qwen3_moe(f: Fields, name: str) -> ModelConfig:
    """Returns the config of Qwen3-MoE."""
    return base_config(
        f,
        name,
        windows=optional_windows(f, lambda _: True),
        qk_norm="head",
        norm_topk=f.flag("norm_topk_prob"),
        **qwen_experts(f),
        **attention_bias(f),
    )


def read_qwen2_moe(f: Fields, name: str) -> ModelConfig:
    """Returns the config of Qwen2-MoE (Qwen1.5-MoE-A2.7B)."""
    first = f.integer("max_window_layers", low=0)
    router = RouterSpec(normalize=f.flag("norm_topk_prob"))
    return base_config(
        f,
        name,
        windows=optional_windows(f, lambda i: i % 2 == 0 and i < first),
        qkv_bias=f.flag("qkv_bias"),
        ffn=SharedExperts(f.integer("shared_expert_intermediate_size"), router, gated=True),
        **qwen_experts(f),
    )


def qwen_experts(f: Fields) -> dict[str, Any]:
    """Returns the fields of Qwen's experts, and the layers that have none."""
    n_layers, step = f.integer("num_hidden_layers", high=2**10), f.integer("decoder_sparse_step")
    listed = f.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < n_layers for i in listed):
        raise f.error("mlp_only_layers", f"numbers of layers from 0 to {n_layers - 1}", repr(listed)[:60])
    n_experts = f.integer(first_present(f, "num_experts", "num_local_experts"), high=2**12)
    return _experts(f, n_experts, [i in listed or (i + 1) % step != 0 for i in range(n_layers)])


def _experts(f: Fields, n_experts: int, dense: Sequence[bool]) -> dict[str, Any]:
    """Returns the fields of mixtures in all layers that ``dense`` does not mark."""
    fields = {
        "d_ff": f.integer("moe_intermediate_size"),
        "n_experts": n_experts,
        "experts_per_token": f.integer("num_experts_per_tok", high=2**12),
    }
    if not any(dense):
        return fields
    d_ff = f.integer("intermediate_size")
    kind = (("d_ff", d_ff), ("n_experts", 0), ("experts_per_token", 0), ("ffn", None))
    return fields | {"kinds": ((), kind), "layer_kinds": tuple(int(d) for d in dense)}


def read_glm4_moe(f: Fields, name: str) -> ModelConfig:
    """Returns the config of GLM-4.5 and GLM-4.6."""
    n_layers = f.integer("num_hidden_layers", high=2**10)
    mtp = f.integer(first_present(f, "num_nextn_predict_layers", "num_mtp_layers"), low=0, default=1)
    if mtp > 1:  # `keytables` leaves out one layer
        raise f.error(
            "num_nextn_predict_layers", "0 or 1: a layer that predicts further tokens is not loaded", mtp
        )
    first = f.integer("first_k_dense_replace", low=0, high=2**10)
    n_experts = f.integer(first_present(f, "n_routed_experts", "num_local_experts"), high=2**12)
    d_shared = f.integer("n_shared_experts", high=2**10) * f.integer("moe_intermediate_size")
    return base_config(
        f,
        name,
        qkv_bias=f.flag("attention_bias"),
        qk_norm="head" if f.flag("use_qk_norm") else "",
        ffn=SharedExperts(d_shared, _sigmoid_router(f, n_experts)),
        **_experts(f, n_experts, [i < first for i in range(n_layers)]),
    )


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
