"""Readers of each family's ``config.json``: one small function per ``model_type``.

Both forms are read: transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``).
Features that are not implemented raise an error that names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nalora_jax.errors import NaloraError
from nalora_jax.fields import Fields
from nalora_jax.method import activations
from nalora_jax.models import registered
from nalora_jax.models.config import GLOBAL_WINDOW, ModelConfig, reads_configs
from nalora_jax.models.registered import register_family as register_family
from nalora_jax.models.ropes import read_ropes
from nalora_jax.models.router import RouterSpec
from nalora_jax.models.shared_experts import SharedExperts
from nalora_jax.models.vision.sight import MULTIMODAL, read_sight, text_part

_SLIDING, _FULL = "sliding_attention", "full_attention"
_COMMON: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
# Nested text configs list only the differences from these defaults.
_GEMMA3: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}


@reads_configs
def read(raw: Mapping[str, Any], where: str, images: bool = False) -> ModelConfig:
    """Returns the `ModelConfig` of a parsed ``config.json``; see `ModelConfig.from_hf`."""
    if not isinstance(raw, Mapping):
        raise NaloraError(where, expected="a JSON object", found=type(raw).__name__)
    name = raw.get("model_type")
    if isinstance(name, str) and name in MULTIMODAL:  # the text model is one of its parts
        text = read(text_part(raw, where), f"{where}: text_config", False)
        return replace(text, sight=read_sight(raw, text, where)) if images else text
    if images:
        raise NaloraError(
            f"{where}: model_type",
            expected=f"a model that sees images: one of {', '.join(MULTIMODAL)}",
            found=repr(name),
            remedy="use such a model, or leave --vision.task (or --image) out",
        )
    if not isinstance(name, str) or (name not in _READERS and name not in registered.FAMILIES):
        raise NaloraError(f"{where}: model_type", expected=f"one of {', '.join(supported())}", found=repr(name))
    if name in _READERS:
        reader, defaults = _READERS[name]
    else:
        family = registered.FAMILIES.get(name)
        reader, defaults = family.reader, dict(family.defaults)
    fields = Fields(raw, _COMMON | defaults, where)
    for feature in ("use_bidirectional_attention", "output_router_logits", "router_jitter_noise"):
        fields.refuse(feature)
    fields.refuse("quantization_config", "load the unquantized model")
    config = reader(fields, name)
    _check(config, fields)
    return config


def supported() -> tuple[str, ...]:
    """Returns the supported values of ``model_type``."""
    return tuple(sorted({*_READERS, *registered.FAMILIES.names()}))


def base_config(f: Fields, name: str, **features: Any) -> ModelConfig:
    """Returns the config with the fields that all families share, updated with ``features``.

    The features are fields of `ModelConfig`.
    """
    heads = f.integer("num_attention_heads", high=2**16)
    d_model = f.integer("hidden_size")
    if f.get("head_dim") is None and d_model % heads:
        raise f.error("hidden_size", f"a multiple of num_attention_heads ({heads})", d_model)
    values: dict[str, Any] = {
        "model_type": name,
        "vocab_size": f.integer("vocab_size"),
        "d_model": d_model,
        "n_layers": f.integer("num_hidden_layers", high=2**10),
        "n_heads": heads,
        "n_kv_heads": f.integer("num_key_value_heads", high=2**16, default=heads),
        "head_dim": f.integer("head_dim", high=2**16, default=d_model // heads),
        "max_positions": f.integer("max_position_embeddings", high=2**30),
        "norm_eps": f.number("rms_norm_eps", zero=True),
        "tie_embeddings": f.flag("tie_word_embeddings"),
        "attn_dropout": f.number("attention_dropout", default=0.0, zero=True),
    }
    if "d_ff" not in features:
        values["d_ff"] = f.integer("intermediate_size")
    if "activation" not in features:
        values["activation"] = _activation(f, "hidden_act")
    values |= features
    if "ropes" not in values:
        ropes, index = read_ropes(f, values["head_dim"], _layer_types(f, values["n_layers"]))
        values |= {"ropes": ropes, "rope_index": index}
    return ModelConfig(**values)


def _activation(f: Fields, name: str) -> str:
    try:
        return activations.get(f.text(name)).name
    except NaloraError as error:
        raise f.error(name, error.expected, error.found) from error


def _check(config: ModelConfig, f: Fields) -> None:
    if config.n_heads % config.n_kv_heads:
        raise f.error("num_key_value_heads", f"a divisor of num_attention_heads ({config.n_heads})", config.n_kv_heads)
    if config.attn_dropout >= 1:
        raise f.error("attention_dropout", "a rate in [0, 1)", config.attn_dropout)
    if config.n_experts * config.n_layers > 2**16:
        raise f.error("num_experts", "at most 65,536 experts in all layers", config.n_experts * config.n_layers)
    if config.experts_per_token > config.n_experts:
        raise f.error("num_experts_per_tok", f"at most {config.n_experts} experts", config.experts_per_token)


def _attention_bias(f: Fields) -> dict[str, bool]:
    bias = f.flag("attention_bias")
    return {"qkv_bias": bias, "o_bias": bias}


# ---------------------------------------------------------------- windows


def _layer_types(f: Fields, n_layers: int) -> list[str] | None:
    kinds = f.items("layer_types", n_layers, str)
    for kind in kinds or ():
        if kind not in (_SLIDING, _FULL):
            raise f.error("layer_types", f"{_FULL!r} or {_SLIDING!r}", repr(kind))
    return kinds


def _windows(f: Fields, kinds: list[str]) -> tuple[int, ...]:
    """Returns the window of each layer from the layers' kinds."""
    if _SLIDING not in kinds:
        return ()
    window = f.integer("sliding_window", high=GLOBAL_WINDOW)
    return tuple(window if kind == _SLIDING else GLOBAL_WINDOW for kind in kinds)


def _same_window(f: Fields) -> tuple[int, ...]:
    """Returns one window for all layers, the only arrangement of these families in transformers."""
    n_layers = f.integer("num_hidden_layers", high=2**10)
    expected = _FULL if f.get("sliding_window") is None else _SLIDING
    kinds = _layer_types(f, n_layers) or [expected] * n_layers
    if set(kinds) != {expected}:
        raise f.error("layer_types", f"{expected!r} in every layer, as sliding_window says", sorted(set(kinds)))
    return _windows(f, kinds)


def _optional_windows(f: Fields, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """Returns the windows of families with the switch ``use_sliding_window``.

    ``slides`` tests whether a layer slides; ``layer_types`` takes precedence.
    """
    n_layers = f.integer("num_hidden_layers", high=2**10)
    on = f.flag("use_sliding_window") and f.get("sliding_window") is not None
    kinds = _layer_types(f, n_layers)
    if kinds is None:
        kinds = [_SLIDING if on and slides(i) else _FULL for i in range(n_layers)]
    if _SLIDING in kinds and not on:
        raise f.error("layer_types", "no sliding layers, as use_sliding_window says", _SLIDING)
    return _windows(f, kinds)


# ---------------------------------------------------------------- families


def _llama(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, ffn_bias=f.flag("mlp_bias"), **_attention_bias(f))


def _mistral(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, windows=_same_window(f))


def _qwen2(f: Fields, name: str) -> ModelConfig:
    first = f.integer("max_window_layers", low=0)
    return base_config(f, name, windows=_optional_windows(f, lambda i: i >= first), qkv_bias=True)


def _qwen3(f: Fields, name: str) -> ModelConfig:
    first = f.integer("max_window_layers", low=0)
    windows = _optional_windows(f, lambda i: i >= first)
    return base_config(f, name, windows=windows, qk_norm="head", **_attention_bias(f))


def _gemma(f: Fields, name: str) -> ModelConfig:
    activation = _activation(f, "hidden_act" if f.get("hidden_activation") is None else "hidden_activation")
    if activation == "gelu":  # the first releases wrote "gelu" and meant the tanh form
        activation = _activation(Fields({}, _GELU, f.where), "hidden_act")
    return base_config(f, name, activation=activation, **_gemma_traits(f), **_attention_bias(f))


def _gemma_traits(f: Fields) -> dict[str, float]:
    return {"norm_offset": 1.0, "embed_scale": f.integer("hidden_size") ** 0.5}


def _gemma2(f: Fields, name: str) -> ModelConfig:
    return base_config(
        f,
        name,
        activation=_activation(f, "hidden_activation"),
        windows=_gemma_windows(f, 2),
        post_norm=True,
        query_scale=f.number("query_pre_attn_scalar") ** -0.5,
        attn_softcap=f.number("attn_logit_softcapping", default=0.0, zero=True),
        final_softcap=f.number("final_logit_softcapping", default=0.0, zero=True),
        **_gemma_traits(f),
        **_attention_bias(f),
    )


def _gemma3(f: Fields, name: str) -> ModelConfig:
    f.refuse("attn_logit_softcapping")
    pattern = f.integer("sliding_window_pattern", default=f.integer("_sliding_window_pattern", default=6))
    n_layers = f.integer("num_hidden_layers", high=2**10)
    kinds = _layer_types(f, n_layers) or _alternating(n_layers, pattern)
    local = {_SLIDING: {"rope_theta": f.number("rope_local_base_freq", default=10_000.0)}}
    ropes, index = read_ropes(f, f.integer("head_dim", high=2**16), kinds, {_FULL: {"rope_theta": 1e6}} | local)
    return base_config(
        f,
        name,
        activation=_activation(f, "hidden_activation"),
        ropes=ropes,
        rope_index=index,
        windows=_gemma_windows(f, pattern),
        qk_norm="head",
        post_norm=True,
        query_scale=f.number("query_pre_attn_scalar") ** -0.5,
        final_softcap=f.number("final_logit_softcapping", default=0.0, zero=True),
        **_gemma_traits(f),
        **_attention_bias(f),
    )


def _alternating(n_layers: int, pattern: int) -> list[str]:
    return [_FULL if (i + 1) % pattern == 0 else _SLIDING for i in range(n_layers)]


def _gemma_windows(f: Fields, pattern: int) -> tuple[int, ...]:
    n_layers = f.integer("num_hidden_layers", high=2**10)
    return _windows(f, _layer_types(f, n_layers) or _alternating(n_layers, pattern))


def _phi3(f: Fields, name: str) -> ModelConfig:
    for feature in ("resid_pdrop", "embd_pdrop"):
        f.refuse(feature, "set it to 0: only attention and adapter dropout exist")
    return base_config(f, name, windows=_same_window(f))


def _olmo2(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, qk_norm="projection", pre_norm=False, post_norm=True, **_attention_bias(f))


def _smollm3(f: Fields, name: str) -> ModelConfig:
    n_layers = f.integer("num_hidden_layers", high=2**10)
    interval = f.integer("no_rope_layer_interval")
    rotates = f.items("no_rope_layers", n_layers, int, longer=True)
    if rotates is None:
        rotates = [(i + 1) % interval != 0 for i in range(n_layers)]
    ropes, _ = read_ropes(f, _head_dim(f), _layer_types(f, n_layers))
    return base_config(
        f,
        name,
        ropes=ropes,
        rope_index=tuple(0 if rotate else -1 for rotate in rotates),
        windows=_optional_windows(f, lambda i: not rotates[i]),
        ffn_bias=f.flag("mlp_bias"),
        **_attention_bias(f),
    )


def _head_dim(f: Fields) -> int:
    heads = f.integer("num_attention_heads", high=2**16)
    return f.integer("head_dim", high=2**16, default=f.integer("hidden_size") // heads)


def _granite(f: Fields, name: str) -> ModelConfig:
    return base_config(
        f,
        name,
        ffn_bias=f.flag("mlp_bias"),
        embed_scale=f.number("embedding_multiplier"),
        residual_scale=f.number("residual_multiplier"),
        query_scale=f.number("attention_multiplier"),
        logit_scale=1.0 / f.number("logits_scaling"),
        **_attention_bias(f),
    )


def _mixtral(f: Fields, name: str) -> ModelConfig:
    return base_config(
        f,
        name,
        windows=_same_window(f),
        n_experts=f.integer("num_local_experts", high=2**12),
        experts_per_token=f.integer("num_experts_per_tok", high=2**12),
    )


def _qwen3_moe(f: Fields, name: str) -> ModelConfig:
    return base_config(
        f,
        name,
        windows=_optional_windows(f, lambda _: True),
        qk_norm="head",
        norm_topk=f.flag("norm_topk_prob"),
        **_qwen_experts(f),
        **_attention_bias(f),
    )


def _qwen2_moe(f: Fields, name: str) -> ModelConfig:
    first = f.integer("max_window_layers", low=0)
    router = RouterSpec(normalize=f.flag("norm_topk_prob"))
    return base_config(
        f,
        name,
        windows=_optional_windows(f, lambda i: i % 2 == 0 and i < first),
        qkv_bias=f.flag("qkv_bias"),
        ffn=SharedExperts(f.integer("shared_expert_intermediate_size"), router, gated=True),
        **_qwen_experts(f),
    )


def _qwen_experts(f: Fields) -> dict[str, Any]:
    n_layers, step = f.integer("num_hidden_layers", high=2**10), f.integer("decoder_sparse_step")
    listed = f.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < n_layers for i in listed):
        raise f.error("mlp_only_layers", f"numbers of layers from 0 to {n_layers - 1}", repr(listed)[:60])
    n_experts = f.integer(_first_present(f, "num_experts", "num_local_experts"), high=2**12)
    return _experts(f, n_experts, [i in listed or (i + 1) % step != 0 for i in range(n_layers)])


def _experts(f: Fields, n_experts: int, dense: Sequence[bool]) -> dict[str, Any]:
    """Returns the fields of mixtures in all layers but those that ``dense`` marks."""
    fields = {
        "d_ff": f.integer("moe_intermediate_size"),
        "n_experts": n_experts,
        "experts_per_token": f.integer("num_experts_per_tok", high=2**12),
    }
    if not any(dense):
        return fields
    d_ff = f.integer("intermediate_size")
    kind = (("d_ff", d_ff), ("n_experts", 0), ("experts_per_token", 0), ("ffn", None))
    return fields | {"kinds": ((), kind), "layer_kinds": tuple(int(d) for d in dense)}


def _glm4_moe(f: Fields, name: str) -> ModelConfig:
    n_layers = f.integer("num_hidden_layers", high=2**10)
    mtp = f.integer(_first_present(f, "num_nextn_predict_layers", "num_mtp_layers"), low=0, default=1)
    if mtp > 1:  # `keytables` leaves out one layer
        raise f.error("num_nextn_predict_layers", "0 or 1: a layer that predicts further tokens is not loaded", mtp)
    first = f.integer("first_k_dense_replace", low=0, high=2**10)
    n_experts = f.integer(_first_present(f, "n_routed_experts", "num_local_experts"), high=2**12)
    d_shared = f.integer("n_shared_experts", high=2**10) * f.integer("moe_intermediate_size")
    return base_config(
        f,
        name,
        qkv_bias=f.flag("attention_bias"),
        qk_norm="head" if f.flag("use_qk_norm") else "",
        ffn=SharedExperts(d_shared, _sigmoid_router(f, n_experts)),
        **_experts(f, n_experts, [i < first for i in range(n_layers)]),
    )


def _sigmoid_router(f: Fields, n_experts: int) -> RouterSpec:
    groups, top_k = f.integer("n_group", high=2**12), f.integer("num_experts_per_tok", high=2**12)
    if n_experts % groups or n_experts // groups < 2:
        raise f.error("n_group", f"equal groups of 2 or more of the {n_experts} experts", groups)
    kept = f.integer("topk_group", high=2**12)
    if kept > groups or kept * (n_experts // groups) < top_k:
        raise f.error("topk_group", f"at most {groups} groups that hold num_experts_per_tok ({top_k}) experts", kept)
    scale = f.number("routed_scaling_factor")
    return RouterSpec("sigmoid", f.flag("norm_topk_prob"), True, groups, kept, scale)


def _first_present(f: Fields, *names: str) -> str:
    """Returns the first of a field's names in the file; transformers 5 renamed some fields."""
    return next((name for name in names if f.get(name) is not None), names[0])


_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_QWEN = {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32_768}

_READERS: dict[str, tuple[Callable[[Fields, str], ModelConfig], dict[str, Any]]] = {
    "llama": (_llama, {}),
    "mistral": (
        _mistral,
        {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    ),
    "qwen2": (_qwen2, _QWEN),
    "qwen3": (_qwen3, _QWEN | {"head_dim": 128}),
    "gemma": (_gemma, _GEMMA | {"hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192}),
    "gemma2": (
        _gemma2,
        _GEMMA
        | _GELU
        | {"max_position_embeddings": 8192, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    ),
    "gemma3_text": (_gemma3, _GEMMA | _GELU | _GEMMA3),
    "phi3": (_phi3, {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}),
    "olmo2": (_olmo2, {"rms_norm_eps": 1e-5}),
    "smollm3": (
        _smollm3,
        {
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "max_position_embeddings": 32_768,
        },
    ),
    "granite": (
        _granite,
        {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0},
    ),
    "mixtral": (
        _mixtral,
        {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131_072,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": (
        _qwen3_moe,
        _QWEN
        | {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
        },
    ),
    "qwen2_moe": (
        _qwen2_moe,
        _QWEN
        | {
            "num_key_value_heads": 16,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "decoder_sparse_step": 1,
            "qkv_bias": True,
        },
    ),
    "glm4_moe": (
        _glm4_moe,
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
        },
    ),
}

registered.RESERVED.update(_READERS)
