"""Adapters for vLLM: one rank and scale, and modules that its models have; the rules are those of
its code."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import depths
from nalora_jax.weights.peft_export import export_adapter, verify_export
from nalora_jax.weights.peft_import import import_adapter
from nalora_jax.weights.peft_modules import layout_for
from tests.weights.conftest import COMMON, DELTA_NET, mixed
from tests.weights.in_peft import load, merge_equally
from tests.weights.test_merge import TARGETS

EXPERTS = {"num_experts": 4, "moe_intermediate_size": 20}
GEMMA4 = (
    COMMON | EXPERTS | {"model_type": "gemma4_text", "num_hidden_layers": 2, "global_head_dim": 8}
)
GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0}
GEMMA4 |= {"sliding_window": 4, "enable_moe_block": True, "top_k_experts": 2}
KEYS_AS_VALUES = GEMMA4 | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
KEYS_AS_VALUES |= {
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "enable_moe_block": False,
}
QWEN3_5 = (
    COMMON | EXPERTS | DELTA_NET | {"model_type": "qwen3_5_moe_text", "num_experts_per_tok": 2}
)
QWEN3_5 |= {"shared_expert_intermediate_size": 12}
KINDS = ("group0/block0", "group0/block1")  # sliding layers, and full layers
PREFIX = "base_model.model."


def tensors_for(
    folder: Path, config: ModelConfig, adapter: Any, target: str = "vllm", raw: Any = None
) -> dict[str, np.ndarray]:
    """The tensors of an exported adapter, which is read back."""
    layout = None if raw is None else layout_for(target, config, raw)
    export_adapter(
        *adapter, config, folder, base_model_name="org/base", target=target, layout=layout
    )
    verify_export(folder, *adapter, config)
    return load_file(folder / "adapter_model.safetensors")


def modules_of(tensors: dict[str, np.ndarray]) -> set[str]:
    return {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}


# The common rank, and modules of experts: vLLM packs gate, up and down of every expert, all or
# none, and reads gpt-oss's as PEFT writes them, if both parameters of every layer are there.
@pytest.mark.parametrize(
    ("family", "rank", "experts"),
    [
        ("llama", 5, 0),
        ("phi3", 9, 0),
        ("mixtral", 5, 36),
        ("glm4_moe", 4, 24),
        ("gpt_oss", 7, 6),
        ("deepseek_v2", 4, 24),
    ],
)
def test_vllm_export(family, rank, experts, tiny_model, params_of, random_lora, tmp_path):
    """The rules of vllm/lora/peft_helper.py and lora_model.py."""
    model, config = tiny_model(family)
    params = params_of(model, config)
    shared = family in ("glm4_moe", "deepseek_v2")
    targets = TARGETS
    if shared:
        targets = {path: target for path, target in mixed(config).items() if "kv_b" not in path}
    lora, spec = random_lora(config, targets, rslora=True, dropout=0.1)
    tensors = tensors_for(tmp_path / "a", config, (lora, spec))

    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (settings["r"], settings["bias"], settings["use_rslora"]) == (rank, "none", False)
    for name in ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern"):
        assert not settings[name]
    modules = modules_of(tensors)
    assert all(name.startswith("model.layers.") for name in modules)
    assert sum(".experts" in name for name in modules) == experts
    if family != "gpt_oss":
        assert {name.rpartition(".")[2] for name in modules} <= set(settings["target_modules"])
    for name, tensor in tensors.items():
        stacked = config.n_experts if family == "gpt_oss" and ".experts" in name else 1
        assert tensor.shape[0 if "lora_A" in name else 1] == rank * stacked
    if not shared:  # PEFT would take the shared expert's modules for experts
        with warnings.catch_warnings():
            # PEFT warns of its own patterns for fused experts.
            warnings.filterwarnings("ignore", r".*gate_up_proj'\]", RuntimeWarning)
            wrapped = load(model, tmp_path / "a")
        merge_equally(params, lora, spec, config, wrapped, params_of)


STACKS = ["experts", "experts.base_layer"]
EACH = [f"experts.{e}.{name}" for e in range(4) for name in ("gate_proj", "up_proj", "down_proj")]


@pytest.mark.parametrize(
    ("raw", "model_type", "stem", "expected"),
    [
        # The class of the released, multimodal folders reads both stacks of experts (its
        # is_3d_moe_weight).
        (QWEN3_5, "qwen3_5_moe", "model.language_model.layers.0.mlp.", STACKS),
        (QWEN3_5, "qwen3_5_moe_text", "model.layers.0.mlp.", [*EACH, "shared_expert.down_proj"]),
        # The class of Gemma 4 refuses the stacks of its files (lora/model_manager.py).
        (GEMMA4, "gemma4_text", "model.layers.0.", [*EACH, "mlp.down_proj"]),
    ],
    ids=["Qwen3.5", "Qwen3.5 text", "Gemma 4"],
)
def test_an_adapter_of_one_matrix_of_experts_has_them_all(
    raw, model_type, stem, expected, random_lora, tmp_path
):
    """In the form that vLLM's class of the model reads."""
    config = ModelConfig.from_hf(raw)
    chosen = {
        path: depth for path, depth in depths(config).items() if "experts_ffn/down_proj" in path
    }
    targets = {path.removeprefix("layers/"): ((2,) * n, (4.0,) * n) for path, n in chosen.items()}
    adapter = random_lora(config, targets)
    modules = modules_of(
        tensors_for(tmp_path / "a", config, adapter, raw={"model_type": model_type})
    )
    assert {name.removeprefix(stem) for name in modules if ".layers.0." in name} == set(expected)


def test_vllm_gets_the_adapter_of_keys_for_values_too(random_lora, tmp_path):
    """vLLM's qkv projection has both slots, filled with the weight of k_proj (its
    models/gemma4.py)."""
    config = ModelConfig.from_hf(KEYS_AS_VALUES)  # full layers have no v_proj
    names = [f"{kind}/{name}" for kind in KINDS for name in ("attn/k_proj", "ffn/down_proj")]
    targets = dict.fromkeys([*names, f"{KINDS[0]}/attn/v_proj"], ((2, 3), (4.0, 5.0)))
    adapter = random_lora(config, targets)
    tensors = tensors_for(tmp_path / "vllm", config, adapter)
    stem = PREFIX + "model.layers.{}.self_attn.{}.{}.weight"
    for layer in range(4):
        for factor in ("lora_A", "lora_B"):
            keys, values = (
                tensors[stem.format(layer, name, factor)] for name in ("k_proj", "v_proj")
            )
            assert np.array_equal(keys, values) == (layer in (1, 3))
    of_peft = tensors_for(tmp_path / "peft", config, adapter, "peft")
    assert not any(".layers.1.self_attn.v_proj." in name for name in of_peft)
    tensors[stem.format(3, "v_proj", "lora_B")] *= 2
    save_file(tensors, tmp_path / "vllm/adapter_model.safetensors")
    with pytest.raises(NaloraError, match=r"layers\.3\.self_attn\.v_proj"):
        import_adapter(tmp_path / "vllm", config)
