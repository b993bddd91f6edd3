"""The rules' formulas: masks, step scales by homogeneity, and the cap on steps of curved channels."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalora_jax.method import rules
from nalora_jax.method.rules import CurvatureCap, HomogeneityStep, Mechanism
from nalora_jax.method.transform import GateState, make_mechanisms, own_factors

PATH = "layers/ffn"


def factors_of(rule: Mechanism, activation: str = "silu", **averages: np.ndarray) -> jax.Array:
    """Returns a rule's factors ``[layers, channels]`` after one step with these averages."""
    mechanisms = make_mechanisms((rule,), activation=activation)
    ((label, _),) = mechanisms.entries
    memory = {name: jnp.asarray(value, jnp.float32) for name, value in averages.items()}
    layers = len(next(iter(memory.values())))
    state = GateState({label: {PATH: memory}}, {PATH: jnp.ones(layers, jnp.int32)}, jnp.int32(1))
    return own_factors(state, mechanisms)[label][PATH]


@settings(max_examples=40, deadline=None)
@given(
    levels=st.lists(st.integers(0, 3), min_size=11, max_size=11),  # few levels: many ties
    keep=st.sampled_from([0.01, 0.25, 0.5, 0.9, 1.0]),
)
def test_hard_mask_keeps_exactly_the_top_share(levels, keep):
    importance = np.float32(levels)
    mask = np.asarray(rules.hard_mask(jnp.asarray(importance), keep))
    kept = max(1, round(keep * len(levels)))
    expected = np.zeros(len(levels), np.float32)
    expected[np.argsort(-importance, kind="stable")[:kept]] = 1  # ties go to the lower index
    np.testing.assert_array_equal(mask, expected)


def test_soft_mask_is_the_clipped_power_of_the_ratio_to_the_mean():
    importance = np.random.default_rng(1).uniform(size=(2, 50)) ** 2
    ratio = importance / importance.mean(-1, keepdims=True)
    mask = rules.soft_mask(jnp.asarray(importance, jnp.float32), power=2.0, low=0.1, high=3.0)
    np.testing.assert_allclose(mask, np.clip(ratio**2, 0.1, 3.0), rtol=1e-5)
    assert (mask == np.float32(0.1)).any()
    assert (mask == 3).any()
    np.testing.assert_array_equal(rules.soft_mask(jnp.zeros((1, 4)), 2.0, 0.1, 3.0), jnp.ones((1, 4)))


def test_importance_by_delta_is_a_power_of_its_second_moment():
    squared = np.random.default_rng(0).uniform(0.1, 1.0, (2, 9))
    ratio = squared / squared.mean(-1, keepdims=True)
    for q in (-1.0, 0.0, 0.5):
        found = rules.delta_importance(jnp.asarray(squared, jnp.float32), q, 1e6)
        np.testing.assert_allclose(found, ratio ** (q / 2), rtol=1e-5)
    dead = rules.delta_importance(jnp.asarray([[0.0, 1.0]]), -1.0, 10.0)
    np.testing.assert_allclose(dead, [[10.0, 0.5**0.5]], rtol=1e-5)


def shares(seed, *shape):
    return np.moveaxis(np.random.default_rng(seed).dirichlet(np.ones(4), size=shape), -1, -2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), gains=st.tuples(*[st.floats(0.1, 5.0)] * 4))
def test_scale_is_the_normalised_mean_gain(seed, gains):
    occupancy = shares(seed, 3, 7)
    raw = np.einsum("lkc,k->lc", occupancy, gains)
    scale = rules.homogeneity_scale(jnp.asarray(occupancy, jnp.float32), gains)
    np.testing.assert_allclose(scale, raw / raw.mean(-1, keepdims=True), rtol=1e-5)


def test_only_layers_whose_tokens_occupy_two_regions_are_scaled():
    rule, occupancy = HomogeneityStep(warmup=0), np.zeros((2, 4, 5))
    occupancy[0, 2] = 1  # the first layer lies wholly in the expanding region
    occupancy[1] = shares(1, 5)
    scale = factors_of(rule, occupancy=occupancy)
    np.testing.assert_array_equal(scale[0], np.ones(5))
    np.testing.assert_allclose(scale[1:], rules.homogeneity_scale(jnp.float32(occupancy[1:]), rule.gains))
    barely = np.zeros((1, 4, 5))
    barely[:, 2], barely[:, 1, 0] = 1, 0.05  # 0.05 of one channel in five is 0.01 of the layer
    assert (factors_of(rule, occupancy=barely) == 1).all()
    assert (factors_of(HomogeneityStep(warmup=0, min_occupancy=0.005), occupancy=barely) != 1).all()


@pytest.mark.parametrize("name", ["relu", "identity"])
def test_constant_without_a_meaningful_partition_and_said_once(name, caplog):
    rules._log_constant_scale.cache_clear()
    with caplog.at_level(logging.INFO, logger="nalora_jax"):
        for _ in range(3):
            scale = factors_of(HomogeneityStep(warmup=0), name, occupancy=shares(2, 2, 6))
            assert (scale == 1).all()
    assert [record.getMessage() for record in caplog.records] == [
        f"step scale: {name} has no meaningful effective-homogeneity partition, so the scale is 1"
    ]


def test_channels_that_have_moved_have_the_same_factor_to_the_bit_as_min_of_one_and_tau_over_chi():
    rng = np.random.default_rng(0)
    excess, response = (jnp.asarray(10.0 ** rng.uniform(-12, 1, (4, 999)), jnp.float32) for _ in range(2))
    expected = jnp.minimum(1.0, 0.1 * response / excess)
    np.testing.assert_array_equal(rules.curvature_cap(excess, response, 0.1), expected)


def test_all_gates_of_mish_take_their_second_step_without_warm_up():
    """A fresh adapter has dz = 0, and XLA may round rho(z + 0) differently from rho(z)."""
    noise = np.full((1, 64), 1e-8)
    factors = factors_of(CurvatureCap(warmup=0), "mish", excess=noise, response=0 * noise)
    np.testing.assert_array_equal(factors, np.ones((1, 64)))
