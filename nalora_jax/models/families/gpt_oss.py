"""gpt-oss.

Attention has a sink per head, biases and alternating windows. Experts and router have biases; the
gate is the clamped swish, and its factor is ``1 + clip(x W_up)``. The released files store the
experts' kernels in MXFP4 (`nalora_jax.weights.expert_tensors`).
"""

from __future__ import annotations

from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.method.activations import clamped_swish
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.record import Family
from nalora_jax.models.families.shared import (
    alternating,
    attention_bias,
    base_config,
    first_present,
    layer_types,
    windows_of,
)
from nalora_jax.models.families.tensors import (
    HF_ATTENTION,
    HF_ENDS,
    HF_PRE_NORMS,
    HF_SINKS,
    TensorRow,
    hf_kernel,
)

_DEFAULTS: dict[str, Any] = {
    "head_dim": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "rope_theta": 150_000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}


def _gpt_oss(f: Fields, name: str) -> ModelConfig:
    _check_quantization(f)
    if f.text("hidden_act") != "silu":
        raise f.error(
            "hidden_act", "'silu': the gate follows from swiglu_alpha and swiglu_limit", f.get("hidden_act")
        )
    limit = f.number("swiglu_limit")
    n_layers = f.integer("num_hidden_layers", high=2**10)
    return base_config(
        f,
        name,
        activation=clamped_swish(f.number("swiglu_alpha"), limit).name,
        up_limit=limit,
        attn_sinks=True,
        ffn_bias=True,
        router_bias=True,
        windows=windows_of(f, layer_types(f, n_layers) or alternating(n_layers, 2)),
        n_experts=f.integer(first_present(f, "num_local_experts", "num_experts"), high=2**12, default=128),
        experts_per_token=f.integer("num_experts_per_tok", high=2**12),
        **attention_bias(f),
    )


def _check_quantization(f: Fields) -> None:
    """Refuses any quantization except the released files': MXFP4 experts, all others floats."""
    stored = Fields(f.mapping("quantization_config"), {}, f"{f.where}: quantization_config")
    if not stored.raw:
        return
    if stored.get("quant_method") != "mxfp4":
        remedy = "load the unquantized model"
        raise stored.error(
            "quant_method", "'mxfp4', or no quantization_config", repr(stored.get("quant_method")), remedy
        )
    for key in sorted(stored.raw.keys() - {"quant_method", "modules_to_not_convert", "dequantize"}):
        stored.refuse(key)
    listed = stored.get("modules_to_not_convert")
    if not isinstance(listed, list | None) or any("experts" in str(module) for module in listed or ()):
        raise stored.error(
            "modules_to_not_convert", "a list of modules other than the experts", repr(listed)[:60]
        )


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    _gpt_oss,
    (
        *HF_ENDS,
        *HF_PRE_NORMS,
        *HF_ATTENTION,
        HF_SINKS,
        hf_kernel("mlp.router", "ffn/router"),
        TensorRow("model.layers.{layer}.mlp.router.bias", ("layers/ffn/router/bias",)),
        *(
            TensorRow(
                f"model.layers.{{layer}}.mlp.experts.gate_up_proj{theirs}",
                (f"layers/ffn/gate_proj/{ours}", f"layers/ffn/up_proj/{ours}"),
                "columns",
            )
            for ours, theirs in {"kernel": "", "bias": "_bias"}.items()
        ),
        TensorRow("model.layers.{layer}.mlp.experts.down_proj", ("layers/ffn/down_proj/kernel",)),
        TensorRow("model.layers.{layer}.mlp.experts.down_proj_bias", ("layers/ffn/down_proj/bias",)),
    ),
    _DEFAULTS,
    checks=("quantization_config",),
)

FAMILIES = (GPT_OSS,)
