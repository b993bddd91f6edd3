"""Families whose layers have different mixers: Qwen3-Next, Qwen3.5 and LFM2, with or without experts."""

from __future__ import annotations

from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.mixtures import QWEN_SHARED, qwen_experts
from nalora_jax.models.family import (
    HF_ATTENTION,
    HF_ENDS,
    HF_FFN,
    HF_PRE_NORMS,
    HF_QK_NORMS,
    Family,
    TensorRow,
    hf_dense,
    hf_ends,
    hf_experts,
    hf_norms,
    hf_row,
)
from nalora_jax.models.moe import Mixture, SharedExperts
from nalora_jax.models.readers import (
    FULL,
    Overrides,
    attention_bias,
    base_config,
    dense_layer,
    expert_counts,
    fields_of_layers,
    first_present,
    head_dim_of,
    layer_count,
    layer_types,
)
from nalora_jax.models.recurrent import GatedDeltaNet, ShortConvolution
from nalora_jax.models.ropes import read_ropes
from nalora_jax.models.routing import RouterSpec

# ---------------------------------------------------------------- Qwen3-Next and Qwen3.5

_LINEAR = "linear_attention"


def _qwen3_5(f: Fields, name: str) -> ModelConfig:
    features, layers = _mixers(f)
    return base_config(f, name, **features, **fields_of_layers(layers))


def _qwen3_5_moe(f: Fields, name: str) -> ModelConfig:
    f.refuse("mlp_only_layers", "every layer of this family has experts")
    for field in ("decoder_sparse_step", "norm_topk_prob"):
        if f.get(field) not in (None, 1):
            raise f.error(field, "1: the only choice of this family", f.get(field))
    return _with_experts(f, name, normalize=True)


def _qwen3_next(f: Fields, name: str) -> ModelConfig:
    return _with_experts(f, name, normalize=f.flag("norm_topk_prob"), fused=True)


def _with_experts(f: Fields, name: str, *, normalize: bool, fused: bool = False) -> ModelConfig:
    """Returns the config of a model with experts and a gated shared expert, or dense layers."""
    features, mixers = _mixers(f, fused=fused)
    experts, ffns = qwen_experts(f)
    shared = SharedExperts(
        f.integer("shared_expert_intermediate_size"), RouterSpec(normalize=normalize), gated=True
    )
    layers = [(*mixer, *ffn) for mixer, ffn in zip(mixers, ffns, strict=True)]
    return base_config(f, name, **(features | experts | {"ffn": shared} | fields_of_layers(layers)))


def _mixers(f: Fields, *, fused: bool = False) -> tuple[dict[str, Any], list[Overrides]]:
    """Returns the fields of attention, and of every layer: of attention or of linear attention."""
    if f.get("attn_output_gate") is False:
        raise f.error("attn_output_gate", "true: attention of this family has output gates", False)
    kinds = layer_types(f, _LINEAR)
    if kinds is None:
        interval = f.integer("full_attention_interval")
        kinds = [_LINEAR if (i + 1) % interval else FULL for i in range(layer_count(f))]
    # Sections of MRoPE have no effect on text, whose three positions are equal.
    ropes, _ = read_ropes(f, head_dim_of(f), None, further=("mrope_section", "mrope_interleaved"))
    features = {"qk_norm": "head", "norm_offset": 1.0, "attn_gate": True, **attention_bias(f)}
    linear = (("mixer", _delta_net(f, fused)),)
    return features | {"ropes": ropes}, [linear if kind == _LINEAR else () for kind in kinds]


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


def _delta_net_rows(*inputs: str) -> tuple[TensorRow, ...]:
    """Returns the tensors of Gated DeltaNet, with the names of the projections of its input."""
    names = {"A_log": "a_log", "dt_bias": "dt_bias"}
    names |= {"conv1d.weight": "conv/weight", "norm.weight": "norm/scale"}
    rows = (hf_row(f"linear_attn.{theirs}", f"linear_attn/{ours}") for theirs, ours in names.items())
    return (*hf_dense("linear_attn", "linear_attn", (*inputs, "out_proj")), *rows)


_HYBRID_ROWS = (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *HF_QK_NORMS)
_QWEN3_5_ROWS = (*_HYBRID_ROWS, *_delta_net_rows("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"))
# The image tower, and heads that predict several tokens.
_UNUSED = (r"^(model\.)?visual\.", r"^mtp\.")
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
_QWEN3_5_DEFAULTS = _HYBRID | {
    "vocab_size": 248_320,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
_MOE = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "decoder_sparse_step": 1}
_QWEN3_5_MOE_DEFAULTS = _QWEN3_5_DEFAULTS | _MOE
_QWEN3_5_MOE_DEFAULTS |= {
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "num_experts": 256,
    "num_experts_per_tok": 8,
}
_QWEN3_NEXT_DEFAULTS = (
    _HYBRID | _MOE | {"num_key_value_heads": 2, "num_experts_per_tok": 10, "norm_topk_prob": True}
)
QWEN3_5 = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    _qwen3_5,
    (*_QWEN3_5_ROWS, *HF_FFN),
    _QWEN3_5_DEFAULTS,
    ignored=_UNUSED,
    multimodal="qwen3_5",
)
QWEN3_5_MOE = Family(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    _qwen3_5_moe,
    (*_QWEN3_5_ROWS, *QWEN_SHARED),
    _QWEN3_5_MOE_DEFAULTS,
    ignored=_UNUSED,
    multimodal="qwen3_5_moe",
    stacks_in_vllm=True,
)
QWEN3_NEXT = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    _qwen3_next,
    (*_HYBRID_ROWS, *_delta_net_rows("in_proj_qkvz", "in_proj_ba"), *QWEN_SHARED),
    _QWEN3_NEXT_DEFAULTS,
    ignored=_UNUSED,
)


# ---------------------------------------------------------------- LFM2

_CONV = "conv"
_FFN = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_LFM2_ROWS = (
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
_LFM2: dict[str, Any] = {
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


def _convolutions(f: Fields) -> list[Overrides]:
    """Returns the fields of attention and of convolutions, by layer."""
    n_layers = layer_count(f)
    attending = f.get("full_attn_idxs")
    if attending is not None and not (
        isinstance(attending, list) and set(attending) <= set(range(n_layers))
    ):
        raise f.error("full_attn_idxs", f"a list of layers below {n_layers}", repr(attending)[:60])
    names = layer_types(f, _CONV)
    if names is None:
        names = [FULL if attending is None or i in attending else _CONV for i in range(n_layers)]
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
    return _base(f, name, d_ff=_width(f), **fields_of_layers(_convolutions(f)))


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
    (*_LFM2_ROWS, *hf_dense("feed_forward", "ffn", _FFN)),
    _LFM2
    | {
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
)


def _lfm2_moe(f: Fields, name: str) -> ModelConfig:
    mixers, n_dense = _convolutions(f), f.integer("num_dense_layers", low=0, high=2**10)
    dense = dense_layer(f.integer("intermediate_size"))
    scale, normalize = f.number("routed_scaling_factor"), f.flag("norm_topk_prob")
    features = {
        "d_ff": f.integer("moe_intermediate_size"),
        **expert_counts(f, "num_experts"),
        "ffn": Mixture(RouterSpec("sigmoid", normalize, f.flag("use_expert_bias"), scale=scale)),
    }
    layers = [(*mixer, *dense) if i < n_dense else mixer for i, mixer in enumerate(mixers)]
    return _base(f, name, **(features | fields_of_layers(layers)))


LFM2_MOE = Family(
    "lfm2_moe",
    "Lfm2MoeForCausalLM",
    _lfm2_moe,
    (
        *_LFM2_ROWS,
        *hf_dense("feed_forward", "ffn", _FFN, experts=False),
        *hf_experts("feed_forward", tuple(_FFN.values())),
        hf_row("feed_forward.expert_bias", "ffn/router/correction"),
    ),
    _LFM2
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

FAMILIES = (QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT, LFM2, LFM2_MOE)
