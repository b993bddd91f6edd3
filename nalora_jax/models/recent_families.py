"""Readers of the ``config.json`` of families of late 2025, in the form of `families`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nalora_jax.config.rope_scaling import ORIGINAL, WITH_ORIGINAL
from nalora_jax.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families.shared import (
    FULL,
    GRANITE,
    SLIDING,
    alternating,
    attention_bias,
    base_config,
    granite_scales,
    head_dim_of,
    layer_types,
    same_window,
    windows_of,
)
from nalora_jax.models.layers import RopeSpec
from nalora_jax.models.ropes import read_ropes

_OLMO3_THETA = 500_000.0


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


def _ministral3(f: Fields, name: str) -> ModelConfig:
    beta = "llama_4_scaling_beta"
    ropes, _ = read_ropes(f, head_dim_of(f), None, further=(beta, "max_position_embeddings"))
    rope = Fields(
        f.mapping("rope_scaling") or f.mapping("rope_parameters"), {}, f"{f.where}: rope_parameters"
    )
    growth = rope.number(beta, default=0.0, zero=True)
    growing: dict[str, Any] = {}
    if growth:
        # Queries grow from the original context; dynamic scaling starts at the model's context.
        if ropes[0].kind in (*WITH_ORIGINAL, "longrope"):
            length = ropes[0].max_positions
        elif rope.get(ORIGINAL) is not None:
            length = rope.integer(ORIGINAL, high=2**30)
        else:
            raise rope.error(beta, f"0 without {ORIGINAL}", growth)
        growing = {"query_growth": growth, "growth_length": length}
    return base_config(f, name, ropes=ropes, windows=same_window(f), **growing)


def _granite_swa(f: Fields, name: str) -> ModelConfig:
    n_layers = f.integer("num_hidden_layers", high=2**10)
    kinds = layer_types(f, n_layers) or [SLIDING if i % 4 else FULL for i in range(n_layers)]
    ropes, index = _layer_ropes(f, n_layers)
    return base_config(
        f,
        name,
        ropes=ropes,
        rope_index=index,
        windows=windows_of(f, kinds),
        attn_sinks=True,
        **granite_scales(f),
        **attention_bias(f),
    )


def _layer_ropes(f: Fields, n_layers: int) -> tuple[tuple[RopeSpec, ...], tuple[int, ...]]:
    """Returns the rotary embeddings of layers with a base each; a base of 0 means no rotation."""
    (spec,), _ = read_ropes(f, head_dim_of(f), None)
    bases = f.items("layer_rope_theta", n_layers, (int, float)) or [spec.theta] * n_layers
    for base in bases:
        if base and not 1 < base < 1e30:
            raise f.error("layer_rope_theta", "numbers above 1, or 0 for no rotation", base)
    distinct = sorted({float(base) for base in bases if base}) or [spec.theta]
    index = tuple(distinct.index(base) if base else -1 for base in bases)
    return tuple(replace(spec, theta=base) for base in distinct), index


_MINISTRAL3_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

READERS: dict[str, tuple[Callable[[Fields, str], ModelConfig], dict[str, Any]]] = {
    "olmo3": (_olmo3, {"rms_norm_eps": 1e-5, "sliding_window": 4096}),
    "ministral3": (
        _ministral3,
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _MINISTRAL3_ROPE,
        },
    ),
    "granite_swa": (
        _granite_swa,
        GRANITE
        | {
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "sliding_window": 128,
        },
    ),
}
