"""Readers of the ``config.json`` of families of late 2025, in the form of `families`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nalora_jax.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.family_fields import (
    FULL,
    SLIDING,
    alternating,
    attention_bias,
    base_config,
    head_dim_of,
    layer_types,
    same_window,
    windows_of,
)
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
    """Refuses the forms of OLMo 3's rotary parameters that releases of transformers read differently."""
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
    scaling = f.mapping("rope_scaling") or f.mapping("rope_parameters")
    growth = Fields(scaling, {}, f"{f.where}: rope_parameters").number(beta, default=0.0, zero=True)
    if growth and not ropes[0].max_positions:
        raise f.error(f"rope_parameters: {beta}", "0 without a rope_type that has an original context", growth)
    return base_config(
        f,
        name,
        ropes=ropes,
        windows=same_window(f),
        query_growth=growth,
        growth_length=ropes[0].max_positions if growth else 0,
    )


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
}
