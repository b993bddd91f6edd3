"""Readers of Qwen's ``config.json`` with layers of gated attention and of Gated DeltaNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nalora_jax.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.family_fields import FULL, attention_bias, base_config, head_dim_of
from nalora_jax.models.gated_delta_net import GatedDeltaNet
from nalora_jax.models.ropes import read_ropes

_LINEAR = "linear_attention"


def _qwen3_5(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, **_traits(f))


def _traits(f: Fields) -> dict[str, Any]:
    """Returns the fields of both kinds of layers."""
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
        "kinds": ((), (("mixer", _delta_net(f)),)),
        "layer_kinds": tuple(int(kind == _LINEAR) for kind in kinds),
        **attention_bias(f),
    }


def _delta_net(f: Fields, *, fused: bool = False) -> GatedDeltaNet:
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

READERS: dict[str, tuple[Callable[[Fields, str], ModelConfig], dict[str, Any]]] = {
    "qwen3_5_text": (_qwen3_5, _QWEN3_5),
}
