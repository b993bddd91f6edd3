"""Folders with quantized weights against the libraries that write them, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nalora_jax.common import buckets
from nalora_jax.common.trees import flatten, size_bytes
from nalora_jax.config import ComputeConfig, MeshConfig
from nalora_jax.mesh.distributed import make_mesh
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import param_shapes, projection_shapes
from nalora_jax.ops.scaled import Scaled
from nalora_jax.ops.storage import expand
from nalora_jax.planner.abstract_step import _weight, architecture
from nalora_jax.planner.estimates import weight_bytes
from nalora_jax.weights.base import load_model
from nalora_jax.weights.hf import ResolvedSource
from nalora_jax.weights.keymaps import keymap_for
from nalora_jax.weights.model_files import LoadedModel
from tests import tiny
from tests.refused import Call, table_test
from tests.weights.folders import tokenizer_files
from tests.weights.quantized_folders import (
    FORMATS,
    SIZES,
    Tensors,
    quantize_folder,
    write_quantized,
)


def is_scaled(leaf: Any) -> bool:
    return isinstance(leaf, Scaled)


def kernels_of(model: LoadedModel, floats: Tensors) -> dict[str, tuple[Any, np.ndarray]]:
    """By path: a stack of kernels as stored, and the reference's floats [layers, in, out]."""
    leaves = flatten(model.params, is_scaled)
    stacks: dict[str, list[np.ndarray]] = {}
    for tensor in keymap_for(model.config).tensors:
        if "_proj" in tensor.name:
            weight = floats[tensor.name].float().numpy().T
            stacks.setdefault(tensor.slots[0].path, []).append(weight)
    return {path: (leaves[path], np.stack(stack)) for path, stack in stacks.items()}


def stored_bytes(folder: Path) -> int:
    """Bytes of the projections in the file."""
    tensors = load_file(folder / "model.safetensors")
    return sum(tensor.nbytes for name, tensor in tensors.items() if "_proj." in name)


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_the_reference_s_and_memory_the_file_s(tmp_path, name):
    """Bit for bit: in float32, rounded to bf16, and read as floats to be quantized otherwise."""
    floats = write_quantized(tmp_path, *FORMATS[name])
    model = load_model(str(tmp_path), dtype="float32")
    requantized = flatten(load_model(str(tmp_path), dtype="float32", quantized="int8").params)
    size = 0
    for path, (kernel, want) in kernels_of(model, floats).items():
        assert is_scaled(kernel), path
        size += size_bytes(kernel)
        np.testing.assert_array_equal(jax.jit(expand)(kernel), want, err_msg=path)
        narrow = jax.jit(partial(expand, dtype="bfloat16"))(kernel)
        expected = torch.from_numpy(want).to(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(narrow.astype("float32"), expected, err_msg=path)
        largest = np.abs(want).max(axis=1, keepdims=True)
        np.testing.assert_allclose(
            requantized[f"{path}/scales"], largest / 127, rtol=1e-6, err_msg=path
        )
    # An order of groups that is no other is not kept.
    assert size <= 1.03 * stored_bytes(tmp_path)
    assert not any(map(is_scaled, (model.params["embed"], model.params["lm_head"]["kernel"])))


def reference_logits(floats: Tensors, tokens: np.ndarray) -> np.ndarray:
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    reference.load_state_dict({name: weight.float() for name, weight in floats.items()})
    with torch.no_grad():
        return reference(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize("name", ["fp8 in blocks", "compressed int4", "NVFP4", "GPTQ", "AWQ"])
def test_logits_are_those_of_the_floats_in_transformers(tmp_path, name):
    floats = write_quantized(tmp_path, *FORMATS[name])
    tokens = np.random.default_rng(0).integers(0, 48, (2, 12))
    model = load_model(str(tmp_path), dtype="float32")
    found = tiny.logits_of(Decoder(model.config), {"params": model.params}, tokens)
    np.testing.assert_allclose(found, reference_logits(floats, tokens), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["fp8 in blocks", "compressed int4 with zeros", "NVFP4"])
def test_devices_share_codes_and_scales(tmp_path, name):
    floats = write_quantized(tmp_path, *FORMATS[name])
    mesh = make_mesh(MeshConfig(1, 4, 2))
    model = load_model(str(tmp_path), dtype="float32", mesh=mesh)
    for path, (kernel, want) in kernels_of(model, floats).items():
        shared = [kernel.codes]
        if name != "fp8 in blocks":  # which has 2 to 14 blocks
            shared.append(kernel.scales)
        for array in shared:
            assert array.addressable_shards[0].data.nbytes * 8 == array.nbytes, path
        np.testing.assert_array_equal(jax.jit(expand)(kernel), want, err_msg=path)
    tokens = np.random.default_rng(0).integers(0, 48, (2, 12))
    found = tiny.logits_of(Decoder(model.config), {"params": model.params}, tokens)
    np.testing.assert_allclose(found, reference_logits(floats, tokens), rtol=1e-3, atol=2e-4)


def test_experts_stay_quantized_and_are_shared(tmp_path):
    """Qwen3-MoE as it is released in fp8: one tensor per expert, the router in bf16."""
    raw = transformers.Qwen3MoeConfig(
        **SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    )
    config = ModelConfig.from_hf(raw.to_dict())
    torch.manual_seed(0)
    tensors = {}
    for tensor in keymap_for(config).tensors:
        weight = torch.randn(tensor.shape) * 0.2 + float("norm" in tensor.name)
        tensors[tensor.name] = weight.bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(raw.to_dict()))
    tokenizer_files(tmp_path)
    settings, quantize = FORMATS["fp8 in blocks"]
    floats = quantize_folder(tmp_path, settings, quantize)
    reference = transformers.Qwen3MoeForCausalLM(raw)
    fused = {}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        parts = {"gate_proj": [], "up_proj": [], "down_proj": []}
        for expert in range(4):
            for name, weights in parts.items():
                weights.append(floats.pop(f"{stem}.{expert}.{name}.weight").float())
        both = [torch.cat(pair) for pair in zip(parts["gate_proj"], parts["up_proj"], strict=True)]
        fused[f"{stem}.gate_up_proj"] = torch.stack(both)
        fused[f"{stem}.down_proj"] = torch.stack(parts["down_proj"])
    reference.load_state_dict({name: tensor.float() for name, tensor in floats.items()} | fused)
    tokens = np.random.default_rng(0).integers(0, 48, (4, 12))
    with torch.no_grad():
        want = reference(torch.from_numpy(tokens)).logits.numpy()
    for mesh in (None, make_mesh(MeshConfig(2, 2, 2))):
        model = load_model(str(tmp_path), dtype="float32", mesh=mesh)
        kernel = model.params["layers"]["ffn"]["down_proj"]["kernel"]
        assert (kernel.codes.dtype, kernel.shape) == ("uint8", (2, 4, 64, 96))
        found = tiny.logits_of(Decoder(model.config), {"params": model.params}, tokens)
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["fp8 in blocks", "compressed int4 with zeros", "NVFP4", "AWQ"])
def test_estimates_count_the_stored_bytes(tmp_path, name):
    """Of the loaded model, of an estimate, and of the arrays of a compiled plan."""
    settings, quantize = FORMATS[name]
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    write_quantized(tmp_path, settings, quantize, sizes)
    compute = ComputeConfig(dtype="bfloat16")
    loaded = size_bytes(load_model(str(tmp_path), dtype="bfloat16").params)
    base = architecture(str(tmp_path))
    layers, ends, expanded = weight_bytes(base, compute)
    assert layers + ends == pytest.approx(loaded, rel=0.02)
    projections = [prod(shape) for shape in projection_shapes(base).values()]
    assert expanded == 2 * 2 * sum(projections)
    planned = [_weight(path, shape, base, compute) for path, shape in param_shapes(base).items()]
    assert size_bytes(planned) == pytest.approx(loaded, rel=0.05)
    describe(tmp_path, settings | {"ignore": ["mlp"], "modules_to_not_convert": ["mlp"]})
    some = architecture(str(tmp_path))
    assert {path for path, _ in some.stored_bits} == {
        f"layers/attn/{name}_proj/kernel" for name in "qkvo"
    }


def test_other_leaves_are_dequantized_and_named_with_their_bytes(tmp_path, caplog):
    """A head, and a stack in which one layer stays in floats."""
    settings, quantize = FORMATS["fp8 in blocks"]
    floats = write_quantized(tmp_path, settings, quantize)
    change(tmp_path, lambda tensors: quantize_head(tensors, floats, quantize))
    settings = settings | {"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}
    describe(tmp_path, settings)
    first = "model.layers.0.mlp.up_proj.weight"
    change(tmp_path, lambda tensors: tensors.update({first: floats[first].bfloat16()}))
    change(tmp_path, lambda tensors: tensors.pop(f"{first}_scale_inv"))
    model = load_model(str(tmp_path), dtype="float32")
    np.testing.assert_array_equal(
        model.params["lm_head"]["kernel"], floats["lm_head.weight"].float().numpy().T
    )
    up = model.params["layers"]["ffn"]["up_proj"]["kernel"]
    second = floats["model.layers.1.mlp.up_proj.weight"].numpy().T
    np.testing.assert_array_equal(up[1], second)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    mb = 4 * (48 * 96 + 2 * 96 * 224) / 1e6
    assert f"dequantized to float32, {mb:.3g} MB" in record.getMessage()
    assert "layers/ffn/up_proj/kernel (its layers have different formats)" in record.getMessage()
    assert "lm_head/kernel (not the projection of a layer)" in record.getMessage()


def quantize_head(tensors: Tensors, floats: Tensors, quantize: Any) -> None:
    head, floats["lm_head.weight"] = quantize(tensors["lm_head.weight"])
    tensors |= {f"lm_head.{name}": tensor for name, tensor in head.items()}


def test_modelopt_s_settings_may_be_in_another_file(tmp_path):
    write_quantized(tmp_path, *FORMATS["NVFP4 of ModelOpt"])
    described = load_model(str(tmp_path), dtype="float32").params
    describe(tmp_path, {})
    settings = {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "*gate"], "group_size": 16}
    text = json.dumps({"producer": {"name": "modelopt"}, "quantization": settings})
    (tmp_path / "hf_quant_config.json").write_text(text)
    jax.tree.map(
        np.testing.assert_array_equal, load_model(str(tmp_path), dtype="float32").params, described
    )


@pytest.mark.parametrize("name", ["fp8 in blocks", "GPTQ"])
def test_loading_takes_the_file_s_bytes_and_a_piece_for_each_core(tmp_path, name):
    """A second copy of one leaf's codes takes 4.2 MB, or 2.1 MB in 4 bits."""
    sizes = SIZES | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    write_quantized(tmp_path, *FORMATS[name], sizes)
    load_model(str(tmp_path), dtype="bfloat16")
    tracemalloc.start()
    params = load_model(str(tmp_path), dtype="bfloat16").params
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size_bytes(params) < peak < size_bytes(params) + 5e6
    assert size_bytes(params["layers"]) < 1.03 * stored_bytes(tmp_path)


@pytest.mark.parametrize("name", ["NVFP4", "GPTQ"])
def test_codes_are_streamed_from_a_bucket(tmp_path, monkeypatch, name):
    write_quantized(tmp_path, *FORMATS[name])

    def read_range(url: str, start: int, stop: int) -> bytes:
        return (tmp_path / url.rpartition("/")[2]).read_bytes()[start:stop]

    monkeypatch.setattr(buckets, "names", lambda _: [path.name for path in tmp_path.iterdir()])
    monkeypatch.setattr(buckets, "size", lambda url: len(read_range(url, 0, 1 << 40)))
    monkeypatch.setattr(buckets, "read_range", read_range)
    resolved = ResolvedSource("hf", tmp_path, "m", streamed="gs://bucket/m")
    streamed, local = (load_model(source, dtype="float32") for source in (resolved, str(tmp_path)))
    jax.tree.map(np.testing.assert_array_equal, streamed.params, local.params)


# ---------------------------------------------------------------- refusals


def change(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    """Edits the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def describe(folder: Path, settings: dict[str, Any]) -> None:
    """Replaces the quantization_config of a folder."""
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(raw))


Q = "model.layers.1.self_attn.q_proj"


def refused(
    name: str, edit: Callable[[Tensors], Any] | None = None, **settings: Any
) -> Callable[[pytest.MonkeyPatch, Path], None]:
    """Returns a call that loads a folder of a format with a damage."""

    def load(_: pytest.MonkeyPatch, folder: Path) -> None:
        sizes = SIZES | {"num_hidden_layers": 2}
        described, quantize = FORMATS[name]
        write_quantized(folder, described, quantize, sizes)
        if edit is not None:
            change(folder, edit)
        if settings:
            describe(folder, described | settings)
        load_model(str(folder), dtype="float32")

    return load


def without(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(f"{Q}.{name}")


def instead(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{Q}.{name}": tensor})


GROUP = FORMATS["compressed int4"][0]["config_groups"]["group_0"]


def group(**fields: Any) -> dict[str, Any]:
    """The settings of compressed-tensors with other fields of the weights."""
    return {"config_groups": {"group_0": GROUP | {"weights": GROUP["weights"] | fields}}}


REFUSALS: dict[str, tuple[Call, str]] = {
    "an unknown method": (
        refused("fp8 in blocks", quant_method="quip"),
        "quantization_config: quant_method: expected one of awq, .* found 'quip'",
    ),
    "a method that is a list": (
        refused("fp8 in blocks", quant_method=["fp8"]),
        r"quantization_config: quant_method: expected one of awq, .* found \['fp8'\]",
    ),
    "a pattern that is none": (
        refused("compressed int4", ignore=["re:mlp(", "lm_head"]),
        r"re:mlp\(: expected a regular expression, found missing \)",
    ),
    "experts in fp4": (
        refused("fp8 in blocks", expert_dtype="fp4"),
        "expert_dtype: expected fp8, found 'fp4'",
    ),
    "a block of one number": (
        refused("fp8 in blocks", weight_block_size=[64]),
        r"weight_block_size: expected two numbers, found \[64\]",
    ),
    "a block of no weights": (
        refused("fp8 in blocks", weight_block_size=[64, 0]),
        "weight_block_size: expected a positive number, or -1, found 0",
    ),
    "modules that are no list": (
        refused("fp8 in blocks", modules_to_not_convert="lm_head"),
        "modules_to_not_convert: expected a list of names, found 'lm_head'",
    ),
    "missing scales": (
        refused("fp8 in blocks", without("weight_scale_inv")),
        f"{Q}.weight: expected weight_scale_inv or weight_scale of the same module",
    ),
    "scales of another block": (
        refused("fp8 in blocks", instead("weight_scale_inv", torch.ones(3, 2))),
        rf"{Q}.weight_scale_inv: expected .*\(2, 3\) for \(96, 96\) weights, found \(3, 2\)",
    ),
    "scales in integers": (
        refused("fp8 in blocks", instead("weight_scale_inv", torch.ones(2, 3, dtype=torch.int32))),
        f"{Q}.weight_scale_inv: expected F32 or .*found I32",
    ),
    "a projection in floats": (
        refused(
            "fp8 in blocks",
            lambda tensors: (
                instead("weight", torch.ones(96, 96))(tensors),
                without("weight_scale_inv")(tensors),
            ),
        ),
        f"{Q}.weight: expected fp8 in blocks of 64 x 36, as quantization_config.*tensor in F32",
    ),
    "scales of a projection in floats": (
        refused("fp8 in blocks", instead("weight", torch.ones(96, 96))),
        f"{Q}.weight_scale_inv: expected fp8 in blocks of 64 x 36, as quantization_config states",
    ),
    "a module that is to be in floats": (
        refused("fp8 in blocks", modules_to_not_convert=["model.layers.1.self_attn"]),
        f"{Q[:-6]}.*: expected a weight in floats, as quantization_config states of this module",
    ),
    "another format in one module": (
        refused("fp8 in blocks", instead("weight_packed", torch.ones(2, dtype=torch.uint8))),
        f"{Q}.weight_packed: expected fp8 in blocks of 64 x 36.*found a tensor in U8",
    ),
    "integers for fp8": (
        refused("fp8 in blocks", instead("weight", torch.ones(96, 96, dtype=torch.int8))),
        f"{Q}.weight: expected F8_E4M3 or F8_E5M2, as quantization_config states, found I8",
    ),
    "a weight with three axes": (
        refused("fp8 in blocks", instead("weight", torch.ones(1, 96, 96).to(torch.float8_e4m3fn))),
        rf"{Q}.weight: expected a matrix, found \(1, 96, 96\)",
    ),
    "groups without weights": (
        refused("compressed int4", config_groups={}),
        "config_groups: expected a group with quantized weights",
    ),
    "an unknown format": (
        refused("compressed int4", format="marlin-24"),
        "group_0: format: expected float-quantized or .* found 'marlin-24'; load the unquantized",
    ),
    "rotated weights": (
        refused("compressed int4", transform_config={"u": {}}),
        "transform_config: expected nothing",
    ),
    "sparse weights": (
        refused("compressed int4", sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config: format: expected dense",
    ),
    "three bits": (
        refused("compressed int4", **group(num_bits=3)),
        "group_0: weights: num_bits: expected 4 or 8, found 3",
    ),
    "groups of another size": (
        refused("compressed int4", **group(group_size=16)),
        r"weight_scale: expected .*groups of 16: the shape \(96, 14\)",
    ),
    "another shape": (
        refused("compressed int4", instead("weight_shape", torch.tensor([96, 112]))),
        rf"{Q}.weight_shape: expected the shape of which .*\(96, 12\) words, found \(96, 112\)",
    ),
    "a shape of truth values": (
        refused("compressed int4", instead("weight_shape", torch.ones(2, dtype=torch.bool))),
        f"{Q}.weight_shape: expected I64 or I32, as quantization_config states, found BOOL",
    ),
    "zeros of another shape": (
        refused(
            "compressed int4 with zeros",
            instead("weight_zero_point", torch.ones(3, 4, dtype=torch.int32)),
        ),
        rf"{Q}.weight_zero_point: expected the shape \(12, 3\), found \(3, 4\)",
    ),
    "no outer scale": (
        refused("NVFP4", without("weight_global_scale")),
        f"{Q}.weight_packed: expected weight_global_scale of the same module",
    ),
    "a group beyond the last": (
        refused("GPTQ, ordered, version 2", instead("g_idx", torch.full((96,), 5).int())),
        f"{Q}.g_idx: expected numbers of 3 groups, found 5 to 5",
    ),
    "GPTQ for another kernel": (
        refused("GPTQ", checkpoint_format="marlin"),
        "checkpoint_format: expected gptq or gptq_v2, found 'marlin'",
    ),
    "GPTQ with other bits in a module": (
        refused("GPTQ", dynamic={"+:.*down_proj": {"bits": 8}}),
        r"dynamic: expected modules that are not quantized, found '\+:.*down_proj'",
    ),
    "AWQ for another kernel": (
        refused("AWQ", version="gemv"),
        "version: expected gemm or GEMM, found 'gemv'",
    ),
    "Quark in other bits": (
        refused("MXFP4 of Quark", global_quant_config={"weight": {"dtype": "int4"}}),
        "global_quant_config: weight: dtype: expected fp4 or fp8_e4m3, found 'int4'",
    ),
    "ModelOpt with mixed precision": (
        refused("NVFP4 of ModelOpt", quant_algo="MIXED_PRECISION"),
        "quant_algo: expected NVFP4 or FP8, found 'MIXED_PRECISION'",
    ),
}

test_it_is_refused = table_test(REFUSALS)
