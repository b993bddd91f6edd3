from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalora_jax.method import activations, rules
from nalora_jax.method.rules import HomogeneityStep, homogeneity_scale
from nalora_jax.method.transform import GateState, make_mechanisms, own_factors

PATH, SILU = "layers/ffn", activations.partition("silu")
RULE = HomogeneityStep(warmup=0)


def shares(seed, *shape):
    return np.moveaxis(np.random.default_rng(seed).dirichlet(np.ones(4), size=shape), -1, -2)


def state_with(occupancy, count=100):
    occupancy = jnp.asarray(occupancy, jnp.float32)
    updates = jnp.full(occupancy.shape[:-2], count, jnp.int32)
    return GateState({"step_scale": {PATH: {"occupancy": occupancy}}}, {PATH: updates}, jnp.int32(count))


def step_scales(state, rule, activation="silu"):
    return own_factors(state, make_mechanisms((rule,), activation=activation))["step_scale"]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), gains=st.tuples(*[st.floats(0.1, 5.0)] * 4))
def test_scale_is_the_normalised_mean_gain(seed, gains):
    occupancy = shares(seed, 3, 7)
    raw = np.einsum("lkc,k->lc", occupancy, gains)
    scale = homogeneity_scale(jnp.asarray(occupancy, jnp.float32), gains)
    np.testing.assert_allclose(scale, raw / raw.mean(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(scale.mean(-1), np.ones(3), rtol=1e-6)


def test_scales_of_a_state_and_warmup():
    occupancy = shares(0, 2, 6)
    expected = homogeneity_scale(jnp.asarray(occupancy, jnp.float32), RULE.gains)
    rule = HomogeneityStep(warmup=2)
    scales = jax.jit(lambda state: step_scales(state, rule))  # the count is traced
    for count in range(4):
        scale = scales(state_with(occupancy, count))[PATH]
        np.testing.assert_allclose(scale, expected if count >= 2 else np.ones((2, 6)), rtol=1e-6)
    off = make_mechanisms((), activation="silu")
    assert off.entries == ()


def test_only_layers_whose_tokens_occupy_two_regions_are_scaled():
    occupancy = np.zeros((2, 4, 5))
    occupancy[0, 2] = 1  # the first layer lies wholly in the expanding region
    occupancy[1] = shares(1, 5)
    scale = step_scales(state_with(occupancy), RULE)[PATH]
    np.testing.assert_array_equal(scale[0], np.ones(5))
    assert (scale[1] != 1).all()
    barely = np.zeros((1, 4, 5))
    barely[:, 2], barely[:, 1, 0] = 1, 0.05  # 0.05 of one channel in five is 0.01 of the layer
    assert (step_scales(state_with(barely), RULE)[PATH] == 1).all()
    fine = HomogeneityStep(warmup=0, min_occupancy=0.005)
    assert (step_scales(state_with(barely), fine)[PATH] != 1).all()


@pytest.mark.parametrize("name", ["relu", "relu2", "identity"])
def test_constant_without_a_meaningful_partition_and_said_once(name, caplog):
    rules._log_constant_scale.cache_clear()
    state = state_with(shares(2, 2, 6))
    with caplog.at_level(logging.INFO, logger="nalora_jax"):
        for _ in range(3):
            assert (step_scales(state, RULE, name)[PATH] == 1).all()
    assert [record.getMessage() for record in caplog.records] == [
        f"step scale: {name} has no meaningful effective-homogeneity partition, so the scale is 1"
    ]
