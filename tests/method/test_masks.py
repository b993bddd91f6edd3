from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalora_jax.method.rules import hard_mask, soft_mask
from nalora_jax.method.transform import (
    GateState,
    channel_factors,
    make_mechanisms,
    own_factors,
)

PATH = "layers/ffn"


def alone(rule):
    return make_mechanisms((rule,), activation="silu")


def state_with(importance, count=100, updates=None):
    updates = jnp.full(importance.shape[:-1], count, jnp.int32) if updates is None else jnp.asarray(updates)
    return GateState({"mask": {PATH: {"slope": importance}}}, {PATH: updates}, jnp.int32(count))


def gate_masks(state, rule):
    return own_factors(state, alone(rule))["mask"]


@settings(max_examples=40, deadline=None)
@given(
    levels=st.lists(st.integers(0, 3), min_size=11, max_size=11),  # few levels: many ties
    keep=st.sampled_from([0.01, 0.25, 0.5, 0.9, 1.0]),
)
def test_hard_mask_keeps_exactly_the_top_share(levels, keep):
    importance = np.float32(levels)
    mask = np.asarray(hard_mask(jnp.asarray(importance), keep))
    kept = max(1, round(keep * len(levels)))
    expected = np.zeros(len(levels), np.float32)
    expected[np.argsort(-importance, kind="stable")[:kept]] = 1  # ties go to the lower index
    np.testing.assert_array_equal(mask, expected)


def test_soft_mask_is_the_clipped_power_of_the_ratio_to_the_mean():
    importance = np.random.default_rng(1).uniform(size=(2, 50)) ** 2
    ratio = importance / importance.mean(-1, keepdims=True)
    mask = soft_mask(jnp.asarray(importance, jnp.float32), power=2.0, low=0.1, high=3.0)
    np.testing.assert_allclose(mask, np.clip(ratio**2, 0.1, 3.0), rtol=1e-5)
    assert (mask == np.float32(0.1)).any()
    assert (mask == 3).any()
    np.testing.assert_array_equal(soft_mask(jnp.zeros((1, 4)), 2.0, 0.1, 3.0), jnp.ones((1, 4)))


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_no_mask_during_warmup(kind):
    importance = jnp.asarray(np.random.default_rng(2).uniform(size=(2, 8)), jnp.float32)
    rule = f"{kind}:warmup=3"
    masks = jax.jit(lambda state: gate_masks(state, rule))  # the count is traced
    for count in range(5):
        mask = masks(state_with(importance, count))[PATH]
        assert (mask == 1).all() == (count < 3)
        assert mask.dtype == jnp.float32


def test_where_the_mask_acts_and_how_long_it_is():
    importance = jnp.asarray(np.random.default_rng(5).uniform(size=(2, 8)), jnp.float32)
    for rule in ("soft:power=2", "hard:keep=0.3"):
        factors = channel_factors(state_with(importance), alone(rule))
        assert set(factors) == {"gradient_a", "update_b"}
        for place in factors.values():
            np.testing.assert_allclose(jnp.mean(place[PATH] ** 2, axis=-1), np.ones(2), rtol=1e-6)
    assert set(channel_factors(state_with(importance), alone("soft:mask_gradient=false"))) == {"update_b"}
