"""Families of dense decoders: Llama and its relatives, Mistral, Qwen2 and Qwen3, Granite, OLMo 2
and 3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.config.rope_scaling import ORIGINAL, WITH_ORIGINAL
from nalora_jax.models import readers
from nalora_jax.models import tensor_rows as rows
from nalora_jax.models.family import GGUF, Family, Features, Metadata, hf_defaults
from nalora_jax.models.readers import FULL_ATTENTION, SLIDING, attention_bias
from nalora_jax.models.ropes import (
    RopeRules,
    RopeSpec,
    image_axes,
    read_ropes,
    rope_fields,
)

# ---------------------------------------------------------------- Llama and its relatives

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    lambda f: {"ffn_bias": f.flag("mlp_bias"), **attention_bias(f)},
    rows.HF_LLAMA,
    gguf=GGUF(
        "llama", rows.GGUF_LLAMA, matches=lambda r: not r.get("expert_count", int, 0)
    ),
)


def _smollm3(f: Fields) -> Features:
    """Returns the fields of SmolLM3; some layers have no RoPE (index -1) and may have windows."""
    n_layers = readers.layer_count(f)
    interval = f.integer("no_rope_layer_interval")
    rotates = f.items("no_rope_layers", n_layers, int, longer=True)
    if rotates is None:
        rotates = [(i + 1) % interval != 0 for i in range(n_layers)]
    ropes, _ = read_ropes(f, readers.head_dim_of(f), readers.layer_types(f))
    return {
        "ropes": ropes,
        "rope_index": tuple(0 if rotate else -1 for rotate in rotates),
        "ffn_bias": f.flag("mlp_bias"),
        **readers.optional_windows(f, lambda i: not rotates[i]),
        **attention_bias(f),
    }


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    _smollm3,
    rows.HF_LLAMA,
    hf_defaults(
        tie_embeddings=True,
        rope_theta=2e6,
        no_rope_layer_interval=4,
        max_positions=32_768,
    ),
    GGUF("smollm3", rows.GGUF_LLAMA),
)

_PHI3 = RopeRules(
    ("default", "longrope"),
    names=(("su", "longrope"), ("yarn", "longrope")),  # LongRoPE in earlier files
    defaults=((ORIGINAL, 4096),),
)


def _phi3(f: Fields) -> Features:
    """Returns Phi-3's RoPE and its window, which all layers share."""
    for feature in ("resid_pdrop", "embd_pdrop"):
        f.refuse(feature, "set it to 0: only attention and adapter dropout exist")
    ropes, _ = read_ropes(
        f, readers.head_dim_of(f), readers.layer_types(f), rules=_PHI3
    )
    return {"ropes": ropes, **readers.same_window(f)}


_QKV = ("attn/q_proj", "attn/k_proj", "attn/v_proj")
_GATE_UP = ("ffn/gate_proj", "ffn/up_proj")
PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    _phi3,
    rows.hf(
        rows.PRE_NORMS,
        {_QKV: "self_attn.qkv_proj", "attn/o_proj": "self_attn.o_proj"},
        {_GATE_UP: "mlp.gate_up_proj", "ffn/down_proj": "mlp.down_proj"},
    ),
    {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
    },
    GGUF(
        "phi3",
        rows.gguf(
            rows.GGUF_PRE,
            {_QKV: "attn_qkv", "attn/o_proj": "attn_output"},
            {_GATE_UP: "ffn_up", "ffn/down_proj": "ffn_down"},
        ),
        lambda r: {"sliding_window": r.get("attention.sliding_window", int, 0) or None},
    ),
    ropes=_PHI3,
)


def _seed_oss(f: Fields) -> Features:
    """Returns head size, biases and residual dropout of Seed-OSS."""
    return {
        "head_dim": readers.head_dim_of(f, absent=128),
        "qkv_bias": f.flag("attention_bias"),
        "o_bias": f.flag("attention_out_bias"),
        "ffn_bias": f.flag("mlp_bias"),
        "residual_dropout": f.number("residual_dropout", default=0.0, zero=True),
    }


SEED_OSS = Family(
    "seed_oss",
    "SeedOssForCausalLM",
    _seed_oss,
    rows.HF_LLAMA,
    hf_defaults(
        n_kv_heads=8,
        max_positions=524_288,
        attention_bias=True,
        attention_dropout=0.1,
        residual_dropout=0.1,
    ),
)


def _ernie4_5(f: Fields) -> Features:
    """Returns the fields of ERNIE 4.5: one switch for all biases, and pairs of adjacent
    dimensions are rotated."""
    biases = dict.fromkeys(("qkv_bias", "o_bias", "ffn_bias"), f.flag("use_bias"))
    head_dim = readers.head_dim_of(f, absent=128)
    return {"head_dim": head_dim, "rope_adjacent": True, "attn_dropout": 0.0, **biases}


ERNIE4_5 = Family(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    _ernie4_5,
    rows.HF_LLAMA,
    hf_defaults(
        n_kv_heads=2,
        max_positions=131_072,
        norm_eps=1e-5,
        tie_embeddings=True,
        rope_theta=500_000.0,
    ),
)

_POST_NORMS = {"pre_norm": False, "post_norm": True}


def _exaone4(f: Fields) -> Features:
    """Returns the fields of EXAONE 4; with windows, layers of full attention have no RoPE."""
    windowed = f.get("sliding_window") is not None
    kinds = readers.layer_types(f) or readers.periodic(
        f, f.integer("sliding_window_pattern")
    )
    return {
        "rope_index": tuple(
            -1 if windowed and kind == FULL_ATTENTION else 0 for kind in kinds
        ),
        "windows": readers.windows_of(f, kinds),
        "qk_norm": "head",
        **readers.one_rope(f),
        **_POST_NORMS,
    }


EXAONE4 = Family(
    "exaone4",
    "Exaone4ForCausalLM",
    _exaone4,
    rows.HF_OLMO2,
    hf_defaults(
        n_kv_heads=32, norm_eps=1e-5, sliding_window=4096, sliding_window_pattern=4
    ),
)


def _hunyuan(f: Fields) -> Features:
    """Returns the fields of Hunyuan; heads are normed after rotation."""
    features: Features = {"qk_norm": "rotated", **attention_bias(f)}
    rope = rope_fields(f)
    if rope.get("alpha") and (rope.get("rope_type") or rope.get("type")) == "dynamic":
        # Dynamic scaling with a fixed alpha is a larger base, for texts of any length.
        dim = readers.head_dim_of(f)
        theta = rope.number("rope_theta", default=f.number("rope_theta", default=1e4))
        theta *= rope.number("alpha") ** (dim / (dim - 2))
        features |= {"ropes": (RopeSpec(dim=dim, theta=theta),)}
    return features


HUNYUAN = Family(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    _hunyuan,
    rows.hf(
        rows.PRE_NORMS,
        rows.ATTENTION,
        {
            "attn/q_norm": "self_attn.query_layernorm",
            "attn/k_norm": "self_attn.key_layernorm",
        },
        rows.FFN,
    ),
    {"rms_norm_eps": 1e-5},
)


# ---------------------------------------------------------------- Mistral and Ministral 3

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    readers.same_window,
    rows.HF_LLAMA,
    {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    # llama.cpp's files do not tell Mistral from Llama.
    GGUF("llama", rows.GGUF_LLAMA, matches=lambda r: False),
    multimodal="mistral3",
)
_BETA = "llama_4_scaling_beta"
GROWTH = (_BETA, "max_position_embeddings")  # further parameters of RoPE


def _ministral3(f: Fields) -> Features:
    """Returns the RoPE of Ministral 3, the growth of its queries with position, and its window."""
    features = readers.one_rope(f, *GROWTH)
    (spec,) = features["ropes"]
    return features | query_growth(f, spec) | readers.same_window(f)


def query_growth(f: Fields, spec: RopeSpec) -> Features:
    """Returns the growth of Ministral 3's and Mistral 4's queries with position."""
    rope = rope_fields(f)
    growth = rope.number(_BETA, default=0.0, zero=True)
    if not growth:
        return {}
    # Queries grow from the original context; dynamic scaling starts at the model's context.
    if spec.kind in (*WITH_ORIGINAL, "longrope"):
        length = spec.max_positions
    elif rope.get(ORIGINAL) is not None:
        length = rope.integer(ORIGINAL, high=2**30)
    else:
        raise rope.error(_BETA, f"0 without {ORIGINAL}", growth)
    return {"query_growth": growth, "growth_length": length}


def _ministral3_settings(r: Metadata) -> dict[str, Any]:
    """Returns the fields of a GGUF file; without scaling it is a Mistral model."""
    scaling = r.scaling()
    if scaling is None:
        names = {"architectures": [MISTRAL.class_name], "model_type": MISTRAL.name}
        return names | {"sliding_window": None}
    scaling[_BETA] = r.get("attention.temperature_scale", float, 0.0)
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
    _BETA: 0.1,
}

MINISTRAL3 = Family(
    "ministral3",
    "Ministral3ForCausalLM",
    _ministral3,
    rows.HF_LLAMA,
    hf_defaults(
        n_kv_heads=8,
        head_dim=128,
        max_positions=262_144,
        norm_eps=1e-5,
        rope_parameters=_YARN,
    ),
    GGUF("mistral3", rows.GGUF_LLAMA, _ministral3_settings),
)


# ---------------------------------------------------------------- Qwen2 and Qwen3

QWEN = {
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32_768,
}


def _late_windows(f: Fields) -> Features:
    """Returns the windows of Qwen's layers starting at ``max_window_layers``."""
    first = f.integer("max_window_layers", low=0)
    return readers.optional_windows(f, lambda i: i >= first)


QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    lambda f: {"qkv_bias": True, **_late_windows(f)},
    rows.HF_LLAMA,
    QWEN,
    GGUF("qwen2", rows.GGUF_QWEN2),
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    lambda f: {"qk_norm": "head", **_late_windows(f), **attention_bias(f)},
    rows.hf(rows.PRE_NORMS, rows.ATTENTION, rows.FFN, rows.QK_NORMS),
    QWEN | {"head_dim": 128},
    GGUF(
        "qwen3",
        rows.gguf(rows.GGUF_PRE, rows.GGUF_ATTENTION, rows.GGUF_FFN, rows.GGUF_QK),
    ),
)


# ---------------------------------------------------------------- text models of Qwen-VL


def rope_with_axes(f: Fields, *, interleaved: bool) -> Features:
    """Returns a rotary embedding whose pairs rotate by time, row and column of image tokens."""
    default = (24, 20, 20) if interleaved else (16, 24, 24)
    axes = image_axes(f, readers.head_dim_of(f) // 2, default, interleaved=interleaved)
    further = ("mrope_section", "mrope_interleaved")
    rules = RopeRules(names=(("mrope", "default"),), defaults=f.defaults["rope"])
    specs, _ = read_ropes(f, readers.head_dim_of(f), None, further=further, rules=rules)
    return {"ropes": (replace(specs[0], axes=axes),)}


QWEN2_5_VL = Family(
    "qwen2_5_vl_text",
    "",
    lambda f: {
        "qkv_bias": True,
        **_late_windows(f),
        **rope_with_axes(f, interleaved=False),
    },
    rows.HF_LLAMA,
    QWEN
    | {"max_window_layers": 80, "rope": (("rope_theta", 1e6),)}
    | hf_defaults(
        vocab_size=152_064,
        d_model=8192,
        d_ff=29_568,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        norm_eps=1e-5,
    ),
)
QWEN_VL: dict[str, Any] = {"rope": (("rope_theta", 5e5),)}
QWEN_VL |= hf_defaults(vocab_size=151_936, max_positions=128_000)
QWEN3_VL = Family(
    "qwen3_vl_text",
    "",
    lambda f: {
        "qk_norm": "head",
        **rope_with_axes(f, interleaved=True),
        **attention_bias(f),
    },
    rows.hf(rows.PRE_NORMS, rows.ATTENTION, rows.FFN, rows.QK_NORMS),
    QWEN_VL
    | hf_defaults(
        d_model=4096,
        d_ff=22_016,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        head_dim=128,
    ),
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


def _granite(f: Fields) -> Features:
    """Returns biases and multipliers of Granite; logits are divided by ``logits_scaling``."""
    return {
        "ffn_bias": f.flag("mlp_bias"),
        "embed_scale": f.number("embedding_multiplier"),
        "residual_scale": f.number("residual_multiplier"),
        "query_scale": f.number("attention_multiplier"),
        "logit_scale": 1.0 / f.number("logits_scaling"),
        **attention_bias(f),
    }


GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    _granite,
    rows.HF_LLAMA,
    _GRANITE,
    GGUF(
        "granite",
        rows.GGUF_LLAMA,
        lambda r: {ours: r.get(theirs, float) for ours, theirs in _MULTIPLIERS.items()},
    ),
)


def _granite_swa(f: Fields) -> Features:
    """Returns the fields of Granite with windows, sinks and a base of RoPE for each layer.

    A base of 0 means no rotation.
    """
    n_layers = readers.layer_count(f)
    kinds = readers.layer_types(f) or [
        SLIDING if i % 4 else FULL_ATTENTION for i in range(n_layers)
    ]
    (spec,) = readers.one_rope(f)["ropes"]
    bases = (
        f.items("layer_rope_theta", n_layers, (int, float)) or [spec.theta] * n_layers
    )
    for base in bases:
        if base and not 1 < base < 1e30:
            raise f.error(
                "layer_rope_theta", "numbers above 1, or 0 for no rotation", base
            )
    distinct = sorted({float(base) for base in bases if base}) or [spec.theta]
    return {
        "ropes": tuple(replace(spec, theta=base) for base in distinct),
        "rope_index": tuple(distinct.index(base) if base else -1 for base in bases),
        "windows": readers.windows_of(f, kinds),
        "attn_sinks": True,
        **_granite(f),
    }


GRANITE_SWA = Family(
    "granite_swa",
    "GraniteSWAForCausalLM",
    _granite_swa,
    (*rows.HF_LLAMA, rows.HF_SINKS),
    _GRANITE
    | hf_defaults(
        n_kv_heads=4,
        max_positions=8192,
        norm_eps=1e-5,
        tie_embeddings=True,
        sliding_window=128,
    ),
)


# ---------------------------------------------------------------- OLMo

_GGUF = rows.gguf(rows.GGUF_POST, rows.GGUF_QK, rows.GGUF_ATTENTION, rows.GGUF_FFN)
_OLMO3_THETA = 500_000.0


def _olmo2(f: Fields) -> Features:
    """Returns the fields of OLMo 2, whose norms of queries and keys span all heads."""
    return {"qk_norm": "projection", **_POST_NORMS, **attention_bias(f)}


OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    _olmo2,
    rows.HF_OLMO2,
    {"rms_norm_eps": 1e-5},
    GGUF("olmo2", _GGUF, matches=lambda r: not r.has("attention.sliding_window")),
)


def _olmo3(f: Fields) -> Features:
    """Returns the fields of OLMo 3.

    Forms of the rotary parameters that releases of transformers read differently are refused.
    """
    kinds = readers.periodic(f, 4)
    parameters = f.mapping("rope_parameters")
    if common := sorted(parameters.keys() - {FULL_ATTENTION, SLIDING}):
        raise f.error(
            "rope_parameters",
            f"parameters for {FULL_ATTENTION!r} and {SLIDING!r}",
            ", ".join(common),
        )
    stated = all(
        "rope_theta" in (parameters.get(kind) or {})
        for kind in (FULL_ATTENTION, SLIDING)
    )
    theta = f.number("rope_theta", default=_OLMO3_THETA)
    if theta != _OLMO3_THETA and not stated:
        expected = (
            f"{_OLMO3_THETA:g}: releases of transformers read other values differently"
        )
        raise f.error(
            "rope_theta",
            expected,
            theta,
            "state it in rope_parameters for each kind of layer",
        )
    plain = {kind: {"rope_theta": _OLMO3_THETA} for kind in (FULL_ATTENTION, SLIDING)}
    ropes, index = read_ropes(f, readers.head_dim_of(f), kinds, plain)
    return {
        "ropes": ropes,
        "rope_index": index,
        "windows": readers.windows_of(f, kinds),
        **_olmo2(f),
    }


def _olmo3_settings(r: Metadata) -> dict[str, Any]:
    """Returns the fields of a GGUF file of OLMo 3."""
    slides = r.flags("attention.sliding_window_pattern", r.get("block_count", int))
    theta = {"rope_theta": r.get("rope.freq_base", float, 10_000.0)}
    return {
        "sliding_window": r.get("attention.sliding_window", int),
        "layer_types": [SLIDING if slide else FULL_ATTENTION for slide in slides],
        "rope_scaling": None,  # not for sliding layers, as in llama.cpp
        "rope_parameters": {
            SLIDING: {"rope_type": "default"} | theta,
            FULL_ATTENTION: (r.scaling() or {"rope_type": "default"}) | theta,
        },
    }


OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    _olmo3,
    rows.HF_OLMO2,
    {"rms_norm_eps": 1e-5, "sliding_window": 4096},
    GGUF("olmo2", _GGUF, _olmo3_settings, lambda r: r.has("attention.sliding_window")),
)
