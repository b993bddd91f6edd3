"""OLMo: norms of queries and keys over all heads."""

from __future__ import annotations

from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.record import GGUF, Family, Metadata
from nalora_jax.models.families.shared import (
    FULL,
    SLIDING,
    alternating,
    attention_bias,
    base_config,
    first_present,
    head_dim_of,
    layer_types,
    windows_of,
)
from nalora_jax.models.families.tensors import (
    GGUF_ATTENTION,
    GGUF_FFN,
    GGUF_POST,
    GGUF_QK,
    HF_ATTENTION,
    HF_ENDS,
    HF_OLMO2,
    HF_PRE_NORMS,
    HF_QK_NORMS,
    gguf_ends,
    gguf_norms,
    hf_experts,
)
from nalora_jax.models.ropes import read_ropes

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
    n_layers = f.integer("num_hidden_layers", high=2**10)
    kinds = layer_types(f, n_layers) or alternating(n_layers, 4)
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
    slides = r.flags("attention.sliding_window_pattern", r.number("block_count", int))
    theta = {"rope_theta": r.number("rope.freq_base", float, 10_000.0)}
    return {
        "sliding_window": r.number("attention.sliding_window", int),
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


def _olmoe(f: Fields, name: str) -> ModelConfig:
    f.refuse("clip_qkv")
    return base_config(
        f,
        name,
        qk_norm="projection",
        n_experts=f.integer(first_present(f, "num_experts", "num_local_experts"), high=2**12),
        experts_per_token=f.integer("num_experts_per_tok", high=2**12),
        norm_topk=f.flag("norm_topk_prob"),
        **attention_bias(f),
    )


OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    _olmoe,
    (*HF_ENDS, *HF_PRE_NORMS, *HF_ATTENTION, *HF_QK_NORMS, *hf_experts("mlp")),
    {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
)

FAMILIES = (OLMO2, OLMO3, OLMOE)
