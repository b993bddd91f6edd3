"""Every field of every family's class in transformers, set to another value: used as there, or
refused by name."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from tests.models.compared import COMPARED, TEXT_HALVES, model_class
from tests.models.family_fields import LATENT

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "moe_intermediate_size": 24, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 4, "linear_value_head_dim": 4, "pad_token_id": 0,
}  # fmt: skip
# Sizes of one family only.
GEMMA4 = {"global_head_dim": 16, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 32}
LATENT_EXPERTS = LATENT | {"n_routed_experts": 4, "first_k_dense_replace": 1}
FURTHER: dict[str, Any] = {
    "deepseek_v2": LATENT_EXPERTS,
    "deepseek_v3": LATENT_EXPERTS | {"n_group": 2, "topk_group": 1},
    "glm4_moe_lite": LATENT_EXPERTS,
    "mistral4": LATENT_EXPERTS,
    "youtu": LATENT,
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": {"global_head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
}
# Values of fields for which another number, flag or list of the same type would have no effect or
# no meaning.
VALUES: dict[str, Any] = {
    "hidden_size": 32, "hidden_act": "relu", "hidden_activation": "relu", "rms_norm_eps": 0.3, "norm_eps": 0.3,
    "full_attn_idxs": None,  # layer_types takes precedence
    "block_multiple_of": 40, "layer_types": ["full_attention", "sliding_attention"] * 2,
    "layer_rope_theta": [1e4, 0.0, 1e3, 1e2], "no_rope_layers": [0, 1, 1, 0], "mlp_only_layers": [1],
    "rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0},
    "head_dim": 12, "sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1, "num_experts_per_tok": 1,
    "num_hidden_layers": 3, "use_bidirectional_attention": True, "attn_logit_softcapping": 0.5,
    "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 2, "decoder_sparse_step": 2, "router_jitter_noise": 0.5,
}  # fmt: skip
# Fields that act in training, in generation or on other inputs only; here they may change our
# config.
ELSEWHERE = {"attn_dropout", "residual_dropout", "max_positions"}
TOKENS = torch.tensor(np.random.default_rng(0).integers(1, 32, (1, 14)))


def other_value(name: str, value: Any) -> Any:
    """Returns a value that differs from a field's default."""
    if name == "layer_types" and "linear_attention" in value:
        return value[::-1]
    if name in VALUES:
        return VALUES[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 2 if name.endswith("_id") else max(value // 2, 1) + 1
    return value * 0.5 + 0.1 if isinstance(value, float) else None


def small(family: str) -> dict[str, Any]:
    """Returns a family's defaults at tiny sizes, with windows shorter than the text."""
    raw = CONFIG_MAPPING[family](**(SIZES | FURTHER.get(family, {}))).to_dict() | {
        "model_type": family
    }
    return raw | ({} if raw.get("sliding_window") is None else {"sliding_window": 5})


def other_values(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns other values of the fields that not every class of transformers has."""
    common = set(transformers.PreTrainedConfig().to_dict()) | {"model_type"}
    fields = raw.keys() - (common - {"tie_word_embeddings"})
    others = {name: other_value(name, raw[name]) for name in sorted(fields)}
    return {name: value for name, value in others.items() if value is not None}


def logits(raw: dict[str, Any]) -> torch.Tensor | None:
    """Returns transformers' logits with weights that depend on the parameter's name, or None if it
    has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
            kind = model_class(raw["model_type"])
            model = kind._from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    generator = torch.Generator().manual_seed(sum(name.encode()))
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=generator) * 0.4 + ("norm" in name)
                    )
                for name, buffer in model.named_buffers():
                    if name.endswith("bias"):
                        buffer.copy_(torch.linspace(-1.0, 1.0, len(buffer)))
                return model(TOKENS).logits
    except Exception:  # a value that transformers does not run
        return None


def ours(raw: dict[str, Any]) -> dict[str, Any] | None:
    """Returns our config without the fields of `ELSEWHERE`, or None if a field is refused."""
    try:
        return {
            k: v
            for k, v in dataclasses.asdict(ModelConfig.from_hf(raw)).items()
            if k not in ELSEWHERE
        }
    except NaloraError:
        return None


@pytest.mark.parametrize("family", [f for f in COMPARED if f not in TEXT_HALVES])
def test_a_field_changes_our_model_if_it_changes_theirs(family: str) -> None:
    base = small(family)
    before, plain = logits(base), ours(base)
    assert before is not None
    assert plain is not None
    acting = set()
    for name, value in other_values(base).items():
        raw = base | {name: value}
        changed = ours(raw)
        after = None if changed is None else logits(raw)
        if after is None:
            continue
        same = before.shape == after.shape and torch.equal(before, after)
        assert same == (changed == plain), f"{name}: {value!r}"
        acting |= set() if same else {name}
    assert acting >= {"hidden_size", "norm_eps" if "norm_eps" in base else "rms_norm_eps"}
