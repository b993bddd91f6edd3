"""Readers of each family's ``config.json``: one small function per ``model_type``.

Both forms are read: transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``).
Features that are not implemented raise an error that names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nalora_jax.errors import NaloraError
from nalora_jax.fields import Fields
from nalora_jax.method import activations
from nalora_jax.models import registered
from nalora_jax.models.config import GLOBAL_WINDOW, ModelConfig, reads_configs
from nalora_jax.models.gated_delta_net import GatedDeltaNet
from nalora_jax.models.registered import register_family as register_family
from nalora_jax.models.ropes import read_ropes
from nalora_jax.models.vision.sight import MULTIMODAL, contains_text_model, read_sight, text_part

_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"
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
    if contains_text_model(name, images=images):  # the text model is one of its parts
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
    f.refuse("mlp_only_layers", "blocks of different shapes cannot be stacked")
    step = f.integer("decoder_sparse_step")
    if step != 1:
        raise f.error("decoder_sparse_step", "1: a mixture in every layer", step)
    return base_config(
        f,
        name,
        d_ff=f.integer("moe_intermediate_size"),
        windows=_optional_windows(f, lambda _: True),
        qk_norm="head",
        n_experts=f.integer(_first_present(f, "num_experts", "num_local_experts"), high=2**12),
        experts_per_token=f.integer("num_experts_per_tok", high=2**12),
        norm_topk=f.flag("norm_topk_prob"),
        **_attention_bias(f),
    )


def _qwen3_5(f: Fields, name: str) -> ModelConfig:
    return base_config(f, name, **_hybrid_traits(f))


def _hybrid_traits(f: Fields) -> dict[str, Any]:
    """Returns the fields of layers of gated attention and of Gated DeltaNet."""
    if f.get("attn_output_gate") is False:
        raise f.error("attn_output_gate", "true: attention of this family has output gates", False)
    n_layers = f.integer("num_hidden_layers", high=2**10)
    kinds = f.items("layer_types", n_layers, str)
    if kinds is None:
        interval = f.integer("full_attention_interval")
        kinds = [_LINEAR if (i + 1) % interval else _FULL for i in range(n_layers)]
    if unknown := set(kinds) - {_FULL, _LINEAR}:
        raise f.error("layer_types", f"{_FULL!r} or {_LINEAR!r}", repr(min(unknown)))
    ropes, _ = read_ropes(f, f.integer("head_dim", high=2**16), None)
    return {
        "ropes": ropes,
        "qk_norm": "head",
        "norm_offset": 1.0,
        "attn_gate": True,
        "kinds": ((), (("mixer", _delta_net(f)),)),
        "layer_kinds": tuple(int(kind == _LINEAR) for kind in kinds),
        **_attention_bias(f),
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


def _first_present(f: Fields, *names: str) -> str:
    """Returns the first of a field's names in the file; transformers 5 renamed some fields."""
    return next((name for name in names if f.get(name) is not None), names[0])


_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_QWEN = {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32_768}

_HYBRID = {
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
    "qwen3_5_text": (_qwen3_5, _QWEN3_5),
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
}

registered.RESERVED.update(_READERS)
