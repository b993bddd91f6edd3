"""Families that differ from Llama by few fields."""

from __future__ import annotations

from nalora_jax.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.record import Family
from nalora_jax.models.families.shared import (
    FULL,
    alternating,
    attention_bias,
    base_config,
    head_dim_of,
    layer_types,
    windows_of,
)
from nalora_jax.models.families.tensors import (
    HF_ATTENTION,
    HF_ENDS,
    HF_FFN,
    HF_LLAMA,
    HF_OLMO2,
    HF_PRE_NORMS,
    hf_norms,
)
from nalora_jax.models.layers import RopeSpec
from nalora_jax.models.ropes import read_ropes


def _seed_oss(f: Fields, name: str) -> ModelConfig:
    return base_config(
        f,
        name,
        head_dim=head_dim_of(f, absent=128),
        qkv_bias=f.flag("attention_bias"),
        o_bias=f.flag("attention_out_bias"),
        ffn_bias=f.flag("mlp_bias"),
        residual_dropout=f.number("residual_dropout", default=0.0, zero=True),
    )


SEED_OSS = Family(
    "seed_oss",
    "SeedOssForCausalLM",
    _seed_oss,
    HF_LLAMA,
    {
        "num_key_value_heads": 8,
        "max_position_embeddings": 524_288,
        "attention_bias": True,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
    },
)


def _ernie4_5(f: Fields, name: str) -> ModelConfig:
    bias, head_dim = f.flag("use_bias"), head_dim_of(f, absent=128)
    biases = {"qkv_bias": bias, "o_bias": bias, "ffn_bias": bias}
    return base_config(f, name, head_dim=head_dim, rope_adjacent=True, attn_dropout=0.0, **biases)


ERNIE4_5 = Family(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    _ernie4_5,
    HF_LLAMA,
    {
        "num_key_value_heads": 2,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_theta": 500_000.0,
    },
)


def _exaone4(f: Fields, name: str) -> ModelConfig:
    n_layers, windowed = f.integer("num_hidden_layers", high=2**10), f.get("sliding_window") is not None
    kinds = layer_types(f, n_layers) or alternating(n_layers, f.integer("sliding_window_pattern"))
    return base_config(
        f,
        name,
        ropes=read_ropes(f, head_dim_of(f), None)[0],
        rope_index=tuple(-1 if windowed and kind == FULL else 0 for kind in kinds),
        windows=windows_of(f, kinds),
        qk_norm="head",
        pre_norm=False,
        post_norm=True,
    )


EXAONE4 = Family(
    "exaone4",
    "Exaone4ForCausalLM",
    _exaone4,
    HF_OLMO2,
    {
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
)


def _hunyuan(f: Fields, name: str) -> ModelConfig:
    features = {"qk_norm": "rotated", **attention_bias(f)}
    rope = Fields(
        f.mapping("rope_scaling") or f.mapping("rope_parameters"), {}, f"{f.where}: rope_parameters"
    )
    if rope.get("alpha") and (rope.get("rope_type") or rope.get("type")) == "dynamic":
        # Dynamic scaling with a fixed alpha is a larger base, for texts of any length.
        dim, theta = head_dim_of(f), rope.number("rope_theta", default=f.number("rope_theta", default=1e4))
        theta *= rope.number("alpha") ** (dim / (dim - 2))
        features |= {"ropes": (RopeSpec(dim=dim, theta=theta),)}
    return base_config(f, name, **features)


HUNYUAN = Family(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    _hunyuan,
    (
        *HF_ENDS,
        *HF_PRE_NORMS,
        *HF_ATTENTION,
        *hf_norms({"attn/q_norm": "self_attn.query_layernorm", "attn/k_norm": "self_attn.key_layernorm"}),
        *HF_FFN,
    ),
    {"rms_norm_eps": 1e-5},
)

FAMILIES = (SEED_OSS, ERNIE4_5, EXAONE4, HUNYUAN)
