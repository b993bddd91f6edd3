"""config.json in the forms that are out there, and everything in it that is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nalora_jax.errors import NaloraError
from nalora_jax.models.config import GLOBAL_WINDOW, ModelConfig
from nalora_jax.models.stacks import param_shapes
from tests.models.compared import COMPARED, SECTIONS, TEXT_HALVES
from tests.models.family_fields import LATENT, TINY

LLAMA = TINY | {"model_type": "llama", "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 4}
LLAMA |= {"max_position_embeddings": 64}

# As the hub has them: transformers 4's fields, and nested configs that only say what differs from
# the class.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {
    "rope_type": "yarn",
    "attention_factor": 1.2,
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 8.0,
}
YARN |= {"original_max_position_embeddings": 16}
ALPHA = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1}
SU = {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
DEEPSEEK = {"rope_theta": 10000, "num_experts_per_tok": 3, "rope_scaling": {
    "type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 16,
}}  # fmt: skip
WINDOW, FULL, SLIDING = {"sliding_window": 8}, "full_attention", "sliding_attention"
LFM2 = {"norm_eps": 1e-5, "rope_theta": 1e6}
OLD_FORMS = {
    "Llama 3.1": ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "Mistral, no window stated": ("mistral", {}),
    "Mistral": ("mistral", WINDOW | {"rope_theta": 1e6, "head_dim": None}),
    "Qwen2.5": ("qwen2", WINDOW | {"use_sliding_window": False, "rope_theta": 1e6}),
    "Qwen2.5, sliding": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "Gemma": ("gemma", {"hidden_act": "gelu", "hidden_activation": None, "head_dim": 16}),
    "Gemma 2": ("gemma2", WINDOW | {"cache_implementation": "hybrid"}),
    "Gemma 3": ("gemma3_text", WINDOW | {
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 3,
    }),
    "Phi-4 mini": ("phi3", {
        "partial_rotary_factor": 0.75, "original_max_position_embeddings": 16, "rope_scaling": SU,
    }),
    "OLMo 3": ("olmo3", WINDOW | {"rope_theta": 500000, "rope_scaling": YARN}),
    "Granite SWA": ("granite_swa", WINDOW | {"layer_rope_theta": [1e4, 0, 1e6, 1e4]}),
    "LFM2": ("lfm2", LFM2 | {"block_ff_dim": 96, "block_multiple_of": 8, "full_attn_idxs": [1, 3]}),
    "LFM2-MoE": ("lfm2_moe", LFM2 | {"layer_types": ["conv", FULL] * 2, "num_experts": 8}),
    "EXAONE 4": ("exaone4", WINDOW | {
        "rope_theta": 1e6, "rope_scaling": LLAMA3, "sliding_window_pattern": "LLLG",
        "layer_types": [*[SLIDING] * 3, FULL],
    }),
    "Hunyuan": ("hunyuan_v1_dense", {"head_dim": 16, "rope_scaling": ALPHA}),
    "OLMoE": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 2, "clip_qkv": None}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "rope_theta": 5e6}),
    "Gemma 4": ("gemma4_text", {
        "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "num_kv_shared_layers": 1, "layer_types": [SLIDING, FULL] * 2, "use_bidirectional_attention": "vision",
    }),
    "DeepSeek-V2": ("deepseek_v2", LATENT | DEEPSEEK | {
        "topk_method": "group_limited_greedy", "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
        "scoring_func": "softmax", "moe_layer_freq": 1, "n_shared_experts": 2, "first_k_dense_replace": 1,
    }),
    "DeepSeek-V3": ("deepseek_v3", LATENT | DEEPSEEK | {
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "num_nextn_predict_layers": 1,
        "n_group": 2, "topk_group": 1, "n_routed_experts": 8,
    }),
    "Moonlight": ("deepseek_v3", LATENT | {
        "q_lora_rank": None, "rope_theta": 50000.0, "n_group": 1, "topk_group": 1, "n_routed_experts": 8,
        "first_k_dense_replace": 1, "num_experts_per_tok": 3, "n_shared_experts": 2,
    }),
    "GLM-4.7-Flash": ("glm4_moe_lite", LATENT | {
        "rope_theta": 1e6, "partial_rotary_factor": 1.0, "first_k_dense_replace": 1, "n_routed_experts": 8,
        "topk_method": "noaux_tc", "num_nextn_predict_layers": 1,
    }),
    "GLM-4.5": ("glm4_moe", {"n_routed_experts": 8, "rope_theta": 1e6, "head_dim": 16}),
}  # fmt: skip


@pytest.mark.parametrize(("family", "fields"), OLD_FORMS.values(), ids=OLD_FORMS)
def test_old_form_reads_as_transformers_rewrites_it(family, fields):
    old = LLAMA | {"model_type": family} | fields
    new = transformers.AutoConfig.for_model(**old).to_dict()
    assert "rope_parameters" in new
    assert "rope_theta" not in new
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)


# Text models of multimodal models, which list only differences from the text model's defaults.
WITHIN = {
    "gemma3": {**LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 8, "head_dim": 16},
    "gemma4": {**LLAMA, "model_type": "gemma4_text"},
    "mistral3": {**LLAMA, "model_type": "ministral3"},
    "qwen3_5": {**LLAMA, "model_type": "qwen3_5_text"},
    "kimi_k25": {**LLAMA, **LATENT, "model_type": "kimi_k2", "n_routed_experts": 32},
}  # fmt: skip


@pytest.mark.parametrize("family", WITHIN)
def test_a_multimodal_model_is_its_text_model(family):
    raw = {"model_type": family, "text_config": WITHIN[family], "vision_config": {}}
    config, text = ModelConfig.from_hf(raw), ModelConfig.from_hf(WITHIN[family])
    assert config == dataclasses.replace(text, tie_embeddings=config.tie_embeddings)
    assert config.tie_embeddings == (family not in ("mistral3", "qwen3_5", "kimi_k25"))
    raw["text_config"] = raw["text_config"] | {"is_causal": False}
    with pytest.raises(NaloraError, match="text_config: is_causal: expected true"):
        ModelConfig.from_hf(raw)


V2 = LATENT | {"model_type": "deepseek_v2", "num_experts_per_tok": 2, "n_routed_experts": 8}
V3 = LATENT | {"model_type": "deepseek_v3", "n_routed_experts": 32}
FLASH = LATENT | {"model_type": "glm4_moe_lite", "n_routed_experts": 8}
GLM = {"model_type": "glm4_moe", "n_routed_experts": 8, "num_experts_per_tok": 2}
REFUSED = {
    "no vocab_size": ({"vocab_size": None}, "vocab_size: expected a whole number .* found nothing"),
    "uneven heads": ({"num_attention_heads": 3}, "hidden_size: expected a multiple"),
    "uneven groups": ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor"),
    "NaN epsilon": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "truthy text": ({"attention_bias": "yes"}, "attention_bias: expected true or false"),
    "auxiliary loss": ({"model_type": "mixtral", "output_router_logits": True}, "output_router_logits"),
    "residual dropout": ({"model_type": "phi3", "resid_pdrop": 0.1}, "resid_pdrop"),
    "unknown activation": ({"hidden_act": "swoosh"}, "hidden_act: expected one of .*silu"),
    "unknown scaling": ({"rope_scaling": {"type": "xpos", "factor": 2.0}}, "rope_type: expected one of .*yarn"),
    "multimodal rotation": ({"rope_scaling": {"type": "default", "mrope_section": [1, 1]}}, "mrope_section"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "short list": (
        {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}},
        "short_factor: expected a list of 4",
    ),
    "a dense layer too many": ({"model_type": "qwen3_moe", "num_experts": 4, "mlp_only_layers": [4]}, "mlp_only"),
    "uneven groups of experts": ({**GLM, "n_group": 3}, "n_group: expected equal groups .* of the 8 experts, found 3"),
    "more groups kept than there are": ({**GLM, "n_group": 2, "topk_group": 3}, "topk_group: expected at most 2"),
    "two layers of predictions": ({**GLM, "num_nextn_predict_layers": 2}, "num_nextn_predict_layers: expected 0 or 1"),
    "fewer key heads": ({**V2, "num_key_value_heads": 2}, "num_key_value_heads: expected num_attention_heads"),
    "values wider than keys": ({**V2, "v_head_dim": 13}, "v_head_dim: expected at most 12"),
    "selected tokens": ({**V3, "index_topk": 2048}, "index_topk: .*attention to selected tokens"),
    "another share of rotated dimensions": (
        {**V2, "model_type": "mistral4", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor: expected 0.333333, the share of qk_rope_head_dim, found 0.5",
    ),
    "another choice of experts": ({**V2, "topk_method": "noaux_tc"}, "topk_method: expected one of greedy"),
    "normalized weights of DeepSeek-V2": ({**V2, "norm_topk_prob": True}, "norm_topk_prob: expected nothing"),
    "biases of DeepSeek-V2's experts": ({**V2, "mlp_bias": True}, "mlp_bias: expected nothing"),
    "sigmoids in DeepSeek-V2": ({**V2, "scoring_func": "sigmoid"}, "scoring_func: expected 'softmax' in this family"),
    "softmax in DeepSeek-V3": ({**V3, "scoring_func": "softmax"}, "scoring_func: expected 'sigmoid'"),
    "experts in every second layer": ({**V3, "moe_layer_freq": 2}, "moe_layer_freq: expected 1"),
    "an unknown kind of layer": ({**FLASH, "mlp_layer_types": ["dense", "moe", "moe", "moe"]}, "mlp_layer_types"),
    "ignored dense layers": ({**FLASH, "first_k_dense_replace": 2}, "first_k_dense_replace: expected 1"),
    "DeepSeek-V3.2": ({**V3, "model_type": "deepseek_v32"}, "model_type: .*attention to selected tokens"),
    "GLM-5": ({**V3, "model_type": "glm_moe_dsa"}, "model_type: .*attention to selected tokens"),
    "more chosen than there are": ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok"),
    "chunked attention": ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 4}, "layer_types"),
    "sliding without a window": ({"model_type": "gemma2", "sliding_window": 0}, "sliding_window"),
    "mixed windows in Mistral": (
        {"model_type": "mistral", "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "layer_types",
    ),
    "a mask that is a text": ({"is_causal": "no"}, "is_causal: expected true, .*found 'no'; use a causal"),
    "a mask in both directions": ({"is_causal": False}, "is_causal: expected true, .*found False; use a causal"),
    "one rotation for both kinds of OLMo 3's layers": (
        {"model_type": "olmo3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "rope_parameters: expected parameters for 'full_attention' and 'sliding_attention', found rope_theta, rope_typ",
    ),
    "a base that transformers reads for full layers only": ({"model_type": "olmo3", "rope_theta": 1e4}, "rope_theta"),
    "growing queries without an original context": (
        {"model_type": "ministral3", "rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
        "llama_4_scaling_beta: expected 0 without",
    ),
    "another gate in gpt-oss": ({"model_type": "gpt_oss", "hidden_act": "gelu"}, "hidden_act: expected 'silu'"),
    "an unknown quantization": (
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        "quantization_config: quant_method: expected one of awq, .*found 'bitsandbytes'; load the unquantized model",
    ),
    "another quantization of gpt-oss": (
        {"model_type": "gpt_oss", "quantization_config": {"quant_method": "awq"}},
        "quant_method: expected 'mxfp4'.* found 'awq'",
    ),
    "a layer beyond the last": ({"model_type": "lfm2", "full_attn_idxs": [1, 4]}, "full_attn_idxs"),
    "Gemma 4 that ends in a window": (
        {"model_type": "gemma4_text", "layer_types": ["full_attention", "sliding_attention"] * 2},
        "layer_types: expected 'full_attention' in the last layer",
    ),
    "one rotation for all layers of Gemma 4": (
        {"model_type": "gemma4_text", "rope_parameters": {"rope_type": "default"}},
        "rope_parameters: expected one JSON object for sliding_attention",
    ),
    "the wavelength outside of rope_parameters": ({"model_type": "gemma4_text", "rope_theta": 1e6}, "rope_theta"),
    "no layer of a type before the layers without keys": (
        {"model_type": "gemma4_text", "num_kv_shared_layers": 3},
        "num_kv_shared_layers: expected a layer of every type",
    ),
    "an unknown field of a layer": (
        {"model_type": "gemma4_text", "per_layer_config": {"3": {"sliding_window": 4}}},
        "per_layer_config: sliding_window",
    ),
    "fewer embeddings of layers than tokens": (
        {"model_type": "gemma4_text", "vocab_size_per_layer_input": 100},
        "vocab_size_per_layer_input: expected vocab_size",
    ),
    "clipped queries": ({"model_type": "olmoe", "num_experts": 4, "clip_qkv": 8.0}, "clip_qkv"),
    "a family that is not in the table": ({"model_type": "qwen4"}, "the nearest names are qwen3, qwen2, "),
    "uneven heads of a delta rule": (
        {"model_type": "qwen3_5_text", "linear_num_value_heads": 17},
        r"linear_num_value_heads: expected a multiple of linear_num_key_heads \(16\)",
    ),
    "an odd share of a head": (
        {"model_type": "qwen3_5_text", "head_dim": 8, "partial_rotary_factor": 0.4},
        "partial_rotary_factor: expected an even share of head_dim",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(change, message):
    with pytest.raises(NaloraError, match=message) as error:
        ModelConfig.from_hf(LLAMA | change, "some/config.json")
    assert error.value.where.startswith("some/config.json")


# Fields whose null transformers' classes take as off, by our names, and those that they fill in.
OFF = {"attention_dropout": "attn_dropout", "attn_logit_softcapping": "attn_softcap"}
OFF |= {"final_logit_softcapping": "final_softcap"}
FILLED = {"head_dim", "layer_types", "max_window_layers", "num_key_value_heads", "sliding_window"}
FILLED |= {"tie_word_embeddings"}


def with_null(family: str, name: str) -> dict[str, Any]:
    routed = family.startswith(("glm4_moe", "deepseek", "mistral4"))
    experts = "n_routed_experts" if routed else "num_experts"
    sizes = {"num_experts_per_tok": 2, "num_local_experts": 4, experts: 4}
    if family.startswith(("glm4_moe_lite", "deepseek", "mistral4", "youtu")):
        sizes |= LATENT | {"n_group": 1, "topk_group": 1}
    if family in TEXT_HALVES:
        sizes |= {"rope_parameters": SECTIONS, "head_dim": 8}
    return LLAMA | sizes | {"pad_token_id": 0, "model_type": family, name: None}


def filled_by_transformers(raw: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the fields after transformers' class has read them; None if they have no meaning."""
    try:
        filled = transformers.AutoConfig.for_model(**raw).to_dict()
    except (StrictDataclassFieldValidationError, ZeroDivisionError):  # the latter in EXAONE 4
        return None
    if SLIDING in (filled.get("layer_types") or ()) and not filled["sliding_window"]:
        return None
    if filled.get("max_window_layers", 0) is None:  # Qwen2.5-VL's class keeps it
        return None
    return filled


NULLABLE = [
    (family, name)
    for family in COMPARED
    for name in sorted((OFF.keys() | FILLED) & CONFIG_MAPPING[family]().to_dict().keys())
]


@pytest.mark.parametrize(("family", "name"), NULLABLE)
def test_null_means_what_it_means_in_transformers(family: str, name: str) -> None:
    raw = with_null(family, name)
    filled = filled_by_transformers(raw)
    if filled is not None:
        ours = ModelConfig.from_hf(raw)
        assert ours == ModelConfig.from_hf(filled)
        if name in OFF:
            assert not getattr(ours, OFF[name])
        if name == "sliding_window":
            assert set(ours.layer_windows) == {GLOBAL_WINDOW}
    elif name == "num_key_value_heads":  # its only meaning in versions that had one
        assert ModelConfig.from_hf(raw).n_kv_heads == LLAMA["num_attention_heads"]
    elif name == "attention_dropout":
        assert not ModelConfig.from_hf(raw).attn_dropout
    elif name != "tie_word_embeddings":  # read by families whose files once had null
        with pytest.raises(NaloraError, match=f"{name}: expected"):
            ModelConfig.from_hf(raw)


def test_most_null_fields_are_compared_with_transformers() -> None:
    """Guards the test above against a change of transformers that refuses them all."""
    compared = {
        name for family, name in NULLABLE if filled_by_transformers(with_null(family, name))
    }
    assert compared == (OFF.keys() | FILLED) - {"max_window_layers", "tie_word_embeddings"}


# ---------------------------------------------------------------- configs of released checkpoints

FOLDER = Path(__file__).parents[2] / "nalora_jax" / "planner" / "released"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_counted_as_in_transformers(name):
    raw = json.loads((FOLDER / f"{name}.json").read_text())
    ours = ModelConfig.from_hf(raw)
    raw.pop("quantization_config", None)
    of_buffers = ("/correction", "tail/scale")
    shapes = {
        path: shape for path, shape in param_shapes(ours).items() if not path.endswith(of_buffers)
    }
    count = sum(math.prod(shape) for shape in shapes.values())
    text = transformers.AutoConfig.for_model(**raw).get_text_config()
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(text)
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
    stated = re.search(rf"\| {re.escape(name)} \| ([\d,]+) \|", (FOLDER / "README.md").read_text())
    assert stated is not None
    assert count == int(stated[1].replace(",", ""))
