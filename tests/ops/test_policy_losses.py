"""Losses and advantages of policy gradients equal those of TRL's trainers; see
trl_policy_losses.py."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.ops.policy_losses import (
    CLIPS,
    Correction,
    PolicyLoss,
    advantages,
    denominator,
    divergence_penalty,
    importance_weights,
    policy_loss,
)

TRL = json.loads(Path(__file__).with_name("trl_policy_losses.json").read_text())


@pytest.mark.parametrize("case", TRL["cases"], ids=lambda case: f"{case['name']}-{case['beta']}")
def test_loss_gradient_and_advantages_are_those_of_trl(case):
    name, beta = case["name"], case["beta"]
    given = [np.array(case[key], float) for key in ("old", "base", "mask")]
    rewards = np.array(case["rewards"], float)
    if name == "rloo":
        rewards = rewards - divergence_penalty(*given, beta).reshape(rewards.shape)
    gains, settings = advantages(rewards, name), PolicyLoss(name, *CLIPS[name], TRL["length"], beta)
    with jax.enable_x64(True):
        old, base, mask = map(jnp.array, given)

        def mean(log_probs: jax.Array) -> jax.Array:
            losses = policy_loss(
                log_probs, old, base if beta else None, mask, jnp.array(gains.ravel()), settings
            )
            return losses.loss / denominator(mask, jnp.ones(len(mask)), settings)

        loss, gradient = jax.value_and_grad(mean)(jnp.array(case["log_probs"], float))
    np.testing.assert_allclose(
        gains, case["advantages"], rtol=1e-7, atol=1e-12
    )  # TRL sums in float32
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-6)  # "dapo" divides by a float32
    np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-6, atol=1e-12)


CORRECTED = json.loads(Path(__file__).with_name("trl_corrections.json").read_text())
OF_TOKENS = [case for case in CORRECTED["cases"] if case["mode"] != "whole"]


@pytest.mark.parametrize("case", OF_TOKENS, ids=lambda case: f"{case['name']}-{case['mode']}")
def test_importance_weights_and_corrected_losses_are_those_of_trl(case):
    """See trl_corrections.py."""
    name, beta = case["name"], case["beta"]
    settings = PolicyLoss(name, *CLIPS[name], CORRECTED["length"], beta)
    with jax.enable_x64(True):
        keys = ("old", "sampled", "base", "mask", "advantages")
        old, sampled, base, mask, gains = (jnp.array(case[key], float) for key in keys)
        weights = importance_weights(old, sampled, mask, correction_of(case), name).weights

        def mean(log_probs: jax.Array) -> jax.Array:
            of_base = base if beta else None
            losses = policy_loss(log_probs, old, of_base, mask, gains, settings, weights)
            return losses.loss / denominator(mask, jnp.ones(len(mask)), settings)

        loss, gradient = jax.value_and_grad(mean)(jnp.array(case["log_probs"], float))
    expected = np.array(case["weights"])
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert (expected == 0).any() or (expected == case["correction"]["clip"]).any()
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-6, atol=1e-9)  # float32 in "dapo"
    np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-6, atol=1e-12)


def correction_of(case):
    settings = case["correction"]
    return Correction(settings["clip"], tuple(settings.get("tokens", ())))


def test_a_whole_sample_of_rloo_has_trls_weight_of_a_sequence():
    (case,) = (case for case in CORRECTED["cases"] if case["mode"] == "whole")
    with jax.enable_x64(True):
        arrays = (jnp.array(case[key], float) for key in ("old", "sampled", "mask"))
        weights = importance_weights(*arrays, correction_of(case), "rloo").weights
    np.testing.assert_allclose(weights, case["weights"], rtol=1e-12)
    assert weights.shape == (len(case["mask"]), 1)


def test_samples_are_masked_by_the_geometric_mean_of_their_weights():
    """SkyRL's "geometric" metric: exp of the mean log-ratio, within a range."""
    rng = np.random.default_rng(0)
    old, sampled = rng.normal(size=(2, 50, 7)) * 0.05
    mask = (np.arange(7) < rng.integers(0, 8, (50, 1))).astype(float)
    counts = np.maximum(mask.sum(1), 1)
    means = np.exp(((old - sampled) * mask).sum(1) / counts)
    inside = (means >= 0.99) & (means <= 1.01)
    assert 5 < inside.sum() < 45
    with jax.enable_x64(True):
        found = importance_weights(old, sampled, mask, Correction(0.0, (), (0.99, 1.01)), "grpo")
    np.testing.assert_array_equal(np.array(found.in_samples)[:, 0], inside)
    np.testing.assert_array_equal(found.weights, inside[:, None] * np.ones((50, 7)))
    np.testing.assert_allclose(found.ratio, np.exp((old - sampled) * mask))
