"""Families of dense decoders: Llama and its relatives, Mistral, Qwen2 and Qwen3, Granite, OLMo 2 and 3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.config.rope_scaling import ORIGINAL, WITH_ORIGINAL
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.family import (
    GGUF,
    GGUF_ATTENTION,
    GGUF_FFN,
    GGUF_LLAMA,
    GGUF_POST,
    GGUF_PRE,
    GGUF_QK,
    GGUF_QWEN2,
    HF_ATTENTION,
    HF_ENDS,
    HF_FFN,
    HF_LLAMA,
    HF_OLMO2,
    HF_PRE_NORMS,
    HF_QK_NORMS,
    HF_SINKS,
    Family,
    Metadata,
    gguf_ends,
    gguf_kernel,
    gguf_norms,
    hf_kernel,
    hf_norms,
)
from nalora_jax.models.readers import (
    FULL,
    SLIDING,
    attention_bias,
    base_config,
    head_dim_of,
    layer_count,
    layer_types,
    optional_windows,
    periodic,
    same_window,
    windows_of,
)
from nalora_jax.models.ropes import RopeRules, RopeSpec, read_ropes, rope_fields

# ---------------------------------------------------------------- Llama and its relatives


def _llama(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, ffn_bias=f.flag("mlp_bias"), **attention_bias(f))


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    _llama,
    HF_LLAMA,
    gguf=GGUF("llama", GGUF_LLAMA, matches=lambda r: not r.get("expert_count", int, 0)),
)


def _smollm3(f: Fields, name: str) -> ModelConfig:
    n_layers = layer_count(f)
    interval = f.integer("no_rope_layer_interval")
    rotates = f.items("no_rope_layers", n_layers, int, longer=True)
    if rotates is None:
        rotates = [(i + 1) % interval != 0 for i in range(n_layers)]
    ropes, _ = read_ropes(f, head_dim_of(f), layer_types(f))
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
    ropes, _ = read_ropes(f, head_dim_of(f), layer_types(f), rules=_PHI3)
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
        lambda r: {"sliding_window": r.get("attention.sliding_window", int, 0) or None},
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
    windowed = f.get("sliding_window") is not None
    kinds = layer_types(f) or periodic(f, f.integer("sliding_window_pattern"))
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
    rope = rope_fields(f)
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


# ---------------------------------------------------------------- Mistral and Ministral 3


def _mistral(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, windows=same_window(f))


MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    _mistral,
    HF_LLAMA,
    {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    # llama.cpp's files do not tell Mistral from Llama.
    GGUF("llama", GGUF_LLAMA, matches=lambda r: False),
    multimodal="mistral3",
)


def _ministral3(f: Fields, name: str) -> ModelConfig:
    beta = "llama_4_scaling_beta"
    ropes, _ = read_ropes(f, head_dim_of(f), None, further=(beta, "max_position_embeddings"))
    rope = rope_fields(f)
    growth = rope.number(beta, default=0.0, zero=True)
    growing: dict[str, Any] = {}
    if growth:
        # Queries grow from the original context; dynamic scaling starts at the model's context.
        if ropes[0].kind in (*WITH_ORIGINAL, "longrope"):
            length = ropes[0].max_positions
        elif rope.get(ORIGINAL) is not None:
            length = rope.integer(ORIGINAL, high=2**30)
        else:
            raise rope.error(beta, f"0 without {ORIGINAL}", growth)
        growing = {"query_growth": growth, "growth_length": length}
    return base_config(f, name, ropes=ropes, windows=same_window(f), **growing)


def _ministral3_settings(r: Metadata) -> dict[str, Any]:
    scaling = r.scaling()
    if scaling is None:
        return {
            "architectures": [MISTRAL.class_name],
            "model_type": MISTRAL.name,
            "sliding_window": None,
        }
    scaling["llama_4_scaling_beta"] = r.get("attention.temperature_scale", float, 0.0)
    return {"rope_scaling": scaling}


_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

MINISTRAL3 = Family(
    "ministral3",
    "Ministral3ForCausalLM",
    _ministral3,
    HF_LLAMA,
    {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _YARN,
    },
    GGUF("mistral3", GGUF_LLAMA, _ministral3_settings),
)


# ---------------------------------------------------------------- Qwen2 and Qwen3

QWEN = {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32_768}


def _qwen2(f: Fields, name: str) -> ModelConfig:
    first = f.integer("max_window_layers", low=0)
    return base_config(f, name, windows=optional_windows(f, lambda i: i >= first), qkv_bias=True)


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _qwen2, HF_LLAMA, QWEN, GGUF("qwen2", GGUF_QWEN2))


def _qwen3(f: Fields, name: str) -> ModelConfig:
    first = f.integer("max_window_layers", low=0)
    windows = optional_windows(f, lambda i: i >= first)
    return base_config(f, name, windows=windows, qk_norm="head", **attention_bias(f))


QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _qwen3,
    (*HF_LLAMA, *HF_QK_NORMS),
    QWEN | {"head_dim": 128},
    GGUF("qwen3", (*GGUF_QWEN2, *gguf_norms(GGUF_QK))),
)


# ---------------------------------------------------------------- Granite: multipliers

# llama.cpp's names of the multipliers.
_MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
_GRANITE: dict[str, Any] = dict.fromkeys(_MULTIPLIERS, 1.0)


def _multipliers(f: Fields) -> dict[str, Any]:
    """Returns the multipliers and the bias of the feed-forward block."""
    return {
        "ffn_bias": f.flag("mlp_bias"),
        "embed_scale": f.number("embedding_multiplier"),
        "residual_scale": f.number("residual_multiplier"),
        "query_scale": f.number("attention_multiplier"),
        "logit_scale": 1.0 / f.number("logits_scaling"),
    }


def _granite(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, **_multipliers(f), **attention_bias(f))


def _granite_settings(r: Metadata) -> dict[str, Any]:
    return {ours: r.get(theirs, float) for ours, theirs in _MULTIPLIERS.items()}


GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    _granite,
    HF_LLAMA,
    _GRANITE,
    GGUF("granite", GGUF_LLAMA, _granite_settings),
)


def _granite_swa(f: Fields, name: str) -> ModelConfig:
    n_layers = layer_count(f)
    kinds = layer_types(f) or [SLIDING if i % 4 else FULL for i in range(n_layers)]
    ropes, index = _layer_ropes(f, n_layers)
    return base_config(
        f,
        name,
        ropes=ropes,
        rope_index=index,
        windows=windows_of(f, kinds),
        attn_sinks=True,
        **_multipliers(f),
        **attention_bias(f),
    )


def _layer_ropes(f: Fields, n_layers: int) -> tuple[tuple[RopeSpec, ...], tuple[int, ...]]:
    """Returns the rotary embeddings of layers with a base each; a base of 0 means no rotation."""
    (spec,), _ = read_ropes(f, head_dim_of(f), None)
    bases = f.items("layer_rope_theta", n_layers, (int, float)) or [spec.theta] * n_layers
    for base in bases:
        if base and not 1 < base < 1e30:
            raise f.error("layer_rope_theta", "numbers above 1, or 0 for no rotation", base)
    distinct = sorted({float(base) for base in bases if base}) or [spec.theta]
    index = tuple(distinct.index(base) if base else -1 for base in bases)
    return tuple(replace(spec, theta=base) for base in distinct), index


GRANITE_SWA = Family(
    "granite_swa",
    "GraniteSWAForCausalLM",
    _granite_swa,
    (*HF_LLAMA, HF_SINKS),
    _GRANITE
    | {
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "sliding_window": 128,
    },
)


# ---------------------------------------------------------------- OLMo

_GGUF = (*gguf_ends(), *gguf_norms(GGUF_POST | GGUF_QK), *GGUF_ATTENTION, *GGUF_FFN)
_OLMO3_THETA = 500_000.0


def _olmo2(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, qk_norm="projection", pre_norm=False, post_norm=True, **attention_bias(f))


OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    _olmo2,
    HF_OLMO2,
    {"rms_norm_eps": 1e-5},
    GGUF("olmo2", _GGUF, matches=lambda r: not r.has("attention.sliding_window")),
)


def _olmo3(f: Fields, name: str) -> ModelConfig:
    kinds = periodic(f, 4)
    _check_olmo3_rope(f)
    plain = {kind: {"rope_theta": _OLMO3_THETA} for kind in (FULL, SLIDING)}
    ropes, index = read_ropes(f, head_dim_of(f), kinds, plain)
    return base_config(
        f,
        name,
        ropes=ropes,
        rope_index=index,
        windows=windows_of(f, kinds),
        qk_norm="projection",
        pre_norm=False,
        post_norm=True,
        **attention_bias(f),
    )


def _check_olmo3_rope(f: Fields) -> None:
    """Refuses forms of OLMo 3's rotary parameters that releases of transformers disagree on."""
    parameters = f.mapping("rope_parameters")
    common = sorted(parameters.keys() - {FULL, SLIDING})
    if common:
        raise f.error("rope_parameters", f"parameters for {FULL!r} and {SLIDING!r}", f"{', '.join(common)}")
    stated = all("rope_theta" in (parameters.get(kind) or {}) for kind in (FULL, SLIDING))
    theta = f.number("rope_theta", default=_OLMO3_THETA)
    if theta != _OLMO3_THETA and not stated:
        expected = f"{_OLMO3_THETA:g}: releases of transformers read other values differently"
        raise f.error("rope_theta", expected, theta, "state it in rope_parameters for each kind of layer")


def _olmo3_settings(r: Metadata) -> dict[str, Any]:
    slides = r.flags("attention.sliding_window_pattern", r.get("block_count", int))
    theta = {"rope_theta": r.get("rope.freq_base", float, 10_000.0)}
    return {
        "sliding_window": r.get("attention.sliding_window", int),
        "layer_types": [SLIDING if slide else FULL for slide in slides],
        "rope_scaling": None,  # not for sliding layers, as in llama.cpp
        "rope_parameters": {
            SLIDING: {"rope_type": "default"} | theta,
            FULL: (r.scaling() or {"rope_type": "default"}) | theta,
        },
    }


OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    _olmo3,
    HF_OLMO2,
    {"rms_norm_eps": 1e-5, "sliding_window": 4096},
    GGUF("olmo2", _GGUF, _olmo3_settings, lambda r: r.has("attention.sliding_window")),
)

FAMILIES = (
    LLAMA,
    SMOLLM3,
    PHI3,
    SEED_OSS,
    ERNIE4_5,
    EXAONE4,
    HUNYUAN,
    MISTRAL,
    MINISTRAL3,
    QWEN2,
    QWEN3,
    GRANITE,
    GRANITE_SWA,
    OLMO2,
    OLMO3,
)
