"""Families with multi-head latent attention: DeepSeek-V2 and V3, Kimi-K2, GLM-4.7-Flash, Mistral 4
and Youtu.

DeepSeek-V3.1, DeepSeek-R1 and Moonlight are of the family ``deepseek_v3``. The constant of the
norms of latents is transformers', 1e-6, whatever ``rms_norm_eps`` is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.models import readers
from nalora_jax.models import tensor_rows as rows
from nalora_jax.models.families.dense import GROWTH, query_growth
from nalora_jax.models.families.mixtures import (
    EXPERTS_WITH_SHARED,
    PREDICTING_LAYER,
    SHARED_AND_DENSE,
    expert_groups,
    first_dense,
    layers_with_shared_experts,
    sigmoid_router,
)
from nalora_jax.models.family import GGUF, Family, Features, Metadata, hf_defaults
from nalora_jax.models.latent import LatentAttention
from nalora_jax.models.ropes import read_ropes, rope_fields, yarn_magnitude
from nalora_jax.models.routing import RouterSpec


def latent_attention(
    f: Fields, *, adjacent: bool, further: tuple[str, ...] = ()
) -> Features:
    """Returns the fields of latent attention.

    With YaRN, ``mscale_all_dim`` multiplies the scores by the square of its magnitude.

    Args:
      f: the file's fields.
      adjacent: `ModelConfig.rope_adjacent`.
      further: parameters of RoPE that the family reads.
    """
    f.refuse("index_topk", "attention to selected tokens is not implemented")
    heads = f.integer("num_attention_heads", high=2**16)
    kv_heads = f.integer("num_key_value_heads", high=2**16, default=heads)
    if kv_heads != heads:
        expected = f"num_attention_heads ({heads}): latents are shared, not heads"
        raise f.error("num_key_value_heads", expected, kv_heads)
    q_rank = 0
    if f.get("q_lora_rank") is not None:
        q_rank = f.integer("q_lora_rank")
    part = LatentAttention(
        q_rank,
        f.integer("kv_lora_rank"),
        f.integer("qk_nope_head_dim", high=2**16),
        f.integer("qk_rope_head_dim", high=2**16),
        f.integer("v_head_dim", high=2**16),
    )
    head_dim = part.nope_dim + part.rope_dim
    if part.value_dim > head_dim:
        expected = f"at most {head_dim}, qk_nope_head_dim + qk_rope_head_dim"
        raise f.error("v_head_dim", expected, part.value_dim)
    ropes, _ = read_ropes(f, part.rope_dim, None, further=further)
    scale = head_dim**-0.5
    all_dim = rope_fields(f).number("mscale_all_dim", default=0.0, zero=True)
    if all_dim:
        scale *= yarn_magnitude(ropes[0].factor, all_dim) ** 2
    return {
        "mixer": part,
        "n_kv_heads": heads,
        "head_dim": head_dim,
        "ropes": ropes,
        "rope_adjacent": adjacent,
        "query_scale": scale,
        **readers.attention_bias(f),
    }


LATENT_ATTENTION: rows.Modules = {
    "attn/q_proj": "self_attn.q_proj",
    "attn/q_a_proj": "self_attn.q_a_proj",
    "attn/q_a_norm": "self_attn.q_a_layernorm",
    "attn/q_b_proj": "self_attn.q_b_proj",
    "attn/kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    "attn/kv_a_norm": "self_attn.kv_a_layernorm",
    "attn/kv_b_proj": "self_attn.kv_b_proj",
    "attn/o_proj": "self_attn.o_proj",
}
# vLLM multiplies latents by its own copies of the kernel (vllm#48974).
_UNSERVED = ("layers/attn/kv_b_proj",)
_TENSORS = (*rows.hf(rows.PRE_NORMS, LATENT_ATTENTION), *EXPERTS_WITH_SHARED)


# ---------------------------------------------------------------- llama.cpp
#
# Its converter writes all of these families as the architecture "deepseek2", and W_kv_b as two
# stacks of the heads' kernels (`nalora_jax.weights.model_files.JoinedLatents`).

_GGUF_ATTENTION: rows.Modules = {
    "attn/q_proj": "attn_q",
    "attn/q_a_proj": "attn_q_a",
    "attn/q_a_norm": "attn_q_a_norm",
    "attn/q_b_proj": "attn_q_b",
    "attn/kv_a_proj": "attn_kv_a_mqa",
    "attn/kv_a_norm": "attn_kv_a_norm",
    "attn/kv_b_proj": "attn_kv_b",
    "attn/o_proj": "attn_output",
}
_GGUF_SHARED: rows.Modules = {
    f"ffn/shared_ffn/{name}_proj": f"ffn_{name}_shexp"
    for name in ("gate", "up", "down")
}
_GGUF_EXPERTS: rows.Modules = {
    "ffn/experts_ffn/router": "ffn_gate_inp",
    "ffn/experts_ffn/gate_proj": "ffn_gate_exps",
    "ffn/experts_ffn/up_proj": "ffn_up_exps",
    "ffn/experts_ffn/down_proj": "ffn_down_exps",
}
_GGUF_LAYER = "blk.{layer}"
_GGUF_TENSORS = (
    *rows.gguf(rows.GGUF_PRE, _GGUF_ATTENTION, _GGUF_EXPERTS, _GGUF_SHARED),
    *rows.module_rows(_GGUF_LAYER, rows.GGUF_FFN, experts=False),
    rows.TensorRow(
        f"{_GGUF_LAYER}.exp_probs_b.bias",
        ("layers/ffn/experts_ffn/router/correction",),
    ),
)
_SIGMOID = 2  # of deepseek2.expert_gating_func


def _gguf_latents(r: Metadata) -> dict[str, Any]:
    """Returns the fields of latent attention in a file for llama.cpp.

    Files describe the absorbed form, with one head of keys, and state the sizes of the expanded
    form under further keys; earlier files describe the latter only.
    """
    head_dim = r.get(
        "attention.key_length_mla", int, r.get("attention.key_length", int, 0)
    )
    value_dim = r.get(
        "attention.value_length_mla", int, r.get("attention.value_length", int, 0)
    )
    rotated = r.get("rope.dimension_count", int)
    q_rank = None
    if r.has("attention.q_lora_rank"):
        q_rank = r.get("attention.q_lora_rank", int)
    fields = {
        "num_key_value_heads": r.get("attention.head_count", int),
        "head_dim": rotated,  # as transformers writes it
        "partial_rotary_factor": 1.0,
        "q_lora_rank": q_rank,
        "kv_lora_rank": r.get("attention.kv_lora_rank", int),
        "qk_nope_head_dim": head_dim - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": value_dim,
        "rope_interleave": True,
    }
    scaling = r.scaling()
    if scaling is not None:
        # The converter multiplies by 0.1; llama.cpp's magnitude of the rotation is 1.
        all_dim = round(10 * scaling.pop("mscale_all_dim", 0.0), 6)
        scaling.pop("mscale", None)
        if all_dim:
            scaling |= {"mscale": all_dim, "mscale_all_dim": all_dim}
        fields["rope_scaling"] = scaling
    return fields


def _gguf_experts(r: Metadata) -> dict[str, Any]:
    """Returns the fields of latent attention and of experts."""
    groups = r.get("expert_group_count", int, 1)
    method = "noaux_tc"
    if not _has_sigmoid(r):
        method = "greedy" if groups == 1 else "group_limited_greedy"
    return _gguf_latents(r) | {
        "first_k_dense_replace": r.get("leading_dense_block_count", int, 0),
        "moe_intermediate_size": r.get("expert_feed_forward_length", int),
        "n_routed_experts": r.get("expert_count", int),
        "n_shared_experts": r.get("expert_shared_count", int),
        "num_experts_per_tok": r.get("expert_used_count", int),
        "routed_scaling_factor": r.get("expert_weights_scale", float, 1.0),
        "norm_topk_prob": r.get("expert_weights_norm", bool, False),
        "n_group": groups,
        "topk_group": r.get("expert_group_used_count", int, 1),
        "topk_method": method,
        "num_nextn_predict_layers": r.get("nextn_predict_layers", int, 0),
    }


def _has_sigmoid(r: Metadata) -> bool:
    return bool(r.get("expert_gating_func", int, 0) == _SIGMOID)


# Its graph multiplies these kernels without their adapters, and has no kernel W_kv_b.
_UNSERVED_IN_GGUF = tuple(
    f"layers/attn/{name}_proj" for name in ("q", "q_a", "q_b", "kv_a", "kv_b")
)
_GGUF = GGUF(
    "deepseek2",
    _GGUF_TENSORS,
    _gguf_experts,
    _has_sigmoid,
    unserved=_UNSERVED_IN_GGUF,
)
# Its files are read as those of DeepSeek-V3, which has the same layers.
_GGUF_WRITTEN = replace(_GGUF, matches=lambda r: False)


def _check(f: Fields, name: str, *accepted: object) -> None:
    """Refuses other values of a field that transformers does not read; it may be absent."""
    value = f.get(name)
    if value is not None and value not in accepted:
        expected = " or ".join(map(repr, accepted))
        raise f.error(name, f"{expected} in this family", repr(value)[:60])


# ---------------------------------------------------------------- DeepSeek-V2


def _deepseek_v2(f: Fields) -> Features:
    f.refuse("mlp_bias")
    f.refuse("norm_topk_prob", "transformers computes this family without it")
    _check(f, "scoring_func", "softmax")
    _check(f, "moe_layer_freq", 1)
    dense = first_dense(f)
    experts = layers_with_shared_experts(f, _softmax_router, dense)
    return latent_attention(f, adjacent=True) | experts


def _softmax_router(f: Fields, counts: Features) -> RouterSpec:
    """Returns the router of DeepSeek-V2, which may first select groups by their best expert."""
    methods = ("greedy", "group_limited_greedy")
    method = f.text("topk_method")
    if method not in methods:
        raise f.error("topk_method", f"one of {', '.join(methods)}", repr(method))
    groups = (1, 1)
    if method == "group_limited_greedy":
        groups = expert_groups(f, counts)
    scale = f.number("routed_scaling_factor")
    return RouterSpec("softmax", False, False, *groups, scale, group_top=1)


DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    _deepseek_v2,
    _TENSORS,
    hf_defaults(
        first_k_dense_replace=0,
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        n_shared_experts=2,
        moe_intermediate_size=1407,
        routed_scaling_factor=1.0,
        topk_method="greedy",
    ),
    replace(
        _GGUF,
        matches=lambda r: not _has_sigmoid(r) and r.get("expert_count", int, 0) > 0,
    ),
    unserved_in_vllm=_UNSERVED,
)


# ---------------------------------------------------------------- DeepSeek-V3 and Kimi-K2


def _deepseek_v3(f: Fields) -> Features:
    _check(f, "scoring_func", "sigmoid")
    _check(f, "topk_method", "noaux_tc")
    _check(f, "moe_layer_freq", 1)
    experts = layers_with_shared_experts(f, sigmoid_router, first_dense(f))
    return latent_attention(f, adjacent=f.flag("rope_interleave")) | experts


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    _deepseek_v3,
    _TENSORS,
    hf_defaults(
        n_kv_heads=128,
        max_positions=4096,
        moe_intermediate_size=2048,
        n_shared_experts=1,
        n_routed_experts=256,
        routed_scaling_factor=2.5,
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_rope_head_dim=64,
        v_head_dim=128,
        qk_nope_head_dim=128,
        n_group=8,
        topk_group=4,
        experts_per_token=8,
        first_k_dense_replace=3,
        norm_topk_prob=True,
        rope_interleave=True,
    ),
    _GGUF,
    ignored=(PREDICTING_LAYER,),
    unserved_in_vllm=_UNSERVED,
)
# Its config.json names DeepSeek-V3's classes.
KIMI_K2 = replace(
    DEEPSEEK_V3, name="kimi_k2", multimodal="kimi_k25", gguf=_GGUF_WRITTEN
)


# ---------------------------------------------------------------- GLM-4.7-Flash


def _glm4_moe_lite(f: Fields) -> Features:
    _check(f, "topk_method", "noaux_tc")
    n_layers = readers.layer_count(f)
    kinds = f.items("mlp_layer_types", n_layers, str)
    if kinds is None:
        kinds = ["dense"] + ["sparse"] * (n_layers - 1)
        _check(f, "first_k_dense_replace", 1)
    for kind in kinds:
        if kind not in ("dense", "sparse"):
            raise f.error("mlp_layer_types", "'dense' or 'sparse'", repr(kind)[:60])
    dense = [kind == "dense" for kind in kinds]
    experts = layers_with_shared_experts(f, sigmoid_router, dense)
    return latent_attention(f, adjacent=f.flag("rope_interleave")) | experts


GLM4_MOE_LITE = Family(
    "glm4_moe_lite",
    "Glm4MoeLiteForCausalLM",
    _glm4_moe_lite,
    _TENSORS,
    hf_defaults(
        n_kv_heads=20,
        max_positions=202_752,
        norm_eps=1e-5,
        moe_intermediate_size=1536,
        n_shared_experts=1,
        n_routed_experts=64,
        routed_scaling_factor=1.8,
        kv_lora_rank=512,
        q_lora_rank=768,
        qk_rope_head_dim=64,
        v_head_dim=256,
        qk_nope_head_dim=192,
        n_group=1,
        topk_group=1,
        experts_per_token=4,
        norm_topk_prob=True,
        rope_interleave=True,
    ),
    _GGUF_WRITTEN,
    ignored=(PREDICTING_LAYER,),
    unserved_in_vllm=_UNSERVED,
)


# ---------------------------------------------------------------- Mistral 4


def _mistral4(f: Fields) -> Features:
    """Returns the fields of Mistral 4, whose RoPE may state the rotated share of a head."""
    rope = dict(rope_fields(f).raw)
    share = rope.pop("partial_rotary_factor", None)
    rotated = f.integer("qk_rope_head_dim", high=2**16)
    head_dim = f.integer("qk_nope_head_dim", high=2**16) + rotated
    if share not in (None, rotated / head_dim):
        expected = f"{rotated / head_dim:g}, the share of qk_rope_head_dim"
        raise rope_fields(f).error("partial_rotary_factor", expected, repr(share)[:60])
    f = Fields(
        {**f.raw, "rope_scaling": None, "rope_parameters": rope}, f.defaults, f.where
    )
    adjacent = f.flag("rope_interleave")
    attention = latent_attention(f, adjacent=adjacent, further=GROWTH)
    experts = layers_with_shared_experts(f, _normalized_router, first_dense(f))
    return attention | query_growth(f, attention["ropes"][0]) | experts


def _normalized_router(f: Fields, counts: Features) -> RouterSpec:
    """Returns the router of Mistral 4, which selects groups by their two best experts."""
    normalize = f.flag("norm_topk_prob")
    scale = f.number("routed_scaling_factor")
    return RouterSpec("softmax", normalize, False, *expert_groups(f, counts), scale)


MISTRAL4 = Family(
    "mistral4",
    "Mistral4ForCausalLM",
    _mistral4,
    (
        *rows.hf(rows.PRE_NORMS, LATENT_ATTENTION),
        *rows.hf_modules({"ffn/experts_ffn/router": "mlp.gate"}),
        # Files hold the experts of a layer as two stacks.
        rows.hf_row(
            "mlp.experts.gate_up_proj",
            "ffn/experts_ffn/gate_proj/kernel",
            "ffn/experts_ffn/up_proj/kernel",
            change="transpose",
        ),
        rows.hf_row(
            "mlp.experts.down_proj",
            "ffn/experts_ffn/down_proj/kernel",
            change="transpose",
        ),
        *SHARED_AND_DENSE,
    ),
    hf_defaults(
        n_kv_heads=32,
        max_positions=1_048_576,
        moe_intermediate_size=2048,
        n_shared_experts=1,
        n_routed_experts=128,
        routed_scaling_factor=1.0,
        kv_lora_rank=256,
        q_lora_rank=1024,
        qk_rope_head_dim=64,
        v_head_dim=128,
        qk_nope_head_dim=64,
        n_group=1,
        topk_group=1,
        experts_per_token=4,
        first_k_dense_replace=0,
        norm_topk_prob=True,
        rope_interleave=True,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 128.0,
            "original_max_position_embeddings": 8192,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    unserved_in_vllm=_UNSERVED,
)


# ---------------------------------------------------------------- Youtu


def _youtu(f: Fields) -> Features:
    return latent_attention(f, adjacent=f.flag("rope_interleave"))


YOUTU = Family(
    "youtu",
    "YoutuForCausalLM",
    _youtu,
    rows.hf(rows.PRE_NORMS, LATENT_ATTENTION, rows.FFN),
    hf_defaults(
        n_kv_heads=16,
        max_positions=131_072,
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_rope_head_dim=64,
        v_head_dim=128,
        qk_nope_head_dim=128,
        rope_interleave=True,
        tie_embeddings=True,
    ),
    GGUF(
        "deepseek2",
        rows.gguf(rows.GGUF_PRE, _GGUF_ATTENTION, rows.GGUF_FFN),
        _gguf_latents,
        lambda r: not r.get("expert_count", int, 0),
        _UNSERVED_IN_GGUF,
    ),
    unserved_in_vllm=_UNSERVED,
)
