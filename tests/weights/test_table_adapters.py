"""PEFT adapters on the embedding, the head and the weights of Linear modules: against PEFT's logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nalora_jax.errors import NaloraError
from nalora_jax.weights.peft import import_adapter
from tests.weights.test_saved_modules import our_logits, save, torch_logits

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


def wrap(model: Any, **config: Any) -> Any:
    """The model in PEFT, its adapters random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **config)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return wrapped


CASES: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "up_proj", "lm_head"], "use_rslora": True},
    "an expression": {"target_modules": r".*(q_proj|lm_head)"},
    "other ranks": {
        "target_modules": ["q_proj", "lm_head"],
        "rank_pattern": {"lm_head": 3},
        "alpha_pattern": {"lm_head": 5},
    },
    "weights": {
        "target_modules": ["v_proj"],
        "target_parameters": ["q_proj.weight", "mlp.gate_proj.weight"],
    },
    "weights alone": {"target_modules": [], "target_parameters": ["up_proj.weight"]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_adapters_on_tables_and_weights_mean_what_they_mean_in_peft(
    tiny_model, params_of, tmp_path: Path, case: str, tied: bool
) -> None:
    model, config = tiny_model("llama", tie_word_embeddings=tied)
    params = params_of(model, config)
    plain = torch_logits(model)
    wrapped = wrap(model, **CASES[case])
    expected = torch_logits(wrapped)
    assert np.abs(expected - plain).max() > 0.1
    lora, spec = import_adapter(save(wrapped, tmp_path / "theirs"), config)
    np.testing.assert_allclose(our_logits(config, params, lora, spec), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_a_table_without_the_table_says_what_is_missing(tiny_model, tmp_path: Path) -> None:
    model, config = tiny_model("llama")
    folder = save(wrap(model, target_modules=["q_proj", "lm_head"]), tmp_path / "theirs")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "base_layer" not in name}, path)
    with pytest.raises(
        NaloraError, match=r"lm_head.base_layer.weight: expected the base's table.*save_embedding_layers"
    ):
        import_adapter(folder, config)
    save_file(
        {name: tensor[:2] if "lm_head.lora_A" in name else tensor for name, tensor in tensors.items()}, path
    )
    with pytest.raises(NaloraError, match=r"lm_head: expected factors of shapes"):
        import_adapter(folder, config)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    with pytest.raises(NaloraError, match="target_modules: expected to cover lm_head, which has tensors"):
        import_adapter(folder, config)
