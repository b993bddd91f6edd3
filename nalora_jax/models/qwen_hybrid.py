"""Readers of Qwen's ``config.json`` with layers of gated attention and of Gated DeltaNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nalora_jax.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.shared import FULL, attention_bias, base_config, head_dim_of
from nalora_jax.models.gated_delta_net import GatedDeltaNet
from nalora_jax.models.mixture_families import qwen_experts
from nalora_jax.models.ropes import read_ropes
from nalora_jax.models.router import RouterSpec
from nalora_jax.models.shared_experts import SharedExperts

_LINEAR = "linear_attention"


def _qwen3_5(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, **_mixers(f))


def _qwen3_5_moe(f: Fields, name: str) -> ModelConfig:
    f.refuse("mlp_only_layers", "every layer of this family has experts")
    for field in ("decoder_sparse_step", "norm_topk_prob"):
        if f.get(field) not in (None, 1):
            raise f.error(field, "1: the only choice of this family", f.get(field))
    return _with_experts(f, name, _mixers(f), normalize=True)


def _qwen3_next(f: Fields, name: str) -> ModelConfig:
    return _with_experts(f, name, _mixers(f, fused=True), normalize=f.flag("norm_topk_prob"))


def _with_experts(f: Fields, name: str, mixers: dict[str, Any], *, normalize: bool) -> ModelConfig:
    """Returns the config of a model with experts and a gated shared expert, or dense layers."""
    experts = qwen_experts(f)
    shared = SharedExperts(
        f.integer("shared_expert_intermediate_size"), RouterSpec(normalize=normalize), gated=True
    )
    if "kinds" in experts:
        dense = experts["kinds"][1]
        mixers["kinds"] += tuple(kind + dense for kind in mixers["kinds"])
        kinds = zip(mixers["layer_kinds"], experts["layer_kinds"], strict=True)
        mixers["layer_kinds"] = tuple(mixer + 2 * ffn for mixer, ffn in kinds)
    return base_config(f, name, ffn=shared, **(experts | mixers))


def _mixers(f: Fields, *, fused: bool = False) -> dict[str, Any]:
    """Returns the fields of attention and of linear attention, and the layers of both kinds."""
    if f.get("attn_output_gate") is False:
        raise f.error("attn_output_gate", "true: attention of this family has output gates", False)
    n_layers = f.integer("num_hidden_layers", high=2**10)
    kinds = f.items("layer_types", n_layers, str)
    if kinds is None:
        interval = f.integer("full_attention_interval")
        kinds = [_LINEAR if (i + 1) % interval else FULL for i in range(n_layers)]
    if unknown := set(kinds) - {FULL, _LINEAR}:
        raise f.error("layer_types", f"{FULL!r} or {_LINEAR!r}", repr(min(unknown)))
    # Sections of MRoPE have no effect on text, whose three positions are equal.
    ropes, _ = read_ropes(f, head_dim_of(f), None, further=("mrope_section", "mrope_interleaved"))
    return {
        "ropes": ropes,
        "qk_norm": "head",
        "norm_offset": 1.0,
        "attn_gate": True,
        "kinds": ((), (("mixer", _delta_net(f, fused)),)),
        "layer_kinds": tuple(int(kind == _LINEAR) for kind in kinds),
        **attention_bias(f),
    }


def _delta_net(f: Fields, fused: bool) -> GatedDeltaNet:
    keys, values = (f.integer(f"linear_num_{name}_heads", high=2**16) for name in ("key", "value"))
    if values % keys:
        raise f.error("linear_num_value_heads", f"a multiple of linear_num_key_heads ({keys})", values)
    return GatedDeltaNet(
        keys,
        values,
        f.integer("linear_key_head_dim", high=2**16),
        f.integer("linear_value_head_dim", high=2**16),
        f.integer("linear_conv_kernel_dim", high=2**10),
        fused,
    )


_HYBRID: dict[str, Any] = {
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
# Nested text configs list only the differences from these defaults.
_QWEN3_5 = _HYBRID | {
    "vocab_size": 248_320,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
_MOE = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "decoder_sparse_step": 1}
_QWEN3_5_MOE = _QWEN3_5 | _MOE
_QWEN3_5_MOE |= {
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "num_experts": 256,
    "num_experts_per_tok": 8,
}
_QWEN3_NEXT = _HYBRID | _MOE | {"num_key_value_heads": 2, "num_experts_per_tok": 10, "norm_topk_prob": True}

READERS: dict[str, tuple[Callable[[Fields, str], ModelConfig], dict[str, Any]]] = {
    "qwen3_5_text": (_qwen3_5, _QWEN3_5),
    "qwen3_5_moe_text": (_qwen3_5_moe, _QWEN3_5_MOE),
    "qwen3_next": (_qwen3_next, _QWEN3_NEXT),
}
