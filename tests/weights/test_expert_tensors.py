"""Experts in MXFP4 against transformers' dequantization, and stacked as transformers holds them in memory."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.config import MeshConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout.distributed import make_mesh
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import param_shapes
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.ops.quantize import MXFP4_LEVELS, dequantize, quantize
from nalora_jax.weights import tensors
from nalora_jax.weights.base import load_model
from nalora_jax.weights.hf import SafetensorsFolder
from nalora_jax.weights.keymaps import keymap_for
from nalora_jax.weights.merge import write_merged
from nalora_jax.weights.model_files import with_fused_experts
from nalora_jax.weights.tensors import check_tensors, load_params
from nalora_jax.weights.tokenizer_files import copy_tokenizer
from tests.weights.conftest import COMMON
from tests.weights.folders import tokenizer_files

ATTENTION = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
RELEASED = {"modules_to_not_convert": ATTENTION, "quant_method": "mxfp4"}
SIZES = COMMON | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
SIZES |= {"bos_token_id": None, "eos_token_id": None}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small gpt-oss in the released form: experts in MXFP4, the rest in bf16."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES)).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + float("norm" in name))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(
            118, 126, (experts, outputs, inputs // 32), dtype=torch.uint8
        )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": RELEASED}))
    tokenizer_files(folder)
    return folder


def transformers_floats(folder: Path, layer: int, name: str) -> np.ndarray:
    """``[E, d_in, d_out]`` by transformers' own conversion."""
    tensors = load_file(folder / "model.safetensors")
    stem = f"model.layers.{layer}.mlp.experts.{name}"
    return convert_moe_packed_tensors(tensors[f"{stem}_blocks"], tensors[f"{stem}_scales"]).float().numpy()


@pytest.mark.parametrize(
    ("dtype", "kind", "sizes"),
    [("float32", None, None), ("bfloat16", "mxfp4", (1, 4, 2))],
)
def test_floats_are_exactly_transformers(released, dtype, kind, sizes):
    mesh = None if sizes is None else make_mesh(MeshConfig(*sizes))
    params = load_model(str(released), dtype=dtype, quantized=kind, mesh=mesh).params["layers"]
    if kind:  # 4.25 bits; attention stays in floats
        kernel = params["ffn"]["gate_proj"]["kernel"]
        assert 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(kernel)) == 4.25 * 2 * 4 * 64 * 96
        assert params["attn"]["q_proj"]["kernel"].dtype == dtype
    for layer in range(2):
        both = transformers_floats(released, layer, "gate_up_proj")
        wanted = {"gate_proj": both[..., ::2], "up_proj": both[..., 1::2]}
        wanted["down_proj"] = transformers_floats(released, layer, "down_proj")
        for name, want in wanted.items():
            kernel = params["ffn"][name]["kernel"]
            floats = dequantize(kernel) if kind else kernel
            np.testing.assert_array_equal(np.asarray(floats[layer], np.float32), want, err_msg=name)


def test_the_quantized_model_is_merged_as_its_floats(released, tmp_path):
    base = load_model(str(released), dtype="bfloat16")
    stored = load_model(str(released), dtype="bfloat16", quantized="mxfp4")
    rng, path, spec = np.random.default_rng(0), "layers/ffn/down_proj", TargetSpec((2, 2), (4.0, 4.0))
    leaves = {
        f"{path}/{name}": rng.normal(0, 0.1, (2, 4, *shape)).astype(np.float32)
        for name, shape in {"a": (96, 2), "b": (2, 64)}.items()
    }
    lora, spec = unflatten(leaves), AdapterSpec(((path, spec),))
    for name, adapters in (("base", None), ("merged", lora)):
        files = []
        for source, model in (("floats", base), ("stored", stored)):
            folder = tmp_path / f"{name}-{source}"
            options: dict[str, Any] = {
                "hf_config": model.hf_config,
                "tokenizer": partial(copy_tokenizer, released),
            }
            write_merged(folder, model.config, model.params, adapters, spec, **options)
            files.append(load_file(folder / "model.safetensors"))
        want, found = files
        assert want.keys() == found.keys()
        for tensor, value in want.items():
            assert found[tensor].dtype == value.dtype == torch.bfloat16
            assert torch.equal(found[tensor], value), (name, tensor)
    stem = "model.layers.1.mlp.experts.gate_up_proj"
    np.testing.assert_array_equal(found[stem].float(), transformers_floats(released, 1, "gate_up_proj"))
    floats = transformers_floats(released, 1, "down_proj")
    expected = floats + 2 * leaves[f"{path}/a"][1] @ leaves[f"{path}/b"][1]
    down = found["model.layers.1.mlp.experts.down_proj"].float()
    np.testing.assert_allclose(down, expected, rtol=2**-8, atol=1e-5)


def test_scales_of_all_sizes_are_exact():
    """Also the smallest and largest, as transformers' ldexp."""
    scales = torch.arange(2, 253, dtype=torch.uint8).reshape(1, -1, 1)
    blocks = torch.arange(16, dtype=torch.uint8).mul(17).expand(1, scales.shape[1], 1, 16).contiguous()
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
    stored = quantize(want[0], "mxfp4")
    np.testing.assert_array_equal(dequantize(stored), want[0])


def test_rounding_is_to_the_nearest_level_and_to_even_codes():
    levels = np.asarray(MXFP4_LEVELS[:8])
    middles = (levels[1:] + levels[:-1]) / 2
    numbers = np.concatenate([[4.0], middles, -middles, np.linspace(-7.9, 7.9, 17)]).astype(np.float32)
    column = np.resize(numbers, 32)[:, None]
    found = np.asarray(dequantize(quantize(column, "mxfp4")))[:, 0]
    distance = np.abs(np.abs(column) - levels)
    nearest = levels[distance.argmin(axis=1)]
    even = levels[7 - distance[:, ::-1].argmin(axis=1)]  # the upper of two
    codes = np.searchsorted(levels, np.abs(found))
    assert np.all((np.abs(found) == nearest) | (np.abs(found) == even))
    ties = nearest != even
    assert ties.sum() >= 7
    assert np.all(codes[ties] % 2 == 0)
    np.testing.assert_array_equal(np.sign(found), np.sign(np.where(found == 0, 0, column[:, 0])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "fp8"}, "quant_method: expected 'mxfp4'.*found 'fp8'"),
        ({"modules_to_not_convert": ["model.layers.0.mlp.experts"]}, "modules_to_not_convert"),
        ({"bits": 4}, "bits"),
        ({}, "model.layers.1.mlp.experts.down_proj_blocks.*no scales"),
    ],
)
def test_other_quantization_is_refused_by_name(released, tmp_path, change, message):
    raw = json.loads((released / "config.json").read_text())
    raw["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tokenizer_files(tmp_path)
    tensors = load_file(released / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(NaloraError, match=f"quantization_config: {message}" if change else message):
        load_model(str(tmp_path), dtype="float32")


# ---------------------------------------------------------------- all experts of a layer in two tensors


MIXTURE = COMMON | {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
MIXTURE |= {"moe_intermediate_size": 24, "layer_types": ["full_attention"] * 2}


def saved(folder: Path, family: str) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """A random model in the form of its modules, which fuse the experts; returns its config and its tensors."""
    config = transformers.AutoConfig.for_model(family, **MIXTURE)
    tensors = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return ModelConfig.from_hf(config.to_dict()), tensors


@pytest.mark.parametrize(
    ("family", "folder"), [("qwen3_moe", "ffn"), ("qwen3_5_moe_text", "ffn/experts_ffn")]
)
def test_fused_experts_are_read_as_one_kernel_each(tmp_path, family, folder, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK", 64)  # several blocks an expert
    config, saved_tensors = saved(tmp_path / "model", family)
    source = SafetensorsFolder(tmp_path / "model")
    keymap = with_fused_experts(keymap_for(config), source.shapes())
    leaves = flatten(load_params(param_shapes(config), source, keymap, dtype="float32"))
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        gate, up = saved_tensors[f"{stem}.gate_up_proj"].chunk(2, dim=1)
        theirs = {"gate_proj": gate, "up_proj": up, "down_proj": saved_tensors[f"{stem}.down_proj"]}
        for name, kernels in theirs.items():
            found = leaves[f"layers/{folder}/{name}/kernel"][layer]
            np.testing.assert_array_equal(found, kernels.numpy().swapaxes(1, 2))


def test_fused_experts_of_another_shape_are_refused(tmp_path):
    config, whole = saved(tmp_path / "model", "qwen3_moe")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    damaged = whole | {name: whole[name][:, 1:].contiguous()}
    save_file(damaged, tmp_path / "model" / "model.safetensors")
    source = SafetensorsFolder(tmp_path / "model")
    with pytest.raises(
        NaloraError, match=rf"{name}: expected the shape \(4, 48, 16\), found \(4, 47, 16\)"
    ):
        check_tensors(source, with_fused_experts(keymap_for(config), source.shapes()))
