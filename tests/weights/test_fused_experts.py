"""Mixtures whose files store all experts of a layer in two tensors, as transformers holds them in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from nalora_jax.common.trees import flatten
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.weights.expert_tensors import with_experts
from nalora_jax.weights.hf import SafetensorsFolder
from nalora_jax.weights.keymaps import keymap_for
from nalora_jax.weights.tensors import load_params

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "layer_types": ["full_attention"] * 2,
}


def saved(folder: Path, family: str, **changes: Any) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """A random model in the form of its modules, which fuse the experts; returns its config and its tensors."""
    config = transformers.AutoConfig.for_model(family, **(SIZES | changes))
    tensors = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return ModelConfig.from_hf(config.to_dict()), tensors


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe_text"])
def test_fused_experts_are_read_as_one_kernel_each(tmp_path: Path, family: str) -> None:
    config, tensors = saved(tmp_path / "model", family)
    keymap = keymap_for(config, "hf")
    source = with_experts(SafetensorsFolder(tmp_path / "model"), keymap)
    leaves = flatten(load_params(config, source, keymap, dtype="float32"))
    (path,) = {
        path.rpartition("/gate_proj")[0]
        for path in leaves
        if path.endswith("/gate_proj/kernel") and leaves[path].ndim == 4
    }
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        gate, up = tensors[f"{stem}.gate_up_proj"].chunk(2, dim=1)
        for name, theirs in {
            "gate_proj": gate,
            "up_proj": up,
            "down_proj": tensors[f"{stem}.down_proj"],
        }.items():
            kernels = leaves[f"{path}/{name}/kernel"][layer]
            np.testing.assert_array_equal(kernels, theirs.numpy().swapaxes(1, 2))


def test_fused_experts_of_another_shape_are_refused(tmp_path: Path) -> None:
    config, tensors = saved(tmp_path / "model", "qwen3_moe")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    damaged = tensors | {name: tensors[name][:, 1:].contiguous()}
    save_file(damaged, tmp_path / "model" / "model.safetensors")
    keymap = keymap_for(config, "hf")
    source = with_experts(SafetensorsFolder(tmp_path / "model"), keymap)
    with pytest.raises(
        NaloraError, match=rf"{name}: expected \[experts, outputs of gate_proj and up_proj, inputs\]"
    ):
        load_params(config, source, keymap, dtype="float32")
