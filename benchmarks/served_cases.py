"""Tiny models with the features of released ones, one or more for each family, for served.py.

They are built by ``build`` of tests/models/test_families.py, with sizes that vLLM's attention on a
CPU takes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from tests.models.family_fields import GRANITE, LLAMA3, WINDOW, YARN

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 96}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_GEMMA4 = {
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}

# By name: the family (model_type of config.json), the features, and the fields of config.json.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama3 RoPE", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", "sliding window", {"sliding_window": WINDOW}),
    "ministral3": (
        "ministral3",
        "YaRN, query scale by position",
        {
            "rope_parameters": {
                **YARN,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "qwen2": ("qwen2", "qkv biases", {}),
    "qwen3": ("qwen3", "qk-norm", {}),
    "gemma": ("gemma", "1 + w norms, embedding scale", {}),
    "gemma2": (
        "gemma2",
        "soft caps, alternating windows",
        {"query_pre_attn_scalar": 24, "sliding_window": WINDOW},
    ),
    "gemma3": (
        "gemma3_text",
        "local and global RoPE, windows, qk-norm",
        {
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma4": (
        "gemma4_text",
        "K = V, proportional RoPE, layer scalars, windows",
        _GEMMA4,
    ),
    "gemma4_e": (
        "gemma4_text",
        "per-layer embeddings, keys of earlier layers",
        {
            **_GEMMA4,
            "attention_k_eq_v": False,
            "num_global_key_value_heads": None,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 128,
            "num_kv_shared_layers": 2,
        },
    ),
    "gemma4_moe": (
        "gemma4_text",
        "experts added to the FFN",
        {
            **_GEMMA4,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
        },
    ),
    "phi3": ("phi3", "fused projections, sliding window", {"sliding_window": WINDOW}),
    "olmo2": ("olmo2", "post-norms, qk-norm over projections", {}),
    "olmo3": (
        "olmo3",
        "windows, YaRN in full layers, post-norms",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "smollm3": ("smollm3", "every fourth layer without RoPE", {}),
    "granite": ("granite", "four multipliers", GRANITE),
    "granite_swa": (
        "granite_swa",
        "windows, attention sinks, a rotary base per layer",
        {**GRANITE, "sliding_window": WINDOW, "layer_rope_theta": [1e4, 0.0, 1e2, 1e4]},
    ),
    "lfm2": (
        "lfm2",
        "gated short convolutions and attention",
        {
            "layer_types": ["conv", "full_attention"] * 2,
            "block_dim": 128,
            "conv_dim": 128,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "qwen3_5": ("qwen3_5_text", "Gated DeltaNet, gated attention", _DELTA_NET),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        "Gated DeltaNet, experts, shared expert",
        {**_DELTA_NET, **_SHARED},
    ),
    "qwen3_next": (
        "qwen3_next",
        "fused DeltaNet, experts, shared expert",
        {**_DELTA_NET, **_SHARED},
    ),
    "mixtral": (
        "mixtral",
        "top-2 of 8 experts",
        {"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": ("qwen2_moe", "top-2 of 8 experts, gated shared expert", _SHARED),
    "qwen3_moe": (
        "qwen3_moe",
        "top-2 of 8 experts, qk-norm",
        {**_EXPERTS, "norm_topk_prob": True},
    ),
    "gpt_oss": (
        "gpt_oss",
        "attention sinks, clamped gate, expert biases, windows",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "rope_parameters": {
                **YARN,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        "corrected sigmoid scores, shared expert, a dense layer, partial RoPE",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "routed_scaling_factor": 1.5,
        },
    ),
}
