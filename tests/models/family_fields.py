"""Fields of config.json in the models of these tests and of benchmarks/served_cases.py."""

from __future__ import annotations

from typing import Any

from nalora_jax.models.config import ModelConfig

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WINDOW, ORIGINAL = 8, 16  # the sliding windows and the original contexts, which rows exceed
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
# Latent attention, whose heads have 8 + 4 dimensions, and values of 6.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
GRANITE = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.4,
    "logits_scaling": 4.0,
}


def tiny_config(model_type: str, **fields: Any) -> ModelConfig:
    """Returns a model of `TINY` sizes with other fields."""
    return ModelConfig.from_hf(TINY | {"model_type": model_type} | fields)
