"""Models in PEFT and in transformers: wrapped with random adapters, saved and loaded; their logits
equal ours."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import save_file

from nalora_jax.common.trees import flatten
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.weights.merge import merged_tensors
from nalora_jax.weights.peft_import import import_adapter
from tests import tiny
from tests.param_trees import params_from_tensors

TOKENS = np.array([[1, 5, 9, 30, 7, 11, 2, 40], [3, 3, 8, 21, 44, 6, 17, 9]])


def wrap(model: Any, **config: Any) -> Any:
    """The model in PEFT, everything that is trained random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", **config)
        ).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
                spread = 1.0 if "delta" in name else 0.3
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(spread * noise + ("magnitude" in name))
    return wrapped


def save(wrapped: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights
        wrapped.save_pretrained(folder)
    return folder


def load(model: Any, folder: Path, *, tied: bool = False) -> Any:
    """The folder as PEFT loads it; a key that PEFT misses or ignores warns, and warnings are
    errors."""
    with warnings.catch_warnings():
        # PEFT on transformers, and on tied weights.
        warnings.filterwarnings(
            "ignore", "" if tied else "`is_gradient_checkpointing` is deprecated"
        )
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def load_merged(folder: Path, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")
        return kind.from_pretrained(folder, attn_implementation="eager").eval()


def logits(model: Any, tokens: np.ndarray = TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def our_logits(
    config: ModelConfig,
    params: Any,
    lora: Any = None,
    spec: AdapterSpec = AdapterSpec(),  # noqa: B008
    tokens: np.ndarray = TOKENS,
) -> np.ndarray:
    variables = {"params": params} | ({} if lora is None else {"lora": lora})
    return np.asarray(tiny.logits_of(Decoder(config, spec), variables, tokens))


def merged_params(config: ModelConfig, params: Any, lora: Any, spec: AdapterSpec) -> dict[str, Any]:
    """Returns our parameter tree of the merged model's file."""
    return params_from_tensors(config, dict(merged_tensors(config, params, lora, spec)).__getitem__)


def merge_equally(
    params: Any,
    lora: Any,
    spec: AdapterSpec,
    config: ModelConfig,
    wrapped: Any,
    params_of: Callable[..., Any],
) -> None:
    """Asserts that PEFT's merged model has our merged weights."""
    theirs = flatten(params_of(wrapped.merge_and_unload(), config))
    for path, leaf in flatten(merged_params(config, params, lora, spec)).items():
        np.testing.assert_allclose(leaf, theirs[path], rtol=1e-5, atol=1e-5, err_msg=path)


def write_adapter(
    folder: Path, settings: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def gradients(wrapped: Any, config: ModelConfig, folder: Path) -> dict[str, np.ndarray]:
    """The gradients that PEFT left at an adapter saved in ``folder/adapter``, by our paths."""
    tensors = {}
    for name, leaf in wrapped.named_parameters():
        if "lora_" in name:
            tensors[name.replace(".default", "")] = leaf.grad.numpy()
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    written = write_adapter(folder / "gradients", settings, tensors)
    return flatten(import_adapter(written, config)[0])
