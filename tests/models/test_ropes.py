"""Norms, rotary tables and scalings of RoPE against torch and transformers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.parts import RMSNorm
from nalora_jax.models.ropes import (
    RopeSpec,
    context_length,
    query_scales,
    rope_table,
    sequence_lengths,
    sharing_length,
    switch_length,
)
from nalora_jax.models.scaled_ropes import rope_settings, set_rope_scaling
from tests.models.test_families import FULL, SIZES, SLIDING, rope

TO_LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_rms_norm_of_bf16_is_computed_in_float32():
    x = jnp.full((1, 512), 300.0, jnp.bfloat16)  # 512 * 300^2 has no bf16 sum worth the name
    y = RMSNorm(1e-6, dtype="bfloat16").apply({"params": {"scale": jnp.ones(512, jnp.bfloat16)}}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), 1.0)


SHORT = {**SIZES, "model_type": "llama", "hidden_act": "silu", "max_position_embeddings": 16}
SCALED = {**SHORT, "max_position_embeddings": 64, "rope_theta": 1e4}
SCALED["rope_scaling"] = {
    "rope_type": "llama3",
    **TO_LLAMA3,
    "original_max_position_embeddings": 16,
}
WINDOWED = {**SIZES, "model_type": "gemma3_text", "max_position_embeddings": 32}
WINDOWED |= {"head_dim": 16, "sliding_window": 8, "layer_types": [SLIDING, FULL] * 2}
GEMMA3 = {**WINDOWED, "rope_theta": 1e5, "rope_local_base_freq": 1e3}
GEMMA3["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
MINISTRAL = {**SHORT, "model_type": "ministral3", "head_dim": 16}
MINISTRAL["rope_parameters"] = rope(
    "yarn", factor=3.0, original_max_position_embeddings=6, llama_4_scaling_beta=0.6
)
NESTED = {
    **WINDOWED,
    "rope_parameters": {FULL: rope("default", 1e5), SLIDING: rope("default", 1e3)},
}


@pytest.mark.parametrize(
    ("raw", "text", "context"),
    [
        (SHORT, "yarn:factor=4", 64),
        (SHORT, "linear:factor=3", 48),
        (SHORT, "yarn:factor=4,beta_fast=8,truncate=false,original_max_position_embeddings=12", 48),
        (SHORT, "llama3:factor=4,low_freq_factor=1,high_freq_factor=4", 64),
        (SCALED, "llama3:factor=8", 128),
        (GEMMA3, "linear:factor=4", 64),
        (NESTED, "yarn:factor=2", 64),
        (MINISTRAL, "dynamic:factor=8", 48),
        (MINISTRAL, "yarn:factor=8,original_max_position_embeddings=16", 128),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rotations_beyond_the_limit_equal_transformers(raw, text, context):
    changed = set_rope_scaling(raw, text, "config.json")
    ours = ModelConfig.from_hf(changed)
    assert ours.max_positions == context > ModelConfig.from_hf(raw).max_positions
    theirs = transformers.AutoConfig.for_model(**changed)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs).model
    rotary = type(model.rotary_emb)(theirs)
    positions = np.arange(context)[None]
    kinds = getattr(rotary, "layer_types", None) or [None]
    for index, kind in enumerate(sorted(set(kinds), key=str)):
        table = rope_table(
            ours.ropes[index], positions, sequence_lengths(positions, np.ones_like(positions))
        )
        more = {} if kind is None else {"layer_type": kind}
        cosines, sines = rotary(torch.zeros(1, 1), torch.tensor(positions), **more)
        half = table.shape[-1]
        np.testing.assert_allclose(table[0], cosines[..., :half], atol=2e-5)
        np.testing.assert_allclose(table[1], sines[..., :half], atol=2e-5)
    if ours.query_growth:
        names = "llama_4_scaling_beta", "original_max_position_embeddings"
        settings = (theirs.rope_parameters[name] for name in names)
        scales = get_llama_4_attn_scale(torch.tensor(positions), *settings)[:, 0]
        grown = query_scales(positions, ours.query_growth, ours.growth_length)
        np.testing.assert_allclose(grown[0], scales.flatten(), rtol=1e-6)


def test_settings_for_other_tools_are_the_changed_fields():
    changed = set_rope_scaling(NESTED, "yarn:factor=2", "config.json")
    full = {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 1e5,
    }
    expected = {
        "full_attention": full,
        "sliding_attention": NESTED["rope_parameters"]["sliding_attention"],
    }
    assert rope_settings(changed) == {"rope_parameters": expected, "max_position_embeddings": 64}
    scaled = set_rope_scaling(
        {"model_type": "gemma3", "text_config": NESTED}, "yarn:factor=2", "config.json"
    )
    assert rope_settings(scaled)["rope_parameters"] == expected


PHI3 = {**SHORT, "model_type": "phi3"}
UNROTATED = {**SHORT, "model_type": "smollm3", "no_rope_layers": [0] * 4}


@pytest.mark.parametrize(
    ("raw", "text", "message"),
    [
        (SHORT, "ntk:factor=2", "linear, dynamic, yarn, llama3, found 'ntk:factor=2'"),
        (SHORT, "linear:factor=two", "a number of 0 or more as factor"),
        (SHORT, "yarn:factor=2,truncate=1", "true or false as truncate"),
        (SHORT, "llama3:factor=2", "low_freq_factor"),
        (SCALED, "yarn:factor=2", "a context of at least 64 tokens, the model's, found 32"),
        (PHI3, "yarn:factor=2", "phi3, whose files have no scaling except longrope"),
        (UNROTATED, "yarn:factor=2", "no layer with RoPE"),
    ],
)
def test_scalings_that_cannot_be_are_refused(raw, text, message):
    with pytest.raises(NaloraError, match="--model.rope-scaling") as caught:
        set_rope_scaling(raw, text, "config.json")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_theta": 1.0}, "rope_theta: expected a number above 1, found 1"),
        (TO_LLAMA3 | {"rope_type": "llama3", "high_freq_factor": 1.0}, "more than low_freq_factor"),
        ({"rope_type": "dynamic", "factor": 0.5}, "factor: expected 1 or more, found 0.5"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor: expected 1 or more, found 0.5"),
        ({"rope_type": ["yarn"]}, r"rope_type: expected one of default, .*, found \['yarn'\]"),
        (
            {"rope_type": "linear", "factor": 2.0, "beta_fast": 8.0},
            "'linear' has no such parameter",
        ),
        ({FULL: rope("default")}, "expected one rotary embedding, found one per kind of layer"),
        (
            {"partial_rotary_factor": 0.5},
            "expected 1: this family rotates all dimensions, found 0.5",
        ),
    ],
)
def test_parameters_that_cannot_be_are_refused(parameters, message):
    whole = {"rope_type": "default", "rope_theta": 1e4} | parameters
    with pytest.raises(NaloraError, match=message):
        ModelConfig.from_hf(SHORT | {"rope_parameters": whole})


GEMMA4 = {**WINDOWED, "model_type": "gemma4_text"}
LONG = rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)


@pytest.mark.parametrize(
    ("raw", "parameters", "message"),
    [
        (SHORT | {"head_dim": 2}, rope("dynamic", factor=2.0), "more than 2 dimensions for 'dynamic', found 2"),
        (GEMMA4, {FULL: rope("proportional", partial_rotary_factor=1.5), SLIDING: rope("default")},
         "full_attention: partial_rotary_factor: expected a share from 0 to 1, found 1.5"),
        (WINDOWED, {FULL: [1e4]}, "rope_parameters: full_attention: expected a JSON object"),
        (PHI3, LONG | {"long_factor": None}, "long_factor: expected 4 numbers above 0"),
        (PHI3, LONG | {"short_factor": [1.0, 0.0, 1.0, 1.0]}, "short_factor: expected 4 numbers above 0"),
    ],
)  # fmt: skip
def test_parameters_that_a_family_cannot_have_are_refused(raw, parameters, message):
    with pytest.raises(NaloraError, match=message):
        ModelConfig.from_hf(raw | {"rope_parameters": parameters})


def test_the_context_of_a_dynamic_scaling_starts_at_the_models_maximum():
    dynamic = RopeSpec(8, kind="dynamic", factor=3.0, max_positions=16)
    assert context_length((RopeSpec(8), dynamic), 16) == 48
    assert context_length((RopeSpec(8, kind="linear", factor=3.0),), 16) == 16
    longrope = RopeSpec(8, kind="longrope", max_positions=32)
    assert sharing_length((RopeSpec(8), dynamic, longrope)) == 16
    assert switch_length((RopeSpec(8), dynamic, longrope)) == 32
    assert switch_length((dynamic,)) is None is sharing_length((RopeSpec(8),))
