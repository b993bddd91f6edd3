"""OLMo: norms of queries and keys over all heads."""

from __future__ import annotations

from nalora_jax.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.record import Family
from nalora_jax.models.families.shared import attention_bias, base_config, first_present
from nalora_jax.models.families.tensors import (
    HF_ATTENTION,
    HF_ENDS,
    HF_PRE_NORMS,
    HF_QK_NORMS,
    hf_experts,
)


def _olmoe(f: Fields, name: str) -> ModelConfig:
    f.refuse("clip_qkv")
    return base_config(
        f,
        name,
        qk_norm="projection",
        n_experts=f.integer(first_present(f, "num_experts", "num_local_experts"), high=2**12),
        experts_per_token=f.integer("num_experts_per_tok", high=2**12),
        norm_topk=f.flag("norm_topk_prob"),
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

FAMILIES = (OLMOE,)
