"""LFM2: gated short convolutions and attention, with dense layers or with experts."""

from __future__ import annotations

from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.record import Family
from nalora_jax.models.families.shared import (
    FULL,
    Overrides,
    base_config,
    dense_layer,
    fields_of_layers,
    first_present,
    head_dim_of,
)
from nalora_jax.models.families.tensors import hf_dense, hf_ends, hf_experts, hf_norms, hf_row
from nalora_jax.models.moe import Mixture
from nalora_jax.models.ropes import read_ropes
from nalora_jax.models.routing import RouterSpec
from nalora_jax.models.short_convolution import ShortConvolution

_CONV = "conv"
_FFN = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_MIXERS = (
    *hf_ends("embedding_norm"),
    *hf_norms({"attn_norm": "operator_norm", "ffn_norm": "ffn_norm"}),
    *hf_norms({"attn/q_norm": "self_attn.q_layernorm", "attn/k_norm": "self_attn.k_layernorm"}),
    *hf_dense(
        "self_attn", "attn", {f"{name}_proj": f"{name}_proj" for name in "qkv"} | {"o_proj": "out_proj"}
    ),
    *hf_dense("conv", "conv", {"bcx_proj": "in_proj", "o_proj": "out_proj"}),
    hf_row("conv.conv.weight", "conv/taps"),
    hf_row("conv.conv.bias", "conv/taps_bias"),
)
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "conv_L_cache": 3,
}


def _base(f: Fields, name: str, **features: Any) -> ModelConfig:
    return base_config(
        f,
        name,
        activation="silu",
        norm_eps=f.number("norm_eps", zero=True),
        tie_embeddings=f.flag(first_present(f, "tie_embedding", "tie_word_embeddings")),
        ropes=read_ropes(f, head_dim_of(f), None)[0],
        qk_norm="head",
        attn_dropout=0.0,
        **features,
    )


def _mixers(f: Fields) -> list[Overrides]:
    """Returns the fields of attention and of convolutions, by layer."""
    n_layers = f.integer("num_hidden_layers", high=2**10)
    attending = f.get("full_attn_idxs")
    if attending is not None and not (
        isinstance(attending, list) and set(attending) <= set(range(n_layers))
    ):
        raise f.error("full_attn_idxs", f"a list of layers below {n_layers}", repr(attending)[:60])
    names = f.items("layer_types", n_layers, str)
    if names is None:
        names = [FULL if attending is None or i in attending else _CONV for i in range(n_layers)]
    unknown = sorted(set(names) - {FULL, _CONV})
    if unknown:
        raise f.error("layer_types", f"{FULL!r} or {_CONV!r}", repr(unknown[0]))
    mixer = ShortConvolution(f.integer("conv_L_cache", low=2, high=2**8), f.flag("conv_bias"))
    return [(("mixer", mixer),) if name == _CONV else () for name in names]


def _lfm2(f: Fields, name: str) -> ModelConfig:
    # Variants that the released files could name and that transformers does not have.
    for field in ("block_use_swiglu", "use_pos_enc"):
        if f.get(field) is False:
            raise f.error(field, "true", "false")
    d_model = f.integer("hidden_size")
    for field in ("block_dim", "conv_dim", "conv_dim_out"):
        if f.get(field) not in (None, d_model):
            raise f.error(field, f"hidden_size ({d_model})", f.get(field))
    return _base(f, name, d_ff=_width(f), **fields_of_layers(_mixers(f)))


def _width(f: Fields) -> int:
    """Returns the channels of the feed-forward block, by default two thirds of its field."""
    width = f.integer(first_present(f, "block_ff_dim", "intermediate_size"))
    if not f.flag("block_auto_adjust_ff_dim"):
        return width
    multiple = f.integer("block_multiple_of")
    width = int(f.number("block_ffn_dim_multiplier") * int(2 * width / 3))
    return multiple * -(-width // multiple)


LFM2 = Family(
    "lfm2",
    "Lfm2ForCausalLM",
    _lfm2,
    (*_MIXERS, *hf_dense("feed_forward", "ffn", _FFN)),
    _DEFAULTS
    | {
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
)


def _lfm2_moe(f: Fields, name: str) -> ModelConfig:
    mixers, n_dense = _mixers(f), f.integer("num_dense_layers", low=0, high=2**10)
    dense = dense_layer(f.integer("intermediate_size"))
    scale, normalize = f.number("routed_scaling_factor"), f.flag("norm_topk_prob")
    features = {
        "d_ff": f.integer("moe_intermediate_size"),
        "n_experts": f.integer("num_experts", high=2**12),
        "experts_per_token": f.integer("num_experts_per_tok", high=2**12),
        "ffn": Mixture(RouterSpec("sigmoid", normalize, f.flag("use_expert_bias"), scale=scale)),
    }
    layers = [(*mixer, *dense) if i < n_dense else mixer for i, mixer in enumerate(mixers)]
    return _base(f, name, **(features | fields_of_layers(layers)))


LFM2_MOE = Family(
    "lfm2_moe",
    "Lfm2MoeForCausalLM",
    _lfm2_moe,
    (
        *_MIXERS,
        *hf_dense("feed_forward", "ffn", _FFN, experts=False),
        *hf_experts("feed_forward", tuple(_FFN.values())),
        hf_row("feed_forward.expert_bias", "ffn/router/correction"),
    ),
    _DEFAULTS
    | {
        "moe_intermediate_size": 1792,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_dense_layers": 2,
        "use_expert_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    experts="feed_forward.experts",
)

FAMILIES = (LFM2, LFM2_MOE)
