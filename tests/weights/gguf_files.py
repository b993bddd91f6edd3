"""GGUF files of random models, as llama.cpp's converter would write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from nalora_jax.common.trees import unflatten
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import param_shapes
from tests.param_trees import tensors_from_params
from tests.weights.folders import RAW

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", "Ġa"]
MODEL = RAW | {"intermediate_size": 24, "num_hidden_layers": 2, "tie_word_embeddings": True}
Write = Callable[[gguf.GGUFWriter], Any]


def write_model(
    path: Path,
    architecture: str,
    raw: dict[str, Any],
    params: dict[str, Any],
    more: Write = lambda _: None,
) -> Path:
    """Writes a model; ``more`` adds what the architecture has besides."""
    writer = gguf.GGUFWriter(path, architecture)
    add_shape(writer, raw)
    more(writer)
    return write_tensors(writer, ModelConfig.from_hf(raw), params, path)


def write_tensors(writer: gguf.GGUFWriter, config: ModelConfig, params: Any, path: Path) -> Path:
    """Ends a GGUF file with the model's tensors in float32."""
    for name, tensor in tensors_from_params(config, params, "gguf"):
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    return finish(writer, path)


def add_shape(writer: gguf.GGUFWriter, raw: dict[str, Any]) -> None:
    """Adds the metadata that every architecture has, and a tokenizer."""
    further = max(0, raw["vocab_size"] - len(WORDS))
    fields: dict[str, Any] = {
        "block_count": raw["num_hidden_layers"],
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "feed_forward_length": raw["intermediate_size"],
        "head_count": raw["num_attention_heads"],
        "head_count_kv": raw["num_key_value_heads"],
        **dict.fromkeys(("key_length", "value_length"), raw["head_dim"]),
        "layer_norm_rms_eps": raw["rms_norm_eps"],
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": [*WORDS, *(f"<extra{i}>" for i in range(further))],
        "token_types": [2, 3, 3, *[1] * (len(WORDS) - 3), *[5] * further],
        "token_merges": ["a b", "Ġ a"],
        **{"unk_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    }
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)


def random_params(raw: dict[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = param_shapes(ModelConfig.from_hf(raw))
    return unflatten(
        {path: rng.standard_normal(shape, np.float32) * 0.3 for path, shape in shapes.items()}
    )


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
