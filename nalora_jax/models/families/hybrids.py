"""Families whose layers have different mixers: Qwen3-Next, Qwen3.5 and LFM2, with or without
experts."""

from __future__ import annotations

from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.models import readers
from nalora_jax.models import tensor_rows as rows
from nalora_jax.models.families import mixtures
from nalora_jax.models.family import Family, Features, hf_defaults
from nalora_jax.models.moe import Mixture
from nalora_jax.models.readers import FULL_ATTENTION, Overrides, attention_bias
from nalora_jax.models.recurrent import GatedDeltaNet, ShortConvolution
from nalora_jax.models.ropes import image_axes
from nalora_jax.models.routing import RouterSpec

# ---------------------------------------------------------------- Qwen3-Next and Qwen3.5

_LINEAR = "linear_attention"


def _qwen3_5(f: Fields) -> Features:
    """Returns the fields of dense Qwen3.5."""
    features, layers = _mixers(f)
    return features | readers.fields_of_layers(layers)


def _qwen3_5_moe(f: Fields) -> Features:
    """Returns the fields of Qwen3.5 with experts in every layer, whose weights sum to 1."""
    f.refuse("mlp_only_layers", "every layer of this family has experts")
    for field in ("decoder_sparse_step", "norm_topk_prob"):
        if f.get(field) not in (None, 1):
            raise f.error(field, "1: the only choice of this family", f.get(field))
    return _with_experts(f, normalize=True)


def _with_experts(f: Fields, *, normalize: bool, fused: bool = False) -> Features:
    """Returns the fields of a model with experts and a gated shared expert, or dense layers."""
    features, mixers = _mixers(f, fused=fused)
    experts, ffns = mixtures.qwen_experts(
        f, mixtures.gated_shared_expert(f, normalize=normalize)
    )
    layers = [(*mixer, *ffn) for mixer, ffn in zip(mixers, ffns, strict=True)]
    return features | experts | readers.fields_of_layers(layers)


def _mixers(f: Fields, *, fused: bool = False) -> tuple[Features, list[Overrides]]:
    """Returns the fields of attention, and of every layer: of attention or of linear attention."""
    if f.get("attn_output_gate") is False:
        raise f.error(
            "attn_output_gate", "true: attention of this family has output gates", False
        )
    kinds = readers.layer_types(f, _LINEAR)
    if kinds is None:
        interval = f.integer("full_attention_interval")
        kinds = [
            _LINEAR if (i + 1) % interval else FULL_ATTENTION
            for i in range(readers.layer_count(f))
        ]
    # Sections of MRoPE have no effect on text, whose three positions are equal; see `_image_axes`.
    rope = readers.one_rope(f, "mrope_section", "mrope_interleaved")
    features = {
        "qk_norm": "head",
        "norm_offset": 1.0,
        "attn_gate": True,
        **attention_bias(f),
        **rope,
    }
    keys, values = (
        f.integer(f"linear_num_{name}_heads", high=2**16) for name in ("key", "value")
    )
    if values % keys:
        raise f.error(
            "linear_num_value_heads",
            f"a multiple of linear_num_key_heads ({keys})",
            values,
        )
    d_key, d_value = (
        f.integer(f"linear_{name}_head_dim", high=2**16) for name in ("key", "value")
    )
    taps = f.integer("linear_conv_kernel_dim", high=2**10)
    mixer = GatedDeltaNet(keys, values, d_key, d_value, taps, fused)
    return features, [(("mixer", mixer),) if kind == _LINEAR else () for kind in kinds]


def _image_axes(f: Fields, pairs: int) -> tuple[int, ...]:
    """Returns the axes of Qwen3.5's rotated pairs in a model with images."""
    return image_axes(f, pairs, (11, 11, 10), interleaved=True)


def _rows(*inputs: str) -> rows.Rows:
    """Returns the tensors of both mixers, with the names of the projections of DeltaNet's input."""
    names = {"A_log": "a_log", "dt_bias": "dt_bias"}
    names |= {"conv1d.weight": "conv/weight", "norm.weight": "norm/scale"}
    return (
        *rows.hf(rows.PRE_NORMS, rows.ATTENTION, rows.QK_NORMS),
        *rows.hf_modules(
            {
                f"linear_attn/{name}": f"linear_attn.{name}"
                for name in (*inputs, "out_proj")
            }
        ),
        *(
            rows.hf_row(f"linear_attn.{theirs}", f"linear_attn/{ours}")
            for theirs, ours in names.items()
        ),
    )


_QWEN3_5_ROWS = _rows("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
# The image tower, and heads that predict several tokens.
_UNUSED = (r"^(model\.)?visual\.", r"^mtp\.")
_HYBRID: dict[str, Any] = hf_defaults(
    head_dim=256,
    max_positions=32_768,
    partial_rotary_factor=0.25,
    full_attention_interval=4,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_conv_kernel_dim=4,
)
# Nested text configs list only the differences from these defaults.
_QWEN3_5_DEFAULTS = _HYBRID | hf_defaults(
    vocab_size=248_320, d_model=4096, d_ff=12_288, n_layers=32, n_heads=16, n_kv_heads=4
)
_MOE = {
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "decoder_sparse_step": 1,
}
QWEN3_5 = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    _qwen3_5,
    (*_QWEN3_5_ROWS, *rows.hf_modules(rows.FFN)),
    _QWEN3_5_DEFAULTS,
    ignored=_UNUSED,
    multimodal="qwen3_5",
    image_axes=_image_axes,
)
QWEN3_5_MOE = Family(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    _qwen3_5_moe,
    (*_QWEN3_5_ROWS, *mixtures.QWEN_SHARED),
    _QWEN3_5_DEFAULTS
    | _MOE
    | hf_defaults(
        d_model=2048, n_layers=40, n_kv_heads=2, n_experts=256, experts_per_token=8
    ),
    ignored=_UNUSED,
    multimodal="qwen3_5_moe",
    image_axes=_image_axes,
    stacks_in_vllm=True,
)
QWEN3_NEXT = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    lambda f: _with_experts(f, normalize=f.flag("norm_topk_prob"), fused=True),
    (*_rows("in_proj_qkvz", "in_proj_ba"), *mixtures.QWEN_SHARED),
    _HYBRID
    | _MOE
    | {"num_key_value_heads": 2, "num_experts_per_tok": 10, "norm_topk_prob": True},
    ignored=_UNUSED,
)


# ---------------------------------------------------------------- LFM2

_CONV = "conv"
_FFN: rows.Modules = {
    "ffn/gate_proj": "feed_forward.w1",
    "ffn/up_proj": "feed_forward.w3",
    "ffn/down_proj": "feed_forward.w2",
}
_LFM2_ROWS = (
    *rows.hf(
        {"attn_norm": "operator_norm", "ffn_norm": "ffn_norm"},
        {
            "attn/q_norm": "self_attn.q_layernorm",
            "attn/k_norm": "self_attn.k_layernorm",
        },
        {**rows.ATTENTION, "attn/o_proj": "self_attn.out_proj"},
        {"conv/bcx_proj": "conv.in_proj", "conv/o_proj": "conv.out_proj"},
        norm="embedding_norm",
    ),
    rows.hf_row("conv.conv.weight", "conv/taps"),
    rows.hf_row("conv.conv.bias", "conv/taps_bias"),
)
_LFM2: dict[str, Any] = {"norm_eps": 1e-5} | hf_defaults(
    n_kv_heads=8,
    max_positions=128_000,
    tie_embeddings=True,
    rope_theta=1e6,
    conv_L_cache=3,
)


def _base(f: Fields) -> Features:
    """Returns the fields that LFM2 and LFM2-MoE share."""
    tied = readers.first_present(f, "tie_embedding", "tie_word_embeddings")
    return {
        "activation": "silu",
        "norm_eps": f.number("norm_eps", zero=True),
        "tie_embeddings": f.flag(tied),
        "qk_norm": "head",
        "attn_dropout": 0.0,
        **readers.one_rope(f),
    }


def _convolutions(f: Fields) -> list[Overrides]:
    """Returns the fields of attention and of convolutions, by layer."""
    n_layers = readers.layer_count(f)
    attending = f.get("full_attn_idxs")
    listed = isinstance(attending, list) and set(attending) <= set(range(n_layers))
    if attending is not None and not listed:
        raise f.error(
            "full_attn_idxs", f"a list of layers below {n_layers}", repr(attending)[:60]
        )
    names = readers.layer_types(f, _CONV)
    if names is None:
        names = [
            FULL_ATTENTION if attending is None or i in attending else _CONV
            for i in range(n_layers)
        ]
    mixer = ShortConvolution(
        f.integer("conv_L_cache", low=2, high=2**8), f.flag("conv_bias")
    )
    return [(("mixer", mixer),) if name == _CONV else () for name in names]


def _lfm2(f: Fields) -> Features:
    """Returns the fields of LFM2; the width of its FFN may follow from three settings."""
    # Variants that the released files could name and that transformers does not have.
    for field in ("block_use_swiglu", "use_pos_enc"):
        if f.get(field) is False:
            raise f.error(field, "true", "false")
    d_model = f.integer("hidden_size")
    for field in ("block_dim", "conv_dim", "conv_dim_out"):
        if f.get(field) not in (None, d_model):
            raise f.error(field, f"hidden_size ({d_model})", f.get(field))
    width = f.integer(readers.first_present(f, "block_ff_dim", "intermediate_size"))
    if f.flag("block_auto_adjust_ff_dim"):
        multiple = f.integer("block_multiple_of")
        width = int(f.number("block_ffn_dim_multiplier") * int(2 * width / 3))
        width = multiple * -(-width // multiple)
    return _base(f) | {"d_ff": width} | readers.fields_of_layers(_convolutions(f))


LFM2 = Family(
    "lfm2",
    "Lfm2ForCausalLM",
    _lfm2,
    (*_LFM2_ROWS, *rows.hf_modules(_FFN)),
    _LFM2
    | {
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
)


def _lfm2_moe(f: Fields) -> Features:
    """Returns the fields of LFM2-MoE; the first ``num_dense_layers`` layers have no experts."""
    n_dense = f.integer("num_dense_layers", low=0, high=2**10)
    counts = mixtures.expert_counts(f, "num_experts")
    scale = f.number("routed_scaling_factor")
    normalize = f.flag("norm_topk_prob")
    ffn = Mixture(
        RouterSpec("sigmoid", normalize, f.flag("use_expert_bias"), scale=scale)
    )
    mixers = _convolutions(f)
    experts, ffns = mixtures.expert_fields(
        f, counts, ffn, [i < n_dense for i in range(len(mixers))]
    )
    layers = [(*mixer, *of_ffn) for mixer, of_ffn in zip(mixers, ffns, strict=True)]
    return _base(f) | experts | readers.fields_of_layers(layers)


LFM2_MOE = Family(
    "lfm2_moe",
    "Lfm2MoeForCausalLM",
    _lfm2_moe,
    (
        *_LFM2_ROWS,
        *rows.hf_modules(_FFN, experts=False),
        *rows.hf_experts("feed_forward", ("w1", "w3", "w2")),
        rows.hf_row("feed_forward.expert_bias", "ffn/router/correction"),
    ),
    _LFM2
    | hf_defaults(
        moe_intermediate_size=1792,
        n_experts=32,
        experts_per_token=4,
        num_dense_layers=2,
        use_expert_bias=True,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    ),
    experts="feed_forward.experts",
)
