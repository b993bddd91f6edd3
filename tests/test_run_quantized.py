"""A run on a folder with quantized weights is the run on their floats, and what it writes."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nalora_jax import config as cfg
from nalora_jax.__main__ import main
from nalora_jax.errors import NaloraError
from tests import tiny
from tests.weights.quantized_folders import BLOCKS, fp8, quantize_folder

nalora_run = importlib.import_module("nalora_jax.cli.training")
# Projections have 16 or 32 inputs and outputs, so blocks at their ends are smaller.
BLOCK = (12, 10)
SETTINGS = BLOCKS | {"weight_block_size": list(BLOCK)}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, cfg.RunConfig]:
    """Runs of two steps on a base in fp8, and on a copy of it in floats."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny.make_config(folder, steps=2, mesh=cfg.MeshConfig(data=1, fsdp=4, tensor=2))
    torch.manual_seed(0)
    base = Path(config.model)
    shutil.copytree(base, folder / "floats")
    floats = quantize_folder(base, SETTINGS, lambda weight: fp8(weight, BLOCK))
    save_file(floats, folder / "floats" / "model.safetensors", {"format": "pt"})
    of_floats = replace(config, model=str(folder / "floats"), output=str(folder / "of_floats"))
    return {"fp8": config, "floats": of_floats}


@pytest.fixture(scope="module")
def finished(configs: dict[str, cfg.RunConfig]) -> Path:
    nalora_run.run(configs["fp8"])
    return Path(configs["fp8"].output)


def test_the_run_on_fp8_is_that_on_its_floats(configs, finished):
    nalora_run.run(configs["floats"])
    adapters = [
        load_file(Path(config.output) / "adapter" / "adapter_model.safetensors")
        for config in configs.values()
    ]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-3, atol=1e-5, msg=name)
    line = tiny.lines(finished)[0]
    assert line["base"]["numbers"].startswith("fp8 in blocks of 12 x 10 in F8_E4M3 (")
    card = (finished / "adapter" / "README.md").read_text()
    # The format, its share of the weights, and the arithmetic; of the copy in floats its own.
    assert "(safetensors, fp8 in blocks of 12 x 10 in F8" in card
    assert "kept in that format, computed in float32); digest of all its weights" in card
    of_floats = (Path(configs["floats"].output) / "adapter" / "README.md").read_text()
    assert "loaded as float32); digest of all its weights" in of_floats


def test_the_merged_model_is_in_bf16(configs, finished, tmp_path):
    merged = tmp_path / "merged"
    assert main(["merge", str(finished), "--output", str(merged)]) == 0
    raw = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in raw
    assert raw["dtype"] == "bfloat16"
    adapter = load_file(finished / "adapter" / "adapter_model.safetensors")
    floats = load_file(Path(configs["floats"].model) / "model.safetensors")
    settings = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    found = load_file(merged / "model.safetensors")
    assert found.keys() == floats.keys()
    changed = 0
    for name, tensor in found.items():
        weight = floats[name].float()
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            scale = settings["lora_alpha"] / settings["r"]
            update = adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            weight = weight + scale * update
            changed += 1
        np.testing.assert_allclose(
            tensor.float(), weight.to(torch.bfloat16).float(), rtol=2**-7, atol=1e-6, err_msg=name
        )
    assert changed


def test_eval_of_the_run_gives_its_numbers(finished, tmp_path):
    assert main(["eval", str(finished), "--output", str(tmp_path / "eval.json")]) == 0
    final = next(line["eval"] for line in tiny.lines(finished) if "final" in line)
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["loss"] == pytest.approx(final["loss"], rel=0.02)  # in bf16


def test_quantized_weights_are_not_trained_themselves(configs, tmp_path):
    config = replace(configs["fp8"], tune=("norm",), output=str(tmp_path / "run"))
    with pytest.raises(NaloraError, match="--tune: expected a base in floats.*fp8 in blocks"):
        nalora_run.run(config)


@pytest.mark.parametrize("init", ["pissa", "lora_ga"])
def test_adapters_that_begin_in_the_kernels_are_refused(configs, tmp_path, init):
    lora = replace(configs["fp8"].lora, init=init)
    config = replace(configs["fp8"], lora=lora, output=str(tmp_path / "run"), mechanisms=())
    with pytest.raises(NaloraError, match=f'lora.init "{init}": expected a base in floats, .*fp8'):
        nalora_run.run(config)
