"""Exported adapters are the same bytes each time, and a changed bit in one is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.weights.peft import export_adapter, import_adapter
from tests import tiny

CONFIG = ModelConfig.from_hf(tiny.HF)
TENSORS = "adapter_model.safetensors"


def export(folder: Path) -> Path:
    rules = (LoRARule("gate_proj", 4, alpha=12.0), LoRARule("ffn", 2))
    spec = resolve(LoRAConfig(rules=rules), projection_shapes(CONFIG), CONFIG.n_layers)
    lora = init_lora(CONFIG, spec, jax.random.key(0), None)
    return export_adapter(lora, spec, CONFIG, folder, base_model_name="base", fingerprint="f" * 64)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_equal_adapters_are_equal_bytes(tmp_path: Path) -> None:
    written = [
        export(tmp_path / str(i)) for i in range(6)
    ]  # safetensors' own writer differs from call to call
    for name in (TENSORS, "adapter_config.json"):
        assert len({(folder / name).read_bytes() for folder in written}) == 1
    assert set(load_file(written[0] / TENSORS)) == {
        f"base_model.model.model.layers.{layer}.mlp.{name}_proj.lora_{part}.weight"
        for layer in range(2)
        for name in ("gate", "up", "down")
        for part in "AB"
    }


def test_any_flipped_bit_of_the_tensors_file_is_found(tmp_path: Path) -> None:
    path = export(tmp_path / "adapter") / TENSORS
    whole = path.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(whole), 150).tolist():
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(NaloraError):
            import_adapter(path.parent, CONFIG, fingerprint="f" * 64)
    path.write_bytes(whole)
    import_adapter(path.parent, CONFIG, fingerprint="f" * 64)


def test_an_edited_scale_is_found_and_another_name_of_the_base_is_not_an_error(tmp_path: Path) -> None:
    folder = export(tmp_path / "adapter")
    edit(folder, base_model_name_or_path="/models/base", inference_mode=False)
    import_adapter(folder, CONFIG)
    edit(folder, lora_alpha=13)
    with pytest.raises(
        NaloraError, match=r"expected the adapter that was written \(sha256 .*damaged or edited"
    ):
        import_adapter(folder, CONFIG)


def test_adapters_without_a_digest_are_read(tmp_path: Path) -> None:
    folder = export(tmp_path / "adapter")
    save_file(load_file(folder / TENSORS), folder / TENSORS)
    import_adapter(folder, CONFIG)
