"""Norms and rotary tables against torch and transformers; the length that dynamic RoPE sees."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nalora_jax.models.config import ModelConfig
from nalora_jax.models.parts import RMSNorm
from nalora_jax.models.ropes import (
    RopeSpec,
    apply_rope,
    identity_table,
    inverse_frequencies,
    rope_table,
    sequence_lengths,
)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 256,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32768,
}
# Real models' settings, at a real head size.
SCALINGS = {
    "Llama 3.1": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "Qwen2.5 with YaRN": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_are_transformers(scaling):
    raw = {**LLAMA, "rope_parameters": scaling}
    config = transformers.AutoConfig.for_model(**raw)
    theirs, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    spec = ModelConfig.from_hf(raw).ropes[0]
    np.testing.assert_allclose(inverse_frequencies(spec), theirs.numpy(), rtol=2e-6)
    assert spec.attention_factor == pytest.approx(magnitude)


@pytest.mark.parametrize("length", [100, 33000, 100_000])
def test_dynamic_frequencies_grow_with_the_sequence(length):
    raw = {**LLAMA, "rope_parameters": SCALINGS["dynamic"]}
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](
        transformers.AutoConfig.for_model(**raw), "cpu", seq_len=length
    )
    positions = jnp.array([[1]])
    table = rope_table(ModelConfig.from_hf(raw).ropes[0], positions, jnp.array([[length]]))
    np.testing.assert_allclose(table[1, 0, 0], np.sin(theirs.numpy()), rtol=1e-4)


def test_rotation_keeps_norms_and_depends_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
    spec = RopeSpec(dim=12)

    def rotated(x, position):
        return np.asarray(apply_rope(x, rope_table(spec, jnp.array([[position]])))).ravel()

    assert rotated(q, 5) @ rotated(k, 2) == pytest.approx(rotated(q, 105) @ rotated(k, 102), rel=1e-4)
    assert np.linalg.norm(rotated(q, 7)) == pytest.approx(np.linalg.norm(q), rel=1e-6)
    np.testing.assert_array_equal(rotated(q, 7)[12:], q.ravel()[12:])


def test_identity_table_rotates_nothing():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32)
    table = identity_table(RopeSpec(dim=8), jnp.tile(jnp.arange(3), (2, 1)))
    np.testing.assert_array_equal(apply_rope(x, table), x)


def test_lengths_are_those_of_a_tokens_own_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]])
    lengths = np.asarray(sequence_lengths(positions, segments))
    assert lengths[0, :5].tolist() == [3, 3, 3, 2, 2]
    assert lengths[1, 2:].tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_is_torchs(offset):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, 5, 16)).astype(np.float32), rng.normal(size=16).astype(np.float32)
    theirs = torch.nn.functional.rms_norm(torch.tensor(x), (16,), torch.tensor(w + offset), 1e-5).numpy()
    ours = RMSNorm(1e-5, offset).apply({"params": {"scale": w}}, x)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_rms_norm_of_bf16_is_computed_in_float32():
    x = jnp.full((1, 512), 300.0, jnp.bfloat16)  # 512 * 300^2 has no bf16 sum worth the name
    y = RMSNorm(1e-6, dtype="bfloat16").apply({"params": {"scale": jnp.ones(512, jnp.bfloat16)}}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), 1.0)
