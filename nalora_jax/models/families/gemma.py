"""Gemma 1 to 4: norms of 1 + w, scaled embeddings, windows.

Layers of Gemma 4: sliding and full layers differ in head size, key/value heads and RoPE; in full
layers the values may be the unnormalized keys. Every layer ends in a scale of the residual stream.
In small models every layer has embeddings of the tokens, and the last layers read keys and values
of earlier layers; in mixtures every layer adds experts to its gated block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.models import readers
from nalora_jax.models import tensor_rows as rows
from nalora_jax.models.attention_layer import NormedAttention
from nalora_jax.models.blocks import ScaledTail
from nalora_jax.models.embedding import LayerEmbeddings
from nalora_jax.models.family import GGUF, Family, Features, Metadata, hf_defaults
from nalora_jax.models.moe import DenseAndExperts
from nalora_jax.models.readers import (
    FULL_ATTENTION,
    SLIDING,
    Overrides,
    activation_name,
    attention_bias,
)
from nalora_jax.models.ropes import RopeSpec, read_ropes

_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_DEFAULTS = hf_defaults(
    head_dim=256, tie_embeddings=True, query_pre_attn_scalar=256, sliding_window=4096
)


def _gguf(*norms: rows.Modules) -> rows.Rows:
    """Returns llama.cpp's names; its files store 1 + w."""
    return rows.gguf(*norms, rows.GGUF_ATTENTION, rows.GGUF_FFN, norm="minus_one")


def _query_scalar(r: Metadata, *, largest: int) -> int:
    """Returns query_pre_attn_scalar, which is not stored.

    llama.cpp uses the head's width or, in the family's 27B model, the model's width per head.
    """
    if r.get("block_count", int) == largest:
        return int(r.get("embedding_length", int) // r.get("attention.head_count", int))
    return int(r.get("attention.key_length", int))


def _gemma(f: Fields) -> Features:
    """Returns the fields of Gemma."""
    activation = activation_name(
        f, readers.first_present(f, "hidden_activation", "hidden_act")
    )
    if activation == "gelu":  # the first releases wrote "gelu" and meant the tanh form
        activation = activation_name(Fields({}, _GELU, f.where), "hidden_act")
    return {"activation": activation, **_traits(f)}


def _traits(f: Fields) -> Features:
    """Returns what Gemma 1 to 3 have in common."""
    scale = f.integer("hidden_size") ** 0.5
    return {"norm_offset": 1.0, "embed_scale": scale, **attention_bias(f)}


GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    _gemma,
    rows.HF_LLAMA,
    _DEFAULTS | {"hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192},
    GGUF("gemma", _gguf(rows.GGUF_PRE)),
)


def _later_traits(f: Fields) -> Features:
    """Returns what Gemma 2 and 3 have in common."""
    return {
        "activation": activation_name(f, "hidden_activation"),
        "post_norm": True,
        "query_scale": f.number("query_pre_attn_scalar") ** -0.5,
        "final_softcap": f.number("final_logit_softcapping", default=0.0, zero=True),
        **_traits(f),
    }


def _gemma2(f: Fields) -> Features:
    """Returns the fields of Gemma 2, in which every other layer slides."""
    softcap = f.number("attn_logit_softcapping", default=0.0, zero=True)
    windows = readers.windows_of(f, readers.periodic(f, 2))
    return {"windows": windows, "attn_softcap": softcap, **_later_traits(f)}


GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    _gemma2,
    rows.hf(rows.FOUR_NORMS, rows.ATTENTION, rows.FFN),
    _DEFAULTS
    | _GELU
    | hf_defaults(
        max_positions=8192, final_logit_softcapping=30.0, attn_logit_softcapping=50.0
    ),
    GGUF(
        "gemma2",
        _gguf(rows.GGUF_PRE, rows.GGUF_POST),
        lambda r: {
            "sliding_window": r.get("attention.sliding_window", int, 4096),
            "query_pre_attn_scalar": _query_scalar(r, largest=46),
            "attn_logit_softcapping": r.get("attn_logit_softcapping", float, 50.0),
            "final_logit_softcapping": r.get("final_logit_softcapping", float, 30.0),
        },
    ),
)


def _gemma3(f: Fields) -> Features:
    """Returns the fields of Gemma 3; full and sliding layers have separate RoPE tables."""
    f.refuse("attn_logit_softcapping")
    pattern = f.integer(
        "sliding_window_pattern",
        default=f.integer("_sliding_window_pattern", default=6),
    )
    kinds = readers.periodic(f, pattern)
    thetas = {
        FULL_ATTENTION: 1e6,
        SLIDING: f.number("rope_local_base_freq", default=10_000.0),
    }
    defaults = {kind: {"rope_theta": theta} for kind, theta in thetas.items()}
    ropes, index = read_ropes(f, f.integer("head_dim", high=2**16), kinds, defaults)
    windows = readers.windows_of(f, kinds)
    own = {"ropes": ropes, "rope_index": index, "windows": windows, "qk_norm": "head"}
    return own | _later_traits(f)


GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _gemma3,
    rows.hf(rows.FOUR_NORMS, rows.ATTENTION, rows.QK_NORMS, rows.FFN),
    # Nested text configs list only the differences from these defaults.
    _DEFAULTS
    | _GELU
    | hf_defaults(
        vocab_size=262_208,
        d_model=2304,
        d_ff=9216,
        n_layers=26,
        n_heads=8,
        n_kv_heads=4,
        max_positions=131_072,
    ),
    GGUF(
        "gemma3",
        _gguf(rows.GGUF_PRE, rows.GGUF_POST, rows.GGUF_QK),
        lambda r: {
            "sliding_window": r.get("attention.sliding_window", int),
            "rope_local_base_freq": r.get("rope.freq_base_swa", float, 10_000.0),
            "query_pre_attn_scalar": _query_scalar(r, largest=62),
        },
    ),
)


# ---------------------------------------------------------------- Gemma 4

_UNIFIED: dict[str, Any] = hf_defaults(
    vocab_size=262_144,
    d_model=2304,
    d_ff=9216,
    n_layers=30,
    n_heads=8,
    n_kv_heads=4,
    head_dim=256,
    global_head_dim=512,
    hidden_activation="gelu_pytorch_tanh",
    max_positions=262_144,
    tie_embeddings=True,
    sliding_window=1024,
)
_GEMMA4 = _UNIFIED | hf_defaults(
    max_positions=131_072,
    sliding_window=512,
    hidden_size_per_layer_input=256,
    vocab_size_per_layer_input=262_144,
)
_ROPES: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL_ATTENTION: {
        "rope_type": "proportional",
        "rope_theta": 1_000_000.0,
        "partial_rotary_factor": 0.25,
    },
}
_ROPE_TYPES = ("default", "linear", "proportional")


def _unified(f: Fields) -> Features:
    """Returns the fields of unified Gemma 4, which has no embeddings by layer and no experts."""
    for feature in ("hidden_size_per_layer_input", "enable_moe_block"):
        f.refuse(feature, "this family has no such layers")
    return _gemma4(f)


def _gemma4(f: Fields) -> Features:
    """Returns the fields of Gemma 4; those in ``kinds`` differ by layer."""
    # which is of image tokens only
    if f.get("use_bidirectional_attention") != "vision":
        f.refuse("use_bidirectional_attention")
    for field in (
        "rope_theta",
        "rope_scaling",
        "rope_local_base_freq",
        "partial_rotary_factor",
    ):
        f.refuse(field, "rotary embeddings are read from rope_parameters")
    types = readers.layer_types(f) or [*readers.periodic(f, 6)[:-1], FULL_ATTENTION]
    if types[-1] != FULL_ATTENTION:
        raise f.error(
            "layer_types", f"{FULL_ATTENTION!r} in the last layer", repr(types[-1])
        )
    layers = _layers(f, types)
    kinds = tuple(dict.fromkeys(layers))
    return {
        **dict(kinds[0]),
        "kinds": kinds,
        "layer_kinds": tuple(kinds.index(layer) for layer in layers),
        "activation": activation_name(f, "hidden_activation"),
        "windows": readers.windows_of(f, types),
        "qk_norm": "head",
        "post_norm": True,
        "query_scale": 1.0,
        "embed_scale": f.integer("hidden_size") ** 0.5,
        "final_softcap": f.number("final_logit_softcapping", default=0.0, zero=True),
        **_layer_embeddings(f),
        **_experts(f),
        **attention_bias(f),
    }


def _layer_embeddings(f: Fields) -> Features:
    """Returns the tail of every layer and, with a width per layer, the table that it reads."""
    width = f.integer("hidden_size_per_layer_input", low=0, default=0)
    if not width:
        return {"tail": ScaledTail()}
    rows_of_table = f.integer("vocab_size_per_layer_input")
    vocabulary = f.integer("vocab_size")
    if rows_of_table < vocabulary:
        raise f.error(
            "vocab_size_per_layer_input",
            f"vocab_size ({vocabulary}) or more",
            rows_of_table,
        )
    return {
        "tail": ScaledTail(width),
        "layer_embeddings": LayerEmbeddings(rows_of_table, width),
    }


def _layers(f: Fields, types: Sequence[str]) -> list[Overrides]:
    """Returns the fields of `ModelConfig` that depend on a layer's type and on its keys, by layer.

    The last layers read the keys and values of the last layer before them that has their type.
    """
    of_type = {kind: _features(f, kind, types) for kind in sorted(set(types))}
    reading = f.integer("num_kv_shared_layers", low=0, high=2**10, default=0)
    first = len(types) - reading
    d_ff = f.integer("intermediate_size")
    if reading and set(types[: max(first, 0)]) != set(types):
        expected = "a layer of every type before the layers without keys"
        raise f.error("num_kv_shared_layers", expected, reading)
    # The last layer with keys of each type hands them on; the dict keeps the last of several.
    last = {kind: layer for layer, kind in enumerate(types[:first])}
    handing = {layer: kind for kind, layer in last.items()} if reading else {}
    layers = []
    for layer, kind in enumerate(types):
        keys_as_values = f.flag("attention_k_eq_v") and kind == FULL_ATTENTION
        mixer = NormedAttention(keys_as_values, hands=handing.get(layer, ""))
        width = d_ff
        if layer >= first:
            mixer = NormedAttention(reads=kind)
            width *= 1 + f.flag("use_double_wide_mlp")
        layers.append((*of_type[kind], ("mixer", mixer), *_feed_forward(f, width)))
    return layers


def _feed_forward(f: Fields, width: int) -> Overrides:
    """Returns the fields of a gated block of ``width`` channels, and of any experts."""
    if not f.flag("enable_moe_block"):
        return (("d_ff", width),)
    return ("d_ff", f.integer("moe_intermediate_size")), ("ffn", DenseAndExperts(width))


def _experts(f: Fields) -> dict[str, int]:
    """Returns the numbers of experts and of experts per token; none without
    ``enable_moe_block``."""
    if not f.flag("enable_moe_block"):
        return {}
    n_experts = f.integer("num_experts", high=2**12)
    chosen = f.integer("top_k_experts", high=2**12)
    if chosen > n_experts:
        raise f.error("top_k_experts", f"at most {n_experts} experts", chosen)
    return {"n_experts": n_experts, "experts_per_token": chosen}


def _features(f: Fields, kind: str, types: Sequence[str]) -> Overrides:
    """Returns head size, key/value heads and RoPE of the layers of a type.

    Released files have fields for full layers (``global_head_dim``), files that transformers wrote
    list layers that differ (``per_layer_config``).
    """
    head_dim = f.integer("head_dim", high=2**16)
    heads = f.integer("num_attention_heads", high=2**16)
    kv_heads = f.integer("num_key_value_heads", high=2**16, default=heads)
    if f.get("per_layer_config") is not None:
        head_dim, kv_heads = _listed_heads(f, kind, types, head_dim, kv_heads)
    elif kind == FULL_ATTENTION:
        head_dim = f.integer("global_head_dim", high=2**16)
        if f.flag("attention_k_eq_v"):
            kv_heads = f.integer(
                "num_global_key_value_heads", high=2**16, default=kv_heads
            )
    if heads % kv_heads:
        raise f.error(
            f"key/value heads of {kind}",
            f"a divisor of num_attention_heads ({heads})",
            kv_heads,
        )
    return (
        ("head_dim", head_dim),
        ("n_kv_heads", kv_heads),
        ("ropes", _ropes(f, kind, head_dim)),
    )


def _listed_heads(
    f: Fields, kind: str, types: Sequence[str], head_dim: int, kv_heads: int
) -> tuple[int, int]:
    """Returns head size and number of key/value heads of a layer type from ``per_layer_config``.

    The arguments are the defaults. All layers of a type must have the same entry.
    """
    # transformers writes "05" for layer 5 of ten and more
    listed = {
        name.lstrip("0") or "0": entry
        for name, entry in f.mapping("per_layer_config").items()
    }
    unknown = listed.keys() - {str(layer) for layer in range(len(types))}
    if unknown:
        raise f.error(
            "per_layer_config",
            f"layers from 0 to {len(types) - 1}",
            ", ".join(sorted(unknown)),
        )
    entries = [
        listed.get(str(layer), {})
        for layer, of_layer in enumerate(types)
        if of_layer == kind
    ]
    if not isinstance(entries[0], dict) or any(
        entry != entries[0] for entry in entries
    ):
        expected = f"one JSON object for all layers of type {kind}"
        raise f.error("per_layer_config", expected, str(entries)[:60])
    entry = Fields(entries[0], {}, f"{f.where}: per_layer_config")
    for key in sorted(entries[0].keys() - {"head_dim", "num_key_value_heads"}):
        entry.refuse(key)
    return (
        entry.integer("head_dim", high=2**16, default=head_dim),
        entry.integer("num_key_value_heads", high=2**16, default=kv_heads),
    )


def _ropes(f: Fields, kind: str, head_dim: int) -> tuple[RopeSpec, ...]:
    """Returns the RoPE of a layer type: its entry of ``rope_parameters``, or the family's
    default."""
    parameters = f.mapping("rope_parameters")
    if unknown := parameters.keys() - _ROPES.keys():
        expected = f"one JSON object for {SLIDING} and one for {FULL_ATTENTION}"
        raise f.error("rope_parameters", expected, ", ".join(sorted(unknown)))
    if parameters and kind not in parameters:
        raise f.error("rope_parameters", f"an entry for {kind}", ", ".join(parameters))
    specs, _ = read_ropes(f, head_dim, [kind], {} if parameters else _ROPES)
    if specs[0].kind not in _ROPE_TYPES:
        expected = f"one of {', '.join(_ROPE_TYPES)}"
        raise f.error(f"rope_parameters: {kind}: rope_type", expected, specs[0].kind)
    return specs


_COMMON: dict[str, Any] = {
    "tensors": (
        *rows.hf(rows.FOUR_NORMS, rows.ATTENTION, rows.QK_NORMS, rows.FFN),
        *rows.hf_modules(
            {f"ffn/dense_ffn/{name}": f"mlp.{name}" for name in rows.GATED}
        ),
        rows.hf_row(
            "experts.gate_up_proj",
            "ffn/experts_ffn/gate_proj/kernel",
            "ffn/experts_ffn/up_proj/kernel",
            change="transpose",
        ),
        rows.hf_row(
            "experts.down_proj", "ffn/experts_ffn/down_proj/kernel", change="transpose"
        ),
        rows.hf_row("router.scale", "ffn/router_norm/scale"),
        rows.hf_row("router.per_expert_scale", "ffn/experts_ffn/router/scale"),
        rows.hf_row("layer_scalar", "tail/scale"),
        *rows.hf_modules(
            {
                "ffn/experts_ffn/router": "router.proj",
                "ffn/dense_norm": "post_feedforward_layernorm_1",
                "ffn/experts_norm": "pre_feedforward_layernorm_2",
                "ffn/experts_post_norm": "post_feedforward_layernorm_2",
                "tail/norm": "post_per_layer_input_norm",
                "tail/gate_proj": "per_layer_input_gate",
                "tail/down_proj": "per_layer_projection",
            }
        ),
        rows.TensorRow(
            "model.embed_tokens_per_layer.weight", ("layer_embeddings/embedding",)
        ),
        rows.TensorRow(
            "model.per_layer_model_projection.weight",
            ("layer_embeddings/projection/kernel",),
            "transpose",
        ),
        rows.TensorRow(
            "model.per_layer_projection_norm.weight", ("layer_embeddings/norm/scale",)
        ),
    ),
    "checks": ("use_bidirectional_attention",),
    # Towers of images and sounds.
    "ignored": (r"^model\.(audio_tower|embed_(vision|audio)|vision_embedder)\.",),
}
GEMMA4 = Family(
    "gemma4_text",
    "Gemma4ForCausalLM",
    _gemma4,
    defaults=_GEMMA4,
    multimodal="gemma4",
    **_COMMON,
)
GEMMA4_UNIFIED = Family(
    "gemma4_unified_text",
    "Gemma4UnifiedForCausalLM",
    _unified,
    defaults=_UNIFIED,
    multimodal="gemma4_unified",
    **_COMMON,
)
