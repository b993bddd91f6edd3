"""Families with experts: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, GLM-4.5 and gpt-oss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.method.activations import clamped_swish
from nalora_jax.models import readers
from nalora_jax.models import tensor_rows as rows
from nalora_jax.models.families.dense import QWEN, QWEN_VL, rope_with_axes
from nalora_jax.models.family import GGUF, Family, Features, hf_defaults
from nalora_jax.models.moe import Mixture, SharedExperts
from nalora_jax.models.readers import Overrides, attention_bias
from nalora_jax.models.routing import RouterSpec

# ---------------------------------------------------------------- fields of experts


def plain_mixture(normalize: bool = True) -> Mixture:
    """Returns a mixture whose router is a softmax."""
    return Mixture(RouterSpec(normalize=normalize))


def expert_counts(f: Fields, *names: str, default: int | None = None) -> Features:
    """Returns the number of experts, from the first of the fields ``names`` in the file, and of a
    token's."""
    return {
        "n_experts": f.integer(
            readers.first_present(f, *names), high=2**12, default=default
        ),
        "experts_per_token": f.integer("num_experts_per_tok", high=2**12),
    }


def dense_layer(f: Fields) -> Overrides:
    """Returns the fields of a dense layer in a model with experts."""
    fields = {
        "d_ff": f.integer("intermediate_size"),
        "n_experts": 0,
        "experts_per_token": 0,
        "ffn": None,
    }
    return tuple(fields.items())


def expert_fields(
    f: Fields, counts: Features, ffn: Mixture | SharedExperts, dense: Sequence[bool]
) -> tuple[Features, list[Overrides]]:
    """Returns the fields of narrow experts, and of every layer: ``dense`` marks layers without
    experts."""
    fields = counts | {"d_ff": f.integer("moe_intermediate_size"), "ffn": ffn}
    return fields, [dense_layer(f) if is_dense else () for is_dense in dense]


def qwen_experts(
    f: Fields, ffn: Mixture | SharedExperts
) -> tuple[Features, list[Overrides]]:
    """See `expert_fields`."""
    n_layers = readers.layer_count(f)
    step = f.integer("decoder_sparse_step")
    listed = f.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(
        type(i) is int and 0 <= i < n_layers for i in listed
    ):
        raise f.error(
            "mlp_only_layers",
            f"numbers of layers from 0 to {n_layers - 1}",
            repr(listed)[:60],
        )
    counts = expert_counts(f, "num_experts", "num_local_experts")
    return expert_fields(
        f, counts, ffn, [i in listed or (i + 1) % step != 0 for i in range(n_layers)]
    )


def gated_shared_expert(f: Fields, *, normalize: bool) -> SharedExperts:
    """Returns the experts of Qwen's families with a shared expert."""
    width = f.integer("shared_expert_intermediate_size")
    return SharedExperts(width, RouterSpec(normalize=normalize), gated=True)


# ---------------------------------------------------------------- Mixtral


def _mixtral(f: Fields) -> Features:
    """Returns the fields of Mixtral."""
    counts = expert_counts(f, "num_local_experts")
    return {"ffn": plain_mixture(), **counts, **readers.same_window(f)}


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _mixtral,
    (
        *rows.hf(rows.PRE_NORMS, rows.ATTENTION),
        *rows.hf_experts("block_sparse_moe", ("w1", "w3", "w2")),
    ),
    hf_defaults(
        n_kv_heads=8,
        norm_eps=1e-5,
        rope_theta=1e6,
        max_positions=131_072,
        num_local_experts=8,
        experts_per_token=2,
    ),
    GGUF(
        "llama",
        rows.gguf(rows.GGUF_PRE, rows.GGUF_ATTENTION, rows.GGUF_EXPERTS, paired=True),
        lambda r: {
            "num_local_experts": r.get("expert_count", int),
            "num_experts_per_tok": r.get("expert_used_count", int),
            "sliding_window": None,
        },
        lambda r: bool(r.get("expert_count", int, 0)),
    ),
)


# ---------------------------------------------------------------- OLMoE


def _olmoe(f: Fields) -> Features:
    """Returns the fields of OLMoE, whose norms span all heads of a projection."""
    f.refuse("clip_qkv")
    return {
        "qk_norm": "projection",
        "ffn": plain_mixture(f.flag("norm_topk_prob")),
        **expert_counts(f, "num_experts", "num_local_experts"),
        **attention_bias(f),
    }


OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    _olmoe,
    (*rows.hf(rows.PRE_NORMS, rows.ATTENTION, rows.QK_NORMS), *rows.hf_experts("mlp")),
    hf_defaults(max_positions=4096, norm_eps=1e-5, n_experts=64, experts_per_token=8),
)


# ---------------------------------------------------------------- Qwen2-MoE and Qwen3-MoE


def _qwen3_moe(f: Fields) -> Features:
    """Returns the fields of Qwen3-MoE; some layers may have a dense FFN."""
    features: dict[str, Any] = {"qk_norm": "head"}
    # With use_sliding_window, every layer slides unless layer_types says otherwise.
    features |= readers.optional_windows(f, lambda layer: True)
    experts, fields_by_layer = qwen_experts(f, plain_mixture(f.flag("norm_topk_prob")))
    features |= experts
    features |= readers.fields_of_layers(fields_by_layer)
    features |= attention_bias(f)
    return features


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _qwen3_moe,
    (
        *rows.hf(rows.PRE_NORMS, rows.ATTENTION, rows.QK_NORMS),
        *rows.hf_experts("mlp"),
        *rows.HF_DENSE_LAYERS,
    ),
    QWEN
    | hf_defaults(
        n_kv_heads=4,
        moe_intermediate_size=768,
        experts_per_token=8,
        decoder_sparse_step=1,
    ),
    GGUF(
        "qwen3moe",
        rows.gguf(rows.GGUF_PRE, rows.GGUF_QK, rows.GGUF_ATTENTION, rows.GGUF_EXPERTS),
        lambda r: {
            "moe_intermediate_size": r.get("expert_feed_forward_length", int),
            "num_experts": r.get("expert_count", int),
            "num_experts_per_tok": r.get("expert_used_count", int),
            "norm_topk_prob": True,  # not stored: llama.cpp always does
        },
    ),
)


def _qwen3_vl_moe(f: Fields) -> Features:
    """Returns the fields of Qwen3-VL's text model with experts, whose weights sum to 1.

    Raises:
      NaloraError: the shapes of the experts' kernels do not tell which axis has the inputs, which
        differs between releases of transformers.
    """
    width = f.integer("hidden_size")
    if f.integer("moe_intermediate_size") in (width, width // 2):
        expected = "neither hidden_size nor half of it"
        raise f.error("moe_intermediate_size", expected, f"hidden_size {width}")
    features: dict[str, Any] = {"qk_norm": "head"}
    experts, fields_by_layer = qwen_experts(f, plain_mixture())
    features |= experts
    features |= readers.fields_of_layers(fields_by_layer)
    features |= rope_with_axes(f, interleaved=True)
    features |= attention_bias(f)
    return features


QWEN3_VL_MOE = Family(
    "qwen3_vl_moe_text",
    "",
    _qwen3_vl_moe,
    (
        *rows.hf(rows.PRE_NORMS, rows.ATTENTION, rows.QK_NORMS),
        *rows.hf_modules({"ffn/router": "mlp.gate"}),
        rows.TensorRow(
            f"{rows.HF_LAYER}.mlp.experts.gate_up_proj",
            ("layers/ffn/gate_proj/kernel", "layers/ffn/up_proj/kernel"),
            "halves",
            experts=True,
        ),
        rows.TensorRow(
            f"{rows.HF_LAYER}.mlp.experts.down_proj",
            ("layers/ffn/down_proj/kernel",),
            "halves",
            experts=True,
        ),
        *rows.HF_DENSE_LAYERS,
    ),
    QWEN_VL
    | hf_defaults(
        d_model=2048,
        d_ff=5632,
        n_layers=24,
        n_heads=16,
        n_kv_heads=16,
        experts_per_token=4,
        moe_intermediate_size=1408,
        decoder_sparse_step=1,
        tie_embeddings=True,
    ),
    stacks_in_vllm=True,
)


def _qwen2_moe(f: Fields) -> Features:
    """Returns the fields of Qwen2-MoE, whose layers have a gated shared expert."""
    first = f.integer("max_window_layers", low=0)
    experts, layers = qwen_experts(
        f, gated_shared_expert(f, normalize=f.flag("norm_topk_prob"))
    )
    return {
        "qkv_bias": f.flag("qkv_bias"),
        **readers.optional_windows(f, lambda i: i % 2 == 0 and i < first),
        **(experts | readers.fields_of_layers(layers)),
    }


QWEN_SHARED = (
    *rows.hf_experts("mlp", folder="ffn/experts_ffn"),
    *rows.hf_modules(
        {f"ffn/shared_ffn/{name}": f"mlp.shared_expert.{name}" for name in rows.GATED}
    ),
    *rows.hf_modules({"ffn/shared_gate": "mlp.shared_expert_gate"}),
    *rows.HF_DENSE_LAYERS,
)
QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _qwen2_moe,
    (*rows.hf(rows.PRE_NORMS, rows.ATTENTION), *QWEN_SHARED),
    QWEN
    | hf_defaults(
        n_kv_heads=16,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        experts_per_token=4,
        decoder_sparse_step=1,
        qkv_bias=True,
    ),
)


# ---------------------------------------------------------------- GLM-4.5 and GLM-4.6


def _glm4_moe(f: Fields) -> Features:
    """Returns the fields of GLM-4.5."""
    features = {
        "qkv_bias": f.flag("attention_bias"),
        "qk_norm": "head" if f.flag("use_qk_norm") else "",
    }
    return features | layers_with_shared_experts(f, sigmoid_router, first_dense(f))


def first_dense(f: Fields) -> list[bool]:
    """Returns True for each layer without experts: the first ``first_k_dense_replace``."""
    first = f.integer("first_k_dense_replace", low=0, high=2**10)
    return [i < first for i in range(readers.layer_count(f))]


def layers_with_shared_experts(
    f: Fields, router: Callable[[Fields, Features], RouterSpec], dense: Sequence[bool]
) -> Features:
    """Returns the fields of all layers of a model with shared experts.

    Args:
      f: the file's fields.
      router: returns the router of the fields and of `expert_counts`.
      dense: True for each layer without experts.
    """
    names = ("num_nextn_predict_layers", "num_mtp_layers")
    mtp = f.integer(readers.first_present(f, *names), low=0, default=1)
    if mtp > 1:  # `PREDICTING_LAYER` leaves out one layer
        expected = "0 or 1: a layer that predicts further tokens is not loaded"
        raise f.error("num_nextn_predict_layers", expected, mtp)
    counts = expert_counts(f, "n_routed_experts", "num_local_experts")
    d_shared = f.integer("n_shared_experts", high=2**10) * f.integer(
        "moe_intermediate_size"
    )
    ffn = SharedExperts(d_shared, router(f, counts))
    experts, layers = expert_fields(f, counts, ffn, dense)
    return experts | readers.fields_of_layers(layers)


def expert_groups(f: Fields, counts: Features) -> tuple[int, int]:
    """Returns the number of groups of experts, and of those that a token's experts are chosen
    from."""
    n_experts = counts["n_experts"]
    chosen = counts["experts_per_token"]
    groups = f.integer("n_group", high=2**12)
    if n_experts % groups or n_experts // groups < 2:
        raise f.error(
            "n_group", f"equal groups of 2 or more of the {n_experts} experts", groups
        )
    top_groups = f.integer("topk_group", high=2**12)
    if top_groups > groups or top_groups * (n_experts // groups) < chosen:
        expected = (
            f"at most {groups} groups that hold num_experts_per_tok ({chosen}) experts"
        )
        raise f.error("topk_group", expected, top_groups)
    return groups, top_groups


def sigmoid_router(f: Fields, counts: Features) -> RouterSpec:
    """Returns the router of GLM-4.5 and DeepSeek-V3, which first selects ``topk_group`` of
    ``n_group`` groups of experts."""
    normalize = f.flag("norm_topk_prob")
    scale = f.number("routed_scaling_factor")
    groups, kept = expert_groups(f, counts)
    return RouterSpec(
        scores="sigmoid",
        normalize=normalize,
        correction=True,
        groups=groups,
        groups_kept=kept,
        scale=scale,
    )


# The layer that predicts further tokens.
PREDICTING_LAYER = r"^model\.layers\.{n_layers}\."
SHARED_AND_DENSE = (
    rows.hf_row(
        "mlp.gate.e_score_correction_bias", "ffn/experts_ffn/router/correction"
    ),
    *rows.hf_modules(
        {f"ffn/shared_ffn/{name}": f"mlp.shared_experts.{name}" for name in rows.GATED}
    ),
    *rows.HF_DENSE_LAYERS,
)
EXPERTS_WITH_SHARED = (
    *rows.hf_experts("mlp", folder="ffn/experts_ffn"),
    *SHARED_AND_DENSE,
)
GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    _glm4_moe,
    (
        *rows.hf(rows.PRE_NORMS, rows.ATTENTION, rows.QK_NORMS),
        *EXPERTS_WITH_SHARED,
    ),
    hf_defaults(
        n_kv_heads=8,
        max_positions=131_072,
        norm_eps=1e-5,
        partial_rotary_factor=0.5,
        moe_intermediate_size=1408,
        experts_per_token=8,
        n_shared_experts=1,
        routed_scaling_factor=1.0,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        norm_topk_prob=True,
    ),
    ignored=(PREDICTING_LAYER,),
)


# ---------------------------------------------------------------- gpt-oss
#
# Attention has a sink per head, biases and alternating windows. Experts and router have biases; the
# gate is the clamped swish, and its factor is ``1 + clip(x W_up)``. The released files store the
# experts' kernels in MXFP4 (`nalora_jax.weights.model_files`).


def _gpt_oss(f: Fields) -> Features:
    """Returns the fields of gpt-oss; the activation contains the clamp and the slope of its
    swish."""
    _check_quantization(f)
    if f.text("hidden_act") != "silu":
        expected = "'silu': the gate follows from swiglu_alpha and swiglu_limit"
        raise f.error("hidden_act", expected, f.get("hidden_act"))
    limit = f.number("swiglu_limit")
    return {
        "activation": clamped_swish(f.number("swiglu_alpha"), limit).name,
        "up_limit": limit,
        "attn_sinks": True,
        "ffn_bias": True,
        "router_bias": True,
        "windows": readers.windows_of(f, readers.periodic(f, 2)),
        "ffn": plain_mixture(),
        **expert_counts(f, "num_local_experts", "num_experts", default=128),
        **attention_bias(f),
    }


def _check_quantization(f: Fields) -> None:
    """Refuses any quantization except the released files': MXFP4 experts, all others floats."""
    stored = Fields(
        f.mapping("quantization_config"), {}, f"{f.where}: quantization_config"
    )
    if not stored.raw:
        return
    method = stored.get("quant_method")
    listed = stored.get("modules_to_not_convert")
    if method != "mxfp4":
        expected = "'mxfp4', or no quantization_config"
        remedy = "load the unquantized model"
        raise stored.error("quant_method", expected, repr(method), remedy)
    for key in sorted(
        stored.raw.keys() - {"quant_method", "modules_to_not_convert", "dequantize"}
    ):
        stored.refuse(key)
    if not isinstance(listed, list | None) or any(
        "experts" in str(module) for module in listed or ()
    ):
        expected = "a list of modules other than the experts"
        raise stored.error("modules_to_not_convert", expected, repr(listed)[:60])


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    _gpt_oss,
    (
        *rows.hf(rows.PRE_NORMS, rows.ATTENTION),
        rows.HF_SINKS,
        *rows.hf_modules({"ffn/router": "mlp.router"}),
        *(
            rows.hf_row(
                f"mlp.experts.gate_up_proj{theirs}",
                f"ffn/gate_proj/{ours}",
                f"ffn/up_proj/{ours}",
                change="columns",
            )
            for ours, theirs in {"kernel": "", "bias": "_bias"}.items()
        ),
        rows.hf_row("mlp.experts.down_proj", "ffn/down_proj/kernel"),
        rows.hf_row("mlp.experts.down_proj_bias", "ffn/down_proj/bias"),
    ),
    hf_defaults(
        head_dim=64,
        n_kv_heads=8,
        max_positions=131_072,
        norm_eps=1e-5,
        sliding_window=128,
        experts_per_token=4,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        attention_bias=True,
        rope_theta=150_000.0,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    checks=("quantization_config",),
)
