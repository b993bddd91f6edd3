"""Architectures by name for planning, from their ``config.json``, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.rope_scaling import with_rope_scaling
from nalora_jax.tokenizer import read_json

_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

# As published in the models' repositories.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3.1-70b": _LLAMA3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "gemma-3-27b": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 168,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "gemma-4-31b": {
        "model_type": "gemma4_text",
        "vocab_size": 262144,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "sliding_window": 1024,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "qwen3-32b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
}


def architecture(name: str, *, images: bool = False, rope_scaling: str = "") -> ModelConfig:
    """Returns the architecture called ``name``.

    A name is a key of `CONFIGS`, a ``config.json``, or a Hugging Face folder. With ``images`` a
    multimodal model includes its image tower and projector; by default only its text model is
    returned. ``rope_scaling`` replaces the model's (`nalora_jax.models.rope_scaling`).

    Raises:
      NaloraError: the name is unknown, or its config or its new RoPE scaling is not supported.
    """
    raw, where = _raw_config(name)
    return ModelConfig.from_hf(with_rope_scaling(raw, rope_scaling, where), where, images=images)


def _raw_config(name: str) -> tuple[dict[str, Any], str]:
    """Returns the fields of the ``config.json`` of a model, and their source for messages."""
    if name.lower() in CONFIGS:
        return CONFIGS[name.lower()], name
    file = Path(name)
    if file.is_dir():
        file /= "config.json"
    if file.suffix == ".json" and file.exists():
        return read_json(file), str(file)
    raise NaloraError(
        "--model",
        expected="a config.json, a folder that holds one, or one of " + ", ".join(CONFIGS),
        found=repr(name),
        remedy="download the model's config.json: planning needs nothing else",
    )
