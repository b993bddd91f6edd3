"""Families that differ from Llama by few fields."""

from __future__ import annotations

from nalora_jax.common.fields import Fields
from nalora_jax.config.rope_scaling import ORIGINAL
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.record import GGUF, Family
from nalora_jax.models.families.shared import (
    FULL,
    alternating,
    attention_bias,
    base_config,
    head_dim_of,
    layer_types,
    optional_windows,
    same_window,
    windows_of,
)
from nalora_jax.models.families.tensors import (
    GGUF_LLAMA,
    GGUF_PRE,
    HF_ATTENTION,
    HF_ENDS,
    HF_FFN,
    HF_LLAMA,
    HF_OLMO2,
    HF_PRE_NORMS,
    gguf_ends,
    gguf_kernel,
    gguf_norms,
    hf_kernel,
    hf_norms,
)
from nalora_jax.models.layers import RopeSpec
from nalora_jax.models.ropes import RopeRules, read_ropes


def _llama(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, ffn_bias=f.flag("mlp_bias"), **attention_bias(f))


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    _llama,
    HF_LLAMA,
    gguf=GGUF("llama", GGUF_LLAMA, matches=lambda r: not r.number("expert_count", int, 0)),
)


def _smollm3(f: Fields, name: str) -> ModelConfig:
    n_layers = f.integer("num_hidden_layers", high=2**10)
    interval = f.integer("no_rope_layer_interval")
    rotates = f.items("no_rope_layers", n_layers, int, longer=True)
    if rotates is None:
        rotates = [(i + 1) % interval != 0 for i in range(n_layers)]
    ropes, _ = read_ropes(f, head_dim_of(f), layer_types(f, n_layers))
    return base_config(
        f,
        name,
        ropes=ropes,
        rope_index=tuple(0 if rotate else -1 for rotate in rotates),
        windows=optional_windows(f, lambda i: not rotates[i]),
        ffn_bias=f.flag("mlp_bias"),
        **attention_bias(f),
    )


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    _smollm3,
    HF_LLAMA,
    {
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
        "no_rope_layer_interval": 4,
        "max_position_embeddings": 32_768,
    },
    GGUF("smollm3", GGUF_LLAMA),
)

_PHI3 = RopeRules(
    ("default", "longrope"),
    names=(("su", "longrope"), ("yarn", "longrope")),  # LongRoPE in earlier files
    defaults=((ORIGINAL, 4096),),
)


def _phi3(f: Fields, name: str) -> ModelConfig:
    for feature in ("resid_pdrop", "embd_pdrop"):
        f.refuse(feature, "set it to 0: only attention and adapter dropout exist")
    ropes, _ = read_ropes(
        f, head_dim_of(f), layer_types(f, f.integer("num_hidden_layers", high=2**10)), rules=_PHI3
    )
    return base_config(f, name, ropes=ropes, windows=same_window(f))


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    _phi3,
    (
        *HF_ENDS,
        *HF_PRE_NORMS,
        hf_kernel("self_attn.qkv_proj", "attn/q_proj", "attn/k_proj", "attn/v_proj"),
        hf_kernel("self_attn.o_proj", "attn/o_proj"),
        hf_kernel("mlp.gate_up_proj", "ffn/gate_proj", "ffn/up_proj"),
        hf_kernel("mlp.down_proj", "ffn/down_proj"),
    ),
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
    GGUF(
        "phi3",
        (
            *gguf_ends(),
            *gguf_norms(GGUF_PRE),
            gguf_kernel("attn_qkv", "attn/q_proj", "attn/k_proj", "attn/v_proj"),
            gguf_kernel("attn_output", "attn/o_proj"),
            gguf_kernel("ffn_up", "ffn/gate_proj", "ffn/up_proj"),
            gguf_kernel("ffn_down", "ffn/down_proj"),
        ),
        lambda r: {"sliding_window": r.number("attention.sliding_window", int, 0) or None},
    ),
    ropes=_PHI3,
)


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

FAMILIES = (LLAMA, SMOLLM3, PHI3, SEED_OSS, ERNIE4_5, EXAONE4, HUNYUAN)
