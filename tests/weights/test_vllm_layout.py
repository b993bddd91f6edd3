"""Names of modules in adapters for vLLM, whose multimodal models ignore modules that they do not have."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import depths
from nalora_jax.weights.peft import export_adapter, import_adapter, verify_export
from nalora_jax.weights.peft_modules import layout_for
from tests.weights.conftest import COMMON, DELTA_NET

KEYS_AS_VALUES = {
    "num_hidden_layers": 4,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "enable_moe_block": False,
}
KINDS = ("group0/block0", "group0/block1")  # sliding layers, and full layers without v_proj
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 20}
GEMMA4 = (
    COMMON
    | EXPERTS
    | {
        "model_type": "gemma4_text",
        "num_hidden_layers": 2,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "sliding_window": 4,
        "enable_moe_block": True,
        "top_k_experts": 2,
    }
)
QWEN3_5 = COMMON | EXPERTS | DELTA_NET | {"model_type": "qwen3_5_moe_text", "num_experts_per_tok": 2}
QWEN3_5 |= {"shared_expert_intermediate_size": 12}
TARGETS = dict.fromkeys(("attn/q_proj", "ffn/down_proj"), ((2, 2, 2), (4.0, 4.0, 4.0)))


def names_of(folder, config, random_lora, raw, target="vllm"):
    """The modules of an exported adapter, which is read back."""
    lora, spec = random_lora(config, TARGETS)
    layout = layout_for(target, config, raw)
    export_adapter(lora, spec, config, folder, base_model_name="base", target=target, layout=layout)
    verify_export(folder, lora, spec, config)
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}


@pytest.mark.parametrize("model_type", ["gemma3", "gemma3_text"])
def test_a_text_part_has_its_names_in_the_multimodal_model(model_type, tiny_model, random_lora, tmp_path):
    """Prefixes as in Gemma3ForConditionalGeneration and Gemma3ForCausalLM of transformers 5."""
    raw = {"model_type": model_type}
    prefix = {"gemma3": "model.language_model.layers", "gemma3_text": "model.layers"}[model_type]
    _, config = tiny_model("gemma3_text")
    names = names_of(tmp_path / "vllm", config, random_lora, raw)
    ends = ("self_attn.q_proj", "mlp.down_proj")
    assert names == {f"{prefix}.{layer}.{end}" for layer in range(3) for end in ends}
    of_peft = names_of(tmp_path / "peft", config, random_lora, raw, "peft")
    assert all(name.startswith("model.layers.") for name in of_peft)


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "qwen3_5_moe_text"])
@pytest.mark.parametrize("adapted", ["experts_ffn/down_proj", "shared_ffn", "ffn", "attn"])
def test_adapters_of_qwen3_5_moe_are_read_back(model_type, adapted, random_lora, tmp_path):
    """vLLM's class of the released, multimodal folders reads both stacks of experts (its is_3d_moe_weight)."""
    config = ModelConfig.from_hf(QWEN3_5)
    chosen = {path: depth for path, depth in depths(config).items() if adapted in path}
    targets = {
        path.removeprefix("layers/"): ((2,) * depth, (4.0,) * depth) for path, depth in chosen.items()
    }
    lora, spec = random_lora(config, targets)
    layout = layout_for("vllm", config, {"model_type": model_type})
    export_adapter(lora, spec, config, tmp_path / "a", base_model_name="b", target="vllm", layout=layout)
    assert verify_export(tmp_path / "a", lora, spec, config) == 0.0
    if adapted.startswith("experts"):
        layers = ("mlp.experts", "mlp.experts.base_layer")
        if model_type == "qwen3_5_moe_text":
            layers = tuple(f"mlp.experts.{e}.{n}_proj" for e in range(4) for n in ("gate", "up", "down"))
        prefix = {"qwen3_5_moe": "model.language_model"}.get(model_type, "model")
        keys = load_file(tmp_path / "a/adapter_model.safetensors")
        names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in keys}
        assert {f"{prefix}.layers.{i}.{name}" for i in range(3) for name in layers} <= names


def test_gemma_4_gets_one_module_for_each_expert(random_lora, tmp_path):
    """vLLM's class of Gemma 4 refuses the stacks of its files (lora/model_manager.py)."""
    config = ModelConfig.from_hf(GEMMA4)
    kinds = ("group0/block0", "group0/block1")
    names = ("attn/q_proj", "ffn/experts_ffn/up_proj", "ffn/dense_ffn/up_proj")
    targets = dict.fromkeys((f"{kind}/{name}" for kind in kinds for name in names), ((2,), (4.0,)))
    lora, spec = random_lora(config, targets)
    export_adapter(lora, spec, config, tmp_path / "a", base_model_name="base", target="vllm")
    verify_export(tmp_path / "a", lora, spec, config)
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    modules = {name.partition(".layers.0.")[2] for name in tensors if ".layers.0." in name}
    parts = [f"experts.{e}.{name}" for e in range(4) for name in ("gate_proj", "up_proj", "down_proj")]
    parts += ["self_attn.q_proj", "mlp.up_proj"]
    assert modules == {f"{part}.lora_{factor}.weight" for part in parts for factor in "AB"}


# ---------------------------------------------------------------- layers whose values are the keys' projection


def shared():
    return ModelConfig.from_hf(GEMMA4 | KEYS_AS_VALUES)


def exported(random_lora, folder, target):
    """The tensors of an adapter on keys and down projections of all layers, and on values where they exist."""
    names = [f"{kind}/{name}" for kind in KINDS for name in ("attn/k_proj", "ffn/down_proj")]
    targets = dict.fromkeys([*names, f"{KINDS[0]}/attn/v_proj"], ((2, 3), (4.0, 5.0)))
    lora, spec = random_lora(shared(), targets)
    export_adapter(lora, spec, shared(), folder, base_model_name="org/base", target=target)
    verify_export(folder, lora, spec, shared())
    return load_file(folder / "adapter_model.safetensors")


def test_vllm_gets_the_adapter_of_keys_for_values_too(random_lora, tmp_path):
    """vLLM's qkv projection has both slots, filled with the weight of k_proj (its models/gemma4.py)."""
    tensors = exported(random_lora, tmp_path / "vllm", "vllm")
    for layer in range(4):
        for factor in ("lora_A", "lora_B"):
            keys, values = (
                tensors[f"base_model.model.model.layers.{layer}.self_attn.{name}.{factor}.weight"]
                for name in ("k_proj", "v_proj")
            )
            assert np.array_equal(keys, values) == (layer in (1, 3))
    of_peft = exported(random_lora, tmp_path / "peft", "peft")
    assert not any(".layers.1.self_attn.v_proj." in name for name in of_peft)


def test_other_values_than_the_keys_are_refused(random_lora, tmp_path):
    exported(random_lora, tmp_path / "a", "vllm")
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.3.self_attn.v_proj.lora_B.weight"] *= 2
    save_file(tensors, file)
    with pytest.raises(NaloraError, match=r"layers\.3\.self_attn\.v_proj"):
        import_adapter(tmp_path / "a", shared())
