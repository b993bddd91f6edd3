"""Vectors of texts and losses of heads and embeddings against torch in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nalora_jax.ops.pooled_losses import (
    POOLINGS,
    contrastive_losses,
    cosine_losses,
    label_losses,
    pool_segments,
    reward_losses,
)

SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0], [1, 2, 2, 3, 3, 3]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 2]], np.int32)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_vector_is_of_its_segment_alone(pooling):
    hidden = draw(0, 3, 6, 4).astype(np.float32)
    vectors = pool_segments(hidden, SEGMENTS, POSITIONS, 3, pooling)
    for row in range(3):
        for segment in range(3):
            own = hidden[row][SEGMENTS[row] == segment + 1]
            expected = np.zeros(4, np.float32)
            if len(own):
                expected = {"last": own[-1], "first": own[0], "mean": own.mean(0)}[pooling]
            np.testing.assert_allclose(vectors[row, segment], expected, atol=1e-6)


def torch_label_losses(logits, labels, form):
    """As transformers' heads: cross-entropy, BCEWithLogitsLoss and MSELoss."""
    functions = torch.nn.functional
    if form == "one":
        return functions.cross_entropy(logits, labels.argmax(-1))
    if form == "several":
        return functions.binary_cross_entropy_with_logits(logits, labels)
    return functions.mse_loss(logits, labels)


@pytest.mark.parametrize("form", ["one", "several", "score"])
def test_losses_and_gradients_of_labels_are_those_of_transformers_heads(form):
    logits = 3 * draw(1, 5, 4)
    labels = np.eye(4)[[0, 3, 1, 1, 2]]
    if form == "several":
        labels = (draw(2, 5, 4) > 0).astype(float)
    if form == "score":
        labels = draw(2, 5, 4)

    def loss(logits):
        return label_losses(logits, jnp.asarray(labels), form).mean()

    value, slope = jax.value_and_grad(loss)(jnp.asarray(logits))
    theirs = torch.tensor(logits, requires_grad=True)
    expected = torch_label_losses(theirs, torch.tensor(labels), form)
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(slope, theirs.grad, rtol=1e-10, atol=1e-14)


def test_losses_and_gradients_of_rewards_are_trl_s_formula():
    """`RewardTrainer.compute_loss` of TRL 1.16, with margins and the centering coefficient;
    tests/kinds/test_reward_trl.py runs the trainer itself."""
    rewards, margins = draw(3, 6, 2), np.abs(draw(4, 6))

    def loss(rewards):
        return reward_losses(rewards, margins, 0.3).mean()

    value, slope = jax.value_and_grad(loss)(jnp.asarray(rewards))
    theirs = torch.tensor(rewards, requires_grad=True)
    chosen, rejected = theirs.T
    expected = -torch.nn.functional.logsigmoid(chosen - rejected - torch.tensor(margins)).mean()
    expected += 0.3 * torch.mean((chosen + rejected) ** 2)
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(slope, theirs.grad, rtol=1e-10, atol=1e-14)


def test_contrastive_losses_are_cross_entropies_over_all_real_groups():
    """As MultipleNegativesRankingLoss of sentence-transformers: every positive and negative of the
    batch is a candidate; padding is none, and has no gradient."""
    vectors = draw(5, 5, 3, 8)
    vectors[3] = 0
    real = np.array([1.0, 1, 1, 0, 1])

    def loss(vectors):
        losses, right = contrastive_losses(vectors, jnp.asarray(real), 20.0)
        return (losses * real).sum() / 4, right

    (value, right), slope = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(vectors))
    theirs = torch.tensor(vectors[real > 0], requires_grad=True)
    unit = torch.nn.functional.normalize(theirs, dim=-1)
    anchors = unit[:, 0]
    candidates = torch.cat([unit[:, 1], unit[:, 2]])
    scores = 20.0 * anchors @ candidates.T
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(4))
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(slope[real > 0], theirs.grad, rtol=1e-9, atol=1e-12)
    assert not np.any(slope[3])
    nearest = (scores.argmax(1) == torch.arange(4)).numpy()
    np.testing.assert_array_equal(np.asarray(right)[real > 0], nearest)


def test_cosine_losses_are_squared_errors_of_cosines():
    vectors, scores = draw(6, 7, 2, 8), draw(7, 7)
    left, right = torch.tensor(vectors).unbind(1)
    expected = (torch.cosine_similarity(left, right) - torch.tensor(scores)) ** 2
    np.testing.assert_allclose(cosine_losses(jnp.asarray(vectors), scores), expected, rtol=1e-10)
