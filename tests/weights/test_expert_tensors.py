"""Experts in MXFP4 against transformers' dequantization, and stacked as transformers holds them in
memory."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nalora_jax.common.trees import flatten, unflatten
from nalora_jax.config import MeshConfig
from nalora_jax.errors import NaloraError
from nalora_jax.mesh.distributed import make_mesh
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import param_shapes
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.ops.quantize import dequantize, quantize
from nalora_jax.weights import tensors
from nalora_jax.weights.base import load_model
from nalora_jax.weights.hf import SafetensorsFolder
from nalora_jax.weights.keymaps import keymap_for
from nalora_jax.weights.merge import write_merged
from nalora_jax.weights.model_files import map_fused_experts
from nalora_jax.weights.tensors import load_params
from nalora_jax.weights.tokenizer_files import copy_tokenizer
from tests.weights.conftest import COMMON
from tests.weights.folders import tokenizer_files

ATTENTION = [
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
]
RELEASED = {"modules_to_not_convert": ATTENTION, "quant_method": "mxfp4"}
SIZES = COMMON | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 16,
}
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
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 126, shape, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": RELEASED}))
    tokenizer_files(folder)
    return folder


def transformers_floats(folder: Path, layer: int, name: str) -> np.ndarray:
    """``[E, d_in, d_out]`` by transformers' own conversion."""
    tensors = load_file(folder / "model.safetensors")
    stem = f"model.layers.{layer}.mlp.experts.{name}"
    return (
        convert_moe_packed_tensors(tensors[f"{stem}_blocks"], tensors[f"{stem}_scales"])
        .float()
        .numpy()
    )


@pytest.mark.parametrize(("dtype", "kind"), [("float32", None), ("bfloat16", "mxfp4")])
def test_floats_are_exactly_transformers(released, dtype, kind):
    mesh = make_mesh(MeshConfig(1, 4, 2))
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
    model = load_model(str(released), dtype="bfloat16", quantized="mxfp4")
    rng, path = np.random.default_rng(0), "layers/ffn/down_proj"
    a, b = (rng.normal(0, 0.1, (2, 4, *shape)).astype(np.float32) for shape in ((96, 2), (2, 64)))
    lora = unflatten({f"{path}/a": a, f"{path}/b": b})
    spec = AdapterSpec(((path, TargetSpec((2, 2), (4.0, 4.0))),))
    options = {"hf_config": model.hf_config, "tokenizer": partial(copy_tokenizer, released)}
    write_merged(tmp_path / "merged", model.config, model.params, lora, spec, **options)
    found, stored = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", released)
    )
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert len(found) == len(stored) - 4  # blocks and scales of two kernels in two layers
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        layer, _, kernel = name.partition(".mlp.experts.")
        if not kernel.endswith("_proj"):
            assert torch.equal(tensor, stored[name]), name
            continue
        expected = transformers_floats(released, int(layer[-1]), kernel)
        if kernel == "down_proj":
            expected = expected + 2 * (a @ b)[int(layer[-1])]
        np.testing.assert_allclose(tensor.float(), expected, rtol=2**-8, atol=1e-5, err_msg=name)


def test_blocks_without_their_scales_are_refused(released, tmp_path):
    shutil.copytree(released, tmp_path / "model")
    tensors = load_file(released / "model.safetensors")
    scales = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[scales] = tensors[scales].to(torch.int32)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(NaloraError, match="down_proj_scales: expected U8, found I32"):
        load_model(str(tmp_path / "model"), dtype="float32")
    del tensors[scales]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(NaloraError, match="model.layers.1.mlp.experts.down_proj_blocks.*no scales"):
        load_model(str(tmp_path / "model"), dtype="float32")


def test_scales_of_all_sizes_are_exact():
    """Also the smallest and largest, as transformers' ldexp."""
    scales = torch.arange(2, 253, dtype=torch.uint8).reshape(1, -1, 1)
    blocks = (
        torch.arange(16, dtype=torch.uint8).mul(17).expand(1, scales.shape[1], 1, 16).contiguous()
    )
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
    stored = quantize(want[0], "mxfp4")
    np.testing.assert_array_equal(dequantize(stored), want[0])


def test_rounding_is_to_the_nearest_level_and_to_even_codes():
    """As of ml_dtypes' numbers of 4 bits; both columns have a scale of 1."""
    numbers = np.resize(np.arange(-31, 32, dtype=np.float32) / 4, (32, 2))
    expected = numbers.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(dequantize(quantize(numbers, "mxfp4")), expected)


# ---------------------------------------------------------------- all experts of a layer in two
# tensors


MIXTURE = COMMON | {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
MIXTURE |= {"moe_intermediate_size": 24, "layer_types": ["full_attention"] * 2}


@pytest.mark.parametrize(
    ("family", "folder"), [("qwen3_moe", "ffn"), ("qwen3_5_moe_text", "ffn/experts_ffn")]
)
def test_fused_experts_are_read_as_one_kernel_each(tmp_path, family, folder, monkeypatch):
    monkeypatch.setattr(tensors, "READ_BLOCK", 64)  # several blocks an expert
    raw = transformers.AutoConfig.for_model(family, **MIXTURE)
    saved = transformers.AutoModelForCausalLM.from_config(
        raw
    ).state_dict()  # the form of its modules
    save_file(
        {name: tensor.clone() for name, tensor in saved.items()}, tmp_path / "model.safetensors"
    )
    config, source = ModelConfig.from_hf(raw.to_dict()), SafetensorsFolder(tmp_path)
    keymap = map_fused_experts(keymap_for(config), source.shapes())
    leaves = flatten(load_params(param_shapes(config), source, keymap, dtype="float32"))
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        gate, up = saved[f"{stem}.gate_up_proj"].chunk(2, dim=1)
        theirs = {"gate_proj": gate, "up_proj": up, "down_proj": saved[f"{stem}.down_proj"]}
        for name, kernels in theirs.items():
            found = leaves[f"layers/{folder}/{name}/kernel"][layer]
            np.testing.assert_array_equal(found, kernels.numpy().swapaxes(1, 2))
