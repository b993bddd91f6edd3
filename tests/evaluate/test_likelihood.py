"""Log-likelihoods against transformers, of groups whose texts share a prefix."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from nalora_jax.errors import NaloraError
from nalora_jax.evaluate import likelihood
from nalora_jax.evaluate.likelihood import _stems_and_tails, score_groups, split_group
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from tests.models.family_fields import LATENT, TINY
from tests.param_trees import init_params


def random_groups(count: int) -> list:
    """Questions of 1 to 4 choices; some contexts of one token, some differing within the
    question."""
    rng = np.random.default_rng(0)
    groups = []
    for i in range(count):
        context = rng.integers(0, 256, [1, 9, 22][i % 3]).tolist()
        pairs = [
            (context, rng.integers(0, 256, rng.integers(1, 7)).tolist()) for _ in range(1 + i % 4)
        ]
        if i % 2:
            half = context[: len(context) // 2]
            pairs = [(half + [100 + j] * (j + 1), pairs[0][1]) for j in range(len(pairs))]
        groups.append(pairs)
    return groups


def test_log_likelihoods_equal_transformers(model, variables, torch_log_probs, llama):
    """Two calls with groups of one layout share a program."""
    ids = [5, 77, 3]
    for _ in range(4):
        with torch.no_grad():
            likeliest, second = llama(torch.tensor([ids])).logits[0, -1].topk(2).indices.tolist()
        ids.append(likeliest)
    greedy = [(ids[:3], ids[3:]), (ids[:3], [*ids[3:-1], second])]
    inside = [
        ([5], [6, 7]),
        ([5, 6], [7]),
    ]  # a continuation that begins as the other's context ends
    groups = [*random_groups(10), greedy, inside]
    before, options = _stems_and_tails._cache_size(), {"fitting": groups, "batch_tokens": 48}
    scores = [
        row
        for part in (groups[:7], groups[7:])
        for row in score_groups(model, variables, part, **options)
    ]
    assert _stems_and_tails._cache_size() == before + 1
    for row, pairs in zip(scores, groups, strict=True):
        for score, (context, continuation) in zip(row, pairs, strict=True):
            expected, is_greedy = torch_log_probs(context, continuation)
            np.testing.assert_allclose(score.log_prob, expected.sum(), rtol=1e-5, atol=1e-5)
            assert (score.tokens, score.greedy) == (len(continuation), is_greedy)
    assert [score.greedy for score in scores[-2]] == [True, False]


def test_what_all_texts_share_is_computed_once():
    split = split_group(0, [([5, 6, 7], [8]), ([5, 6, 7], [9, 8])])
    assert (split.stem, split.tails, split.targets) == ([5, 6], [[7], [7, 9]], [[8], [9, 8]])


def test_nothing_to_score_is_an_error_that_names_the_item(model, variables):
    for group in ([], [([], [1])], [([1], [2]), ([1], [])]):
        with pytest.raises(NaloraError, match="evaluation item 1"):
            score_groups(model, variables, [[([1], [2])], group])


def test_texts_share_the_latents_of_a_prefix(monkeypatch):
    """The log-likelihoods equal those of texts that are computed alone."""
    config = ModelConfig.from_hf(TINY | LATENT | {"model_type": "youtu", "vocab_size": 256})
    assert likelihood._longest_sharing(config) is None
    model = Decoder(config)
    variables = {"params": init_params(config, jax.random.key(0))}
    groups = random_groups(10)
    shared = score_groups(model, variables, groups, batch_tokens=48)
    monkeypatch.setattr(likelihood, "_longest_sharing", lambda _: 0)
    alone = score_groups(model, variables, groups, batch_tokens=48)
    for ours, theirs in zip(shared, alone, strict=True):
        for score, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(score.log_prob, expected.log_prob, rtol=1e-5, atol=1e-5)
