"""Model folders with a tokenizer of words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from nalora_jax.models.config import ModelConfig
from nalora_jax.weights.keymaps import keymap_for

RAW: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def tokenizer_files(folder: Path, size: int = 48) -> None:
    vocabulary = {"</s>": 0} | {f"t{i}": i for i in range(1, size)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "</s>"}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def write_folder(folder: Path, raw: dict[str, Any] = RAW) -> dict[str, np.ndarray]:
    """A model folder with one safetensors file of random float32; returns its tensors."""
    folder.mkdir(exist_ok=True)
    rng, keymap = np.random.default_rng(0), keymap_for(ModelConfig.from_hf(raw), "hf")
    tensors = {t.name: rng.normal(size=t.shape).astype(np.float32) for t in keymap.tensors}
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer_files(folder, raw["vocab_size"])
    save_file(tensors, folder / "model.safetensors")
    return tensors
