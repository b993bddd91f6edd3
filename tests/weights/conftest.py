"""Tiny transformers models of every family, and adapters for them, as references that nobody here
wrote."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from nalora_jax.common.trees import unflatten
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import depths, projection_shapes
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from tests.models.compared import model_class
from tests.models.family_fields import GRANITE, LATENT
from tests.param_trees import params_from_tensors

COMMON = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DELTA_NET = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
WINDOW = {"sliding_window": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED_EXPERTS = EXPERTS | {"shared_expert_intermediate_size": 12}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
DYNAMIC = ROPE | {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0}
# transformers rotates ``head_dim`` dimensions.
ROTATED = LATENT | {"head_dim": LATENT["qk_rope_head_dim"]}
LATENT_EXPERTS = ROTATED | {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv"]}
FEATURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": WINDOW,
    "qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": False},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": WINDOW | {"query_pre_attn_scalar": 8},
    "gemma3_text": WINDOW | {"query_pre_attn_scalar": 8},
    "phi3": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "olmo2": {},
    "olmo3": WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "ministral3": {"rope_parameters": YARN},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": GRANITE,
    "granite_swa": WINDOW | {"layer_rope_theta": [1e4, 0.0, 1e3], "attention_multiplier": 0.3},
    "lfm2": CONVOLUTIONS | {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": CONVOLUTIONS | EXPERTS | {"num_dense_layers": 1},
    "seed_oss": {"attention_out_bias": True},
    "ernie4_5": {"use_bias": True},
    "exaone4": WINDOW | {"sliding_window_pattern": 2},
    "hunyuan_v1_dense": {"rope_parameters": DYNAMIC},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 4},
    "mixtral": LOCAL_EXPERTS,
    "gpt_oss": LOCAL_EXPERTS | WINDOW | {"swiglu_limit": 1.5, "rope_parameters": ROPE},
    "qwen3_moe": EXPERTS | {"decoder_sparse_step": 1, "norm_topk_prob": True},
    "qwen2_moe": SHARED_EXPERTS,
    "qwen3_5_text": DELTA_NET,
    "qwen3_next": DELTA_NET | SHARED_EXPERTS,
    "deepseek_v2": LATENT_EXPERTS | {"topk_method": "greedy"},
    "deepseek_v3": LATENT_EXPERTS | {"q_lora_rank": None, "n_group": 2, "topk_group": 1},
    # transformers sets the row of a padding token to zero when it loads the model
    "youtu": ROTATED | {"tie_word_embeddings": False, "pad_token_id": None},
    "mistral4": LATENT_EXPERTS | {"head_dim": 12},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
    },
}


def mixed(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[float, ...]]]:
    """Returns ranks and alphas of all projections, which differ between layers and modules, for
    `random_lora`."""
    rng, targets = np.random.default_rng(0), {}
    for path, layers in depths(config).items():
        ranks, alphas = rng.integers(1, 5, layers), rng.choice([1.5, 3.0, 8.0], layers)
        targets[path.removeprefix("layers/")] = tuple(ranks.tolist()), tuple(alphas.tolist())
    return targets


@pytest.fixture
def tiny_model() -> Callable[..., tuple[Any, ModelConfig]]:
    """``tiny_model("llama", **changes) -> (torch model with random weights in eval mode, our
    config)``."""

    def build(model_type: str, **changes: Any) -> tuple[Any, ModelConfig]:
        torch.manual_seed(0)
        settings = COMMON | FEATURES[model_type] | changes
        config = transformers.AutoConfig.for_model(model_type, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = model_class(model_type)
            model = kind._from_config(config, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for (
                parameter
            ) in model.parameters():  # the defaults leave logits near zero and norms at one
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1)
                )
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
        return model, ModelConfig.from_hf(model.config.to_dict())

    return build


@pytest.fixture
def params_of() -> Callable[[Any, ModelConfig], dict[str, Any]]:
    """``params_of(torch model, config)``: our float32 parameter tree of its checkpoint."""

    def build(model: Any, config: ModelConfig) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder)
            tensors = load_file(f"{folder}/model.safetensors")
        return params_from_tensors(config, tensors.__getitem__)

    return build


@pytest.fixture
def random_lora() -> Callable[..., tuple[dict[str, Any], AdapterSpec]]:
    """``random_lora(config, {"ffn/gate_proj": ((4, 4, 2), (8., 8., 6.))}, dora=True) -> (lora,
    spec)``, B nonzero."""

    def build(
        config: ModelConfig,
        targets: dict[str, tuple[tuple[int, ...], tuple[float, ...]]],
        seed: int = 0,
        **variant: Any,
    ) -> tuple[dict[str, Any], AdapterSpec]:
        rng = np.random.default_rng(seed)
        shapes, leaves, specs = projection_shapes(config), {}, []
        for name, (ranks, alphas) in sorted(targets.items()):
            path, n = f"layers/{name}", len(ranks)
            *lead, d_in, d_out = shapes[path]
            a = rng.normal(0, 0.3, (n, *lead, d_in, max(ranks))).astype(np.float32)
            b = rng.normal(0, 0.3, (n, *lead, max(ranks), d_out)).astype(np.float32)
            for layer, rank in enumerate(ranks):
                a[layer, ..., rank:], b[layer, ..., rank:, :] = 0, 0
            leaves |= {f"{path}/a": a, f"{path}/b": b}
            if variant.get("dora"):
                leaves[f"{path}/magnitude"] = rng.uniform(0.5, 2, (n, *lead, d_out)).astype(
                    np.float32
                )
            specs.append((path, TargetSpec(ranks, alphas)))
        return unflatten(leaves), AdapterSpec(tuple(specs), **variant)

    return build
