"""Adapters merged into quantized bases in the base's own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nalora_jax.__main__ import main
from nalora_jax.common.trees import flatten
from nalora_jax.errors import NaloraError
from nalora_jax.ops.scaled import Scaled
from nalora_jax.weights.base import load_model
from nalora_jax.weights.hub import resolve_source
from nalora_jax.weights.merge import merged_tensors
from nalora_jax.weights.merge_stored import check_stored_format, write_stored
from nalora_jax.weights.model_files import quantized_tensors
from nalora_jax.weights.peft_export import export_adapter
from tests.weights.quantized_folders import FORMATS, write_quantized

# Formats that are written again.
STORED = [
    name
    for name in FORMATS
    if (name.startswith(("fp8", "compressed fp8")) and name != "fp8 with powers of two")
    or name == "compressed int8"
]
OTHERS = [
    "fp8 with powers of two",
    "compressed int8 with zeros",
    "compressed int4",
    "GPTQ",
    "NVFP4",
]
# The second layer of the projection of values has no adapter.
TARGETS = {"ffn/gate_proj": ((3, 2), (3.0, 2.0)), "attn/v_proj": ((2, 0), (2.0, 1.0))}


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def written(tmp_path: Path, name: str, random_lora: Any, size: float) -> dict[str, Any]:
    """Merges an adapter of some size into a folder; returns both folders, and what was merged."""
    base, out = tmp_path / "base", tmp_path / "merged"
    write_quantized(base, *FORMATS[name])
    model = load_model(str(base), dtype="float32")
    lora, spec = random_lora(model.config, TARGETS)
    lora = jax.tree.map(lambda leaf: leaf * size**0.5, lora)
    source = quantized_tensors(resolve_source(str(base)))
    assert source is not None
    check_stored_format(source)
    error = write_stored(
        out,
        source,
        model.config,
        model.params,
        lora,
        spec,
        hf_config=model.hf_config,
        tokenizer=lambda _: None,
        card="",
    )
    exact = dict(merged_tensors(model.config, model.params, lora, spec, dtype=np.dtype("float32")))
    return {"base": base, "out": out, "error": error, "exact": exact, "lora": lora, "spec": spec}


@pytest.mark.parametrize("name", STORED)
def test_a_merged_folder_has_the_base_s_format_and_the_nearest_codes(tmp_path, name, random_lora):
    """Against torch's rounding of the exact sum, with the scales in the file."""
    case = written(tmp_path, name, random_lora, 0.3)
    before = load_file(case["base"] / "model.safetensors")
    after = load_file(case["out"] / "model.safetensors")
    assert {key: (x.shape, x.dtype) for key, x in before.items()} == {
        key: (x.shape, x.dtype) for key, x in after.items()
    }
    described = [json.loads((case[key] / "config.json").read_text()) for key in ("base", "out")]
    assert described[0]["quantization_config"] == described[1]["quantization_config"]
    again = quantized_tensors(resolve_source(str(case["out"])))
    assert again is not None
    squares = np.zeros(2)
    for key, exact in case["exact"].items():
        codes = before[key]
        adapted = "gate_proj" in key or "layers.0.self_attn.v_proj" in key
        if not adapted:
            parts = [part for part in before if part.startswith(key.removesuffix("weight"))]
            for part in parts:
                assert torch.equal(bits_of(before[part]), bits_of(after[part]))
            continue
        scaling = again.scaling(key)
        assert scaling is not None
        width, height = scaling.block
        scales = after[again.parts(key)["scales"]].float()
        blocks = scaling.blocks(exact.shape[::-1])[::-1]
        wide = scales.reshape(blocks).repeat_interleave(height or exact.shape[0], 0)
        wide = wide.repeat_interleave(width or exact.shape[1], 1)
        wide = wide[: exact.shape[0], : exact.shape[1]]
        ratio = torch.tensor(exact) / wide
        if codes.dtype == torch.int8:
            expected = ratio.round().clamp(-128, 127).to(torch.int8)
        else:
            expected = ratio.clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(after[key].float(), expected.float())
        stored = (expected.float() * wide).numpy().astype(np.float64)
        squares += (np.sum((stored - exact) ** 2), np.sum(exact.astype(np.float64) ** 2))
        # Nothing is cut off by more than half a step of the largest code.
        limit = 127.5 if codes.dtype == torch.int8 else 464
        assert ratio.abs().max() <= limit
    error = case["error"]
    np.testing.assert_allclose((error.rounding, error.weights), squares, rtol=1e-5)
    assert 0 < squares[0] < 1.5e-3 * squares[1]


@pytest.mark.parametrize("name", STORED)
def test_an_adapter_of_zeros_leaves_every_byte(tmp_path, name, random_lora):
    case = written(tmp_path, name, random_lora, 0.0)
    before, after = (load_file(case[folder] / "model.safetensors") for folder in ("base", "out"))
    for key, tensor in before.items():
        assert torch.equal(bits_of(tensor), bits_of(after[key]))


def test_a_small_update_is_compared_with_the_rounding(tmp_path, random_lora):
    """The statement says that an update below the steps of the format is lost in part."""
    case = written(tmp_path, "fp8 in blocks", random_lora, 1e-3)
    error = case["error"]
    assert error.rounding > error.update
    said = error.describe("fp8")
    assert f"{(error.rounding / error.update) ** 0.5:.3g} times the norm of the adapter" in said
    assert said in (case["out"] / "README.md").read_text().replace(
        "fp8 in blocks of 64 x 36", "fp8"
    )


def test_the_command_merges_and_states_the_error(tmp_path, random_lora, capsys):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    write_quantized(base, *FORMATS["fp8 in blocks"])
    model = load_model(str(base), dtype="float32")
    lora, spec = random_lora(model.config, TARGETS)
    export_adapter(lora, spec, model.config, adapter, base_model_name=str(base))
    command = ["merge", str(base), "--adapter", str(adapter), "--output", str(out)]
    assert main([*command, "--dtype", "stored"]) == 0
    printed = capsys.readouterr().out
    assert "rounding to fp8 in blocks of 64 x 36 changes the merged weights by" in printed
    merged = load_model(str(out), dtype="float32")
    leaves = flatten(merged.params, lambda leaf: isinstance(leaf, Scaled))
    assert isinstance(leaves["layers/ffn/gate_proj/kernel"], Scaled)


@pytest.mark.parametrize("name", OTHERS)
def test_formats_that_are_not_written_are_refused(tmp_path, name):
    write_quantized(tmp_path, *FORMATS[name])
    source = quantized_tensors(resolve_source(str(tmp_path)))
    assert source is not None
    with pytest.raises(NaloraError, match="to be written again.*--dtype bfloat16"):
        check_stored_format(source)


def test_a_tensor_that_cannot_be_copied_is_refused(tmp_path):
    write_quantized(tmp_path, *FORMATS["fp8 in blocks"])
    tensors = load_file(tmp_path / "model.safetensors")
    scale = {"model.layers.0.mlp.gate_proj.input_scale": torch.tensor([True])}
    save_file(tensors | scale, tmp_path / "model.safetensors")
    source = quantized_tensors(resolve_source(str(tmp_path)))
    assert source is not None
    with pytest.raises(NaloraError, match="input_scale.*BOOL.*--dtype bfloat16"):
        check_stored_format(source)


def test_a_base_in_floats_has_no_stored_format(tmp_path, random_lora, capsys):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    write_quantized(base, *FORMATS["fp8 in blocks"])
    model = load_model(str(base), dtype="float32")
    lora, spec = random_lora(model.config, TARGETS)
    export_adapter(lora, spec, model.config, adapter, base_model_name=str(base))
    raw = json.loads((base / "config.json").read_text())
    del raw["quantization_config"]
    (base / "config.json").write_text(json.dumps(raw))
    command = ["merge", str(base), "--adapter", str(adapter), "--output", str(out)]
    assert main([*command, "--dtype", "stored"]) == 2
    assert "published in fp8 or int8" in capsys.readouterr().err
