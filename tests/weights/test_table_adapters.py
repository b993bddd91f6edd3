"""PEFT adapters on weights of Linear modules against PEFT's logits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
    "weights": {
        "target_modules": ["v_proj"],
        "target_parameters": ["q_proj.weight", "mlp.gate_proj.weight"],
    },
    "weights alone": {"target_modules": [], "target_parameters": ["up_proj.weight"]},
}


@pytest.mark.parametrize("case", CASES)
def test_adapters_on_weights_mean_what_they_mean_in_peft(
    tiny_model, params_of, tmp_path: Path, case: str
) -> None:
    model, config = tiny_model("llama")
    params = params_of(model, config)
    plain = torch_logits(model)
    wrapped = wrap(model, **CASES[case])
    expected = torch_logits(wrapped)
    assert np.abs(expected - plain).max() > 0.1
    lora, spec = import_adapter(save(wrapped, tmp_path / "theirs"), config)
    np.testing.assert_allclose(our_logits(config, params, lora, spec), expected, rtol=1e-4, atol=1e-4)
