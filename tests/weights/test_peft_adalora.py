"""PEFT's AdaLoRA adapters, read as plain LoRA, and its settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nalora_jax.cli.config_files import settings_of
from nalora_jax.config import AdaLoRAConfig, check
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.weights import peft_settings
from nalora_jax.weights.peft import import_adapter
from tests import tiny
from tests.param_trees import params_from_tensors

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("default")  # of torch, transformers and PEFT

TOKENS = np.random.default_rng(0).integers(0, 28, (2, 9))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, np.ndarray]:
    """An adapter that PEFT trained and whose ranks it allocated, its base, and the logits of both."""
    base, folder = tiny.torch_llama(), tmp_path_factory.mktemp("peft") / "adapter"
    settings = {"init_r": 4, "target_r": 1, "lora_alpha": 12, "tinit": 1, "tfinal": 2, "total_step": 8}
    targets = ["gate_proj", "down_proj", "q_proj"]
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(**settings, target_modules=targets, task_type="CAUSAL_LM")
    model, tokens = peft.get_peft_model(base, config), torch.tensor(TOKENS)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for step in range(1, 9):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits.numpy()
    model.save_pretrained(folder)
    return folder, tiny.torch_llama(), logits


@pytest.fixture
def folder(trained: tuple[Path, Any, np.ndarray], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "adapter"))


def described(model: Any) -> ModelConfig:
    return ModelConfig.from_hf(model.config.to_dict())


def test_logits_are_those_of_peft(trained: tuple[Path, Any, np.ndarray]) -> None:
    """With ranks that differ by layer, and modules of which nothing is left."""
    folder, model, logits = trained
    config = described(model)
    params = params_from_tensors(config, lambda name: model.get_parameter(name).detach().numpy())
    lora, spec = import_adapter(folder, config)
    left = [
        len(value)
        for name, value in load_file(folder / "adapter_model.safetensors").items()
        if "lora_E" in name
    ]
    assert min(left) == 0 < max(left)
    assert not spec.adalora
    decoder = Decoder(config, spec)

    @jax.jit
    def ours(variables: Any) -> jax.Array:
        hidden = decoder.apply(variables, jnp.asarray(TOKENS))
        return decoder.apply(variables, hidden, method="unembed")

    with torch.no_grad():
        alone = model(input_ids=torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(ours({"params": params, "lora": lora}), logits, atol=2e-5)
    assert np.abs(logits - alone).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_r": None}, "init_r: expected an integer of 1 or more"),
        ({"lora_alpha": "x"}, "lora_alpha: expected a number above 0"),
        (
            {"rank_pattern": {"model.layers.0.mlp.gate_proj.lora_E": [True]}},
            r"rank_pattern: .* list of 4 \(init_r\)",
        ),
        ({"rank_pattern": {"model.layers.0.mlp.gate_proj.lora_E": [1, 1, 0, 0]}}, "rank_pattern: "),
        ({"peft_type": "ADALORA2"}, 'peft_type: expected "LORA" or "ADALORA"'),
    ],
)
def test_a_bad_configuration_is_refused_by_field(
    folder: Path, trained: Any, changes: dict[str, Any], said: str
) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(NaloraError, match=said):
        import_adapter(folder, described(trained[1]))


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("lora_A", None, r"mlp.down_proj: expected lora_A .* found shapes of E, A, B"),
        ("lora_E", np.ones((3, 1), np.float32), r"mlp.down_proj: expected one rank, that of lora_A"),
        ("lora_B", np.ones((16,), np.float32), r"mlp.down_proj: expected lora_A"),
        ("lora_E", None, "down_proj"),
    ],
)
def test_bad_tensors_are_refused_by_module(
    folder: Path, trained: Any, part: str, value: Any, said: str
) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = f"base_model.model.model.layers.0.mlp.down_proj.{part}"
    tensors.pop(name)
    save_file(tensors if value is None else tensors | {name: value}, path)
    with pytest.raises(NaloraError, match=said):
        import_adapter(folder, described(trained[1]))


def test_settings_are_taken_over(folder: Path) -> None:
    values = json.loads((folder / "adapter_config.json").read_text())
    settings, notes = peft_settings.from_peft(values)
    config = check(settings_of(settings, folder))
    assert config.adalora == AdaLoRAConfig(1, 1 / 8, 2 / 8, interval=1)
    assert (config.steps, config.adalora.steps(8)) == (8, (1, 6))
    assert {(rule.rank, rule.alpha) for rule in config.lora.rules} == {(4, 12.0)}
    assert not any("not known" in note for note in notes)
    with pytest.raises(NaloraError, match="total_step"):
        peft_settings.from_peft(values | {"total_step": None})
