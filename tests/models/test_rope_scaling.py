"""RoPE scaling in place of a model's, against transformers with the same ``rope_parameters``."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.models.ministral3.modeling_ministral3 import (
    Ministral3RotaryEmbedding,
    get_llama_4_attn_scale,
)

from nalora_jax.config.rope_scaling import parse_rope_scaling
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.rope_scaling import rope_settings, with_rope_scaling
from nalora_jax.models.ropes import query_scales, rope_table, sequence_lengths
from tests.models.test_families import LONGROPE, SIZES, Case, build, difference, random_tokens

LLAMA = {**SIZES, "model_type": "llama", "hidden_act": "silu", "max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 = {**LLAMA, "max_position_embeddings": 64, "rope_theta": 1e4}
LLAMA31["rope_scaling"] = {**LLAMA3, "original_max_position_embeddings": 16}
GEMMA3 = {
    **SIZES,
    "model_type": "gemma3_text",
    "head_dim": 16,
    "sliding_window": 8,
    "max_position_embeddings": 32,
}
GEMMA3 |= {
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_theta": 1e5,
    "rope_local_base_freq": 1e3,
}
GEMMA3 |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
NESTED = {name: value for name, value in GEMMA3.items() if "rope" not in name}
NESTED["rope_parameters"] = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}


@pytest.mark.parametrize(
    ("raw", "text", "context"),
    [
        (LLAMA, "yarn:factor=4", 64),
        (LLAMA, "linear:factor=3", 48),
        (LLAMA, "dynamic:factor=3", 48),
        (LLAMA, "yarn:factor=4,beta_fast=8,truncate=false,original_max_position_embeddings=12", 48),
        (LLAMA, "llama3:factor=4,low_freq_factor=1,high_freq_factor=4", 64),
        (LLAMA31, "llama3:factor=8", 128),
        (LLAMA31, "yarn:factor=5", 80),
        (GEMMA3, "linear:factor=4", 64),
        (NESTED, "yarn:factor=2", 64),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rotations_beyond_the_limit_equal_transformers(raw, text, context):
    changed = with_rope_scaling(raw, text, "config.json")
    ours = ModelConfig.from_hf(changed)
    assert ours.max_positions == context > ModelConfig.from_hf(raw).max_positions
    theirs = transformers.AutoConfig.for_model(**changed)
    rope = type(transformers.AutoModelForCausalLM.from_config(theirs).model.rotary_emb)(theirs)
    positions = np.arange(context)[None]
    kinds = getattr(rope, "layer_types", None) or [None]
    for index, kind in enumerate(sorted(set(kinds), key=str)):
        table = rope_table(
            ours.ropes[index], positions, sequence_lengths(positions, np.ones_like(positions))
        )
        more = {} if kind is None else {"layer_type": kind}
        cosines, sines = rope(torch.zeros(1, 1), torch.tensor(positions), **more)
        half = table.shape[-1]
        np.testing.assert_allclose(table[0], cosines[..., :half], atol=2e-5)
        np.testing.assert_allclose(table[1], sines[..., :half], atol=2e-5)


def test_logits_beyond_the_limit_equal_transformers():
    """The weights are of the unscaled model; transformers gets the RoPE as its user would write it."""
    config = {"max_position_embeddings": 16, "head_dim": 16}
    pair, tokens = build(Case("llama", "short context", config)), random_tokens(2, 40)
    changed = with_rope_scaling(pair.theirs.config.to_dict(), "yarn:factor=4", "config.json")
    written = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 1e4,
    }
    theirs = transformers.LlamaConfig(**SIZES | config | {"rope_parameters": written})
    reference = transformers.LlamaForCausalLM._from_config(theirs, attn_implementation="eager").eval()
    reference.load_state_dict(pair.theirs.state_dict())
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    model = Decoder(ModelConfig.from_hf(changed))

    @jax.jit
    def run(tokens):
        hidden = model.apply({"params": pair.params}, tokens)
        return model.apply({"params": pair.params}, hidden, method="unembed")

    assert difference(run(tokens), expected) < 1e-5
    assert difference(pair.logits(tokens, np.ones_like(tokens)), expected) > 1e-2


MINISTRAL = {**LLAMA, "model_type": "ministral3", "head_dim": 16}
GROWING = {"rope_theta": 1e4, "original_max_position_embeddings": 6, "llama_4_scaling_beta": 0.6}


@pytest.mark.parametrize(
    ("rope", "text"),
    [
        ({"rope_type": "dynamic", "factor": 3.0}, ""),
        ({"rope_type": "linear", "factor": 3.0}, ""),
        ({"rope_type": "default"}, ""),
        ({"rope_type": "yarn", "factor": 3.0}, ""),
        ({"rope_type": "yarn", "factor": 3.0}, "dynamic:factor=8"),
        ({"rope_type": "yarn", "factor": 3.0}, "linear:factor=8"),
        ({"rope_type": "dynamic", "factor": 3.0}, "yarn:factor=8,original_max_position_embeddings=16"),
    ],
)
def test_rotated_queries_of_ministral_3_equal_transformers_in_float64(rope, text):
    """A rotation by transformers' frequencies, times its scale of queries by position."""
    changed = with_rope_scaling({**MINISTRAL, "rope_parameters": GROWING | rope}, text, "config.json")
    ours, theirs = ModelConfig.from_hf(changed), transformers.AutoConfig.for_model(**changed)
    rotary = Ministral3RotaryEmbedding(theirs)
    positions = np.arange(40)[None]
    rotary(torch.zeros(1, 1), torch.tensor(positions))  # dynamic frequencies follow the length
    angles = positions[..., None] * rotary.inv_freq.double().numpy()
    parameters = theirs.rope_parameters
    scales = get_llama_4_attn_scale(
        torch.tensor(positions).double(),
        parameters["llama_4_scaling_beta"],
        parameters["original_max_position_embeddings"],
    )[:, 0].numpy()
    expected = np.stack([np.cos(angles), np.sin(angles)]) * rotary.attention_scaling * scales
    table = rope_table(ours.ropes[0], positions, sequence_lengths(positions, np.ones_like(positions)))
    grown = query_scales(positions, ours.query_growth, ours.growth_length)
    found = np.asarray(table) * np.asarray(grown)[..., None]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_settings_for_other_tools_are_the_changed_fields():
    changed = with_rope_scaling(NESTED, "yarn:factor=2", "config.json")
    full = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 1e5}
    expected = {"full_attention": full, "sliding_attention": NESTED["rope_parameters"]["sliding_attention"]}
    assert rope_settings(changed) == {"rope_parameters": expected, "max_position_embeddings": 64}
    seeing = with_rope_scaling(
        {"model_type": "gemma3", "text_config": NESTED}, "yarn:factor=2", "config.json"
    )
    assert rope_settings(seeing)["rope_parameters"] == expected


@pytest.mark.parametrize(
    ("raw", "text", "message"),
    [
        (LLAMA, "ntk:factor=2", "linear, dynamic, yarn, llama3, found 'ntk:factor=2'"),
        (LLAMA, "yarn:scale=2", "fields of factor, attention_factor"),
        (LLAMA, "linear:factor=two", "a number of 0 or more as factor"),
        (LLAMA, "yarn:factor=2,truncate=1", "true or false as truncate"),
        (LLAMA, "yarn", "a factor, as in yarn:factor=4"),
        (LLAMA, "llama3:factor=2", "low_freq_factor"),
        (LLAMA31, "yarn:factor=2", "a context of at least 64 tokens, the model's, found 32"),
        (
            {**LLAMA, "model_type": "phi3"},
            "yarn:factor=2",
            "phi3, whose files have no scaling except longrope",
        ),
        (
            {
                **LLAMA,
                "model_type": "phi3",
                "rope_parameters": LONGROPE,
                "original_max_position_embeddings": 8,
            },
            "yarn:factor=2",
            "phi3",
        ),
        (
            {**LLAMA, "model_type": "smollm3", "no_rope_layers": [0] * 4},
            "yarn:factor=2",
            "no layer with RoPE",
        ),
    ],
)
def test_scalings_that_cannot_be_are_refused(raw, text, message):
    with pytest.raises(NaloraError, match="--model.rope-scaling") as caught:
        with_rope_scaling(raw, text, "config.json")
    assert message in str(caught.value)


def test_numbers_keep_their_type_in_transformers():
    text = "yarn:factor=4,original_max_position_embeddings=4096,truncate=false"
    assert parse_rope_scaling(text) == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    }
