"""Losses of preferences equal those of TRL's trainers; see trl_preference_losses.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.config import PreferenceConfig
from nalora_jax.ops.preference_losses import (
    LOSSES,
    AnswerScores,
    PairLosses,
    label_figures,
    pair_losses,
    pair_weights,
)

TRL = json.loads(Path(__file__).with_name("trl_preference_losses.json").read_text())


def answers_of(
    logits: jax.Array, base: jax.Array, labels: jax.Array, weighted: bool = False
) -> AnswerScores:
    """Returns the answers whose tokens, after the first, have these logits."""
    targets = labels[..., 1:]
    real = targets >= 0

    def log_probs(values: jax.Array) -> jax.Array:
        table = jax.nn.log_softmax(values[..., :-1, :])
        picked = jnp.take_along_axis(table, jnp.maximum(targets, 0)[..., None], axis=-1)
        return jnp.sum(picked[..., 0] * real, axis=-1)

    policy = log_probs(logits)
    tokens = jnp.sum(real, axis=-1)
    weights = None
    if weighted:
        squares = jnp.sum(jax.nn.softmax(logits[..., :-1, :]) ** 2, axis=-1)
        alignments = policy - jnp.sum(jnp.log(squares) * real, axis=-1)
        weights = jax.lax.stop_gradient(pair_weights(alignments, tokens))
    return AnswerScores(policy, policy - log_probs(base), tokens, weights=weights)


def losses_of_records(answers: AnswerScores, case: dict) -> tuple[PairLosses, float]:
    """Returns the losses of records with labels, and the divergence. As in a batch, one more record
    is padding."""
    desirable = np.array([*case["desirable"], 1.0])
    real = np.array([1.0, 1.0, 1.0, 0.0])
    padded = jnp.pad(answers.ratios, ((0, 1), (0, 0)), constant_values=9.0)
    labels = label_figures(desirable, jax.lax.stop_gradient(padded), real)
    labels = labels._replace(desirable=desirable[:3])
    config = PreferenceConfig(**case["settings"])
    return pair_losses(answers._replace(labels=labels), config), labels.divergence


LABELED = [case for case in TRL["cases"] if "desirable" in case]
PAIRED = [case for case in TRL["cases"] if "desirable" not in case]


def name_of(case: dict) -> str:
    settings = case["settings"]
    named = [name for name in settings if name in ("nll_weight", "weighted")]
    return "-".join([settings["loss"], *named])


@pytest.mark.parametrize("case", PAIRED, ids=name_of)
def test_loss_gradient_and_rewards_are_those_of_trl(case):
    config = PreferenceConfig(**case["settings"])
    with jax.enable_x64(True):
        logits, base = (jnp.array(case[name], float) for name in ("logits", "base"))
        labels = jnp.array(case["labels"])

        def mean(logits: jax.Array) -> jax.Array:
            answers = answers_of(logits, base, labels, config.weighted)
            return jnp.mean(pair_losses(answers, config).loss)

        loss, gradient = jax.value_and_grad(mean)(logits)
        answers = answers_of(logits, base, labels, config.weighted)
        answers = jax.tree.map(np.asarray, answers)
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-12)
    np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-10, atol=1e-14)
    # As the evaluation calls it, on arrays of NumPy.
    losses = pair_losses(answers, config)
    assert isinstance(losses.loss, np.ndarray)
    np.testing.assert_allclose(losses.loss.mean(), case["loss"], rtol=1e-12)
    if not config.per_token:  # TRL's rewards are of whole answers
        np.testing.assert_allclose(losses.rewards, case["rewards"], rtol=1e-12)


@pytest.mark.parametrize("case", LABELED, ids=name_of)
def test_loss_gradient_and_metrics_of_records_are_those_of_trl(case):
    with jax.enable_x64(True):
        logits, base = (jnp.array(case[name], float) for name in ("logits", "base"))
        labels = jnp.array(case["labels"])

        def mean(logits: jax.Array) -> jax.Array:
            losses, _ = losses_of_records(answers_of(logits, base, labels), case)
            return jnp.mean(losses.loss)

        loss, gradient = jax.value_and_grad(mean)(logits)
        losses, divergence = losses_of_records(answers_of(logits, base, labels), case)
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-12)
    np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(divergence, case["metrics"]["kl"], rtol=1e-12)
    chosen, rejected = np.asarray(losses.rewards).mean(axis=0)
    np.testing.assert_allclose(chosen, case["metrics"]["rewards/chosen"], rtol=1e-12)
    np.testing.assert_allclose(rejected, case["metrics"]["rewards/rejected"], rtol=1e-12)


def test_some_records_of_trl_have_a_divergence():
    assert {case["metrics"]["kl"] > 0 for case in LABELED} == {False, True}


def test_every_loss_of_the_settings_is_in_the_table():
    names = get_args(get_type_hints(PreferenceConfig)["loss"])
    assert set(names) == {"none", *LOSSES}
    for loss in LOSSES.values():
        assert set(loss.settings) < set(PreferenceConfig.__dataclass_fields__)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_finite_for_answers_of_any_probability(name):
    """Padding has answers with log-probability 0."""
    log_probs = jnp.array([[0.0, 0.0], [-1e-7, -3e4], [-3e4, 0.0]])
    config = PreferenceConfig(name, beta=1.0, nll_weight=1.0)

    def total(change: jax.Array) -> jax.Array:
        answers = AnswerScores(log_probs + change, log_probs + change, jnp.ones_like(log_probs))
        labels = label_figures(jnp.ones(3), log_probs, jnp.ones(3))
        answers = answers._replace(labels=labels)
        return jnp.sum(pair_losses(answers, config).loss)

    loss, slope = jax.value_and_grad(total)(jnp.zeros_like(log_probs))
    assert np.isfinite(loss)
    assert np.isfinite(slope).all()
