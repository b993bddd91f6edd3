"""Adapters for vLLM of layers whose values are the keys' projection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.weights.peft import export_adapter, import_adapter, verify_export

RAW = {
    "model_type": "gemma4_text",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 8,
    "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 4,
}
CONFIG = ModelConfig.from_hf(RAW)
KINDS = ("group0/block0", "group0/block1")  # sliding layers, and full layers without v_proj


def exported(random_lora: Any, folder: Path, target: Any) -> dict[str, np.ndarray]:
    """The tensors of an adapter on keys and down projections of all layers, and on values where they exist."""
    names = [f"{kind}/{name}" for kind in KINDS for name in ("attn/k_proj", "ffn/down_proj")]
    targets = dict.fromkeys([*names, f"{KINDS[0]}/attn/v_proj"], ((2, 3), (4.0, 5.0)))
    lora, spec = random_lora(CONFIG, targets)
    export_adapter(lora, spec, CONFIG, folder, base_model_name="org/base", target=target)
    verify_export(folder, lora, spec, CONFIG)
    return load_file(folder / "adapter_model.safetensors")


def test_vllm_gets_the_adapter_of_keys_for_values_too(random_lora, tmp_path):
    """vLLM's qkv projection has both slots, filled with the weight of k_proj (its models/gemma4.py)."""
    tensors = exported(random_lora, tmp_path / "vllm", "vllm")
    for layer in range(4):
        for factor in ("lora_A", "lora_B"):
            keys, values = (
                tensors[f"base_model.model.model.layers.{layer}.self_attn.{name}.{factor}.weight"]
                for name in ("k_proj", "v_proj")
            )
            assert np.array_equal(keys, values) == (layer in (1, 3))
    of_peft = exported(random_lora, tmp_path / "peft", "peft")
    assert not any(".layers.1.self_attn.v_proj." in name for name in of_peft)


def test_other_values_than_the_keys_are_refused(random_lora, tmp_path):
    exported(random_lora, tmp_path / "a", "vllm")
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.3.self_attn.v_proj.lora_B.weight"] *= 2
    save_file(tensors, file)
    with pytest.raises(NaloraError, match=r"layers\.3\.self_attn\.v_proj"):
        import_adapter(tmp_path / "a", CONFIG)
