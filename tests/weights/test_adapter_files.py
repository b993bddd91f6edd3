"""Exported adapters are the same bytes each time, and a cut file is refused."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file

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


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = export(tmp_path / "adapter") / TENSORS
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(NaloraError, match="truncated or damaged"):
            import_adapter(path.parent, CONFIG, fingerprint="f" * 64)
    path.write_bytes(whole)
    import_adapter(path.parent, CONFIG, fingerprint="f" * 64)
