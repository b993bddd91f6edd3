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
    PolicyLoss,
    advantages,
    denominator,
    divergence_penalty,
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
