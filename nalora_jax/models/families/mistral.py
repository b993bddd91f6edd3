"""Mistral, Ministral 3 and Mixtral."""

from __future__ import annotations

from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.config.rope_scaling import ORIGINAL, WITH_ORIGINAL
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.record import GGUF, Family, Metadata
from nalora_jax.models.families.shared import base_config, head_dim_of, same_window
from nalora_jax.models.families.tensors import (
    GGUF_EXPERTS,
    GGUF_LLAMA,
    GGUF_PAIRED,
    GGUF_PRE,
    HF_ATTENTION,
    HF_ENDS,
    HF_LLAMA,
    HF_PRE_NORMS,
    gguf_ends,
    gguf_norms,
    hf_experts,
)
from nalora_jax.models.ropes import read_ropes


def _mistral(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, windows=same_window(f))


MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    _mistral,
    HF_LLAMA,
    {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    # llama.cpp's files do not tell Mistral from Llama.
    GGUF("llama", GGUF_LLAMA, matches=lambda r: False),
    multimodal="mistral3",
)


def _ministral3(f: Fields, name: str) -> ModelConfig:
    beta = "llama_4_scaling_beta"
    ropes, _ = read_ropes(f, head_dim_of(f), None, further=(beta, "max_position_embeddings"))
    rope = Fields(
        f.mapping("rope_scaling") or f.mapping("rope_parameters"), {}, f"{f.where}: rope_parameters"
    )
    growth = rope.number(beta, default=0.0, zero=True)
    growing: dict[str, Any] = {}
    if growth:
        # Queries grow from the original context; dynamic scaling starts at the model's context.
        if ropes[0].kind in (*WITH_ORIGINAL, "longrope"):
            length = ropes[0].max_positions
        elif rope.get(ORIGINAL) is not None:
            length = rope.integer(ORIGINAL, high=2**30)
        else:
            raise rope.error(beta, f"0 without {ORIGINAL}", growth)
        growing = {"query_growth": growth, "growth_length": length}
    return base_config(f, name, ropes=ropes, windows=same_window(f), **growing)


def _ministral3_settings(r: Metadata) -> dict[str, Any]:
    scaling = r.scaling()
    if scaling is None:
        return {
            "architectures": [MISTRAL.class_name],
            "model_type": MISTRAL.name,
            "sliding_window": None,
        }
    scaling["llama_4_scaling_beta"] = r.number("attention.temperature_scale", float, 0.0)
    return {"rope_scaling": scaling}


_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

MINISTRAL3 = Family(
    "ministral3",
    "Ministral3ForCausalLM",
    _ministral3,
    HF_LLAMA,
    {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _YARN,
    },
    GGUF("mistral3", GGUF_LLAMA, _ministral3_settings),
)


def _mixtral(f: Fields, name: str) -> ModelConfig:
    return base_config(
        f,
        name,
        windows=same_window(f),
        n_experts=f.integer("num_local_experts", high=2**12),
        experts_per_token=f.integer("num_experts_per_tok", high=2**12),
    )


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
            "num_local_experts": r.number("expert_count", int),
            "num_experts_per_tok": r.number("expert_used_count", int),
            "sliding_window": None,
        },
        lambda r: bool(r.number("expert_count", int, 0)),
    ),
)

FAMILIES = (MISTRAL, MINISTRAL3, MIXTRAL)
