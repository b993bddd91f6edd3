"""Log-likelihoods against transformers, and the packing of stems and tails behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.likelihood import (
    _stems_and_tails,
    choose_layout,
    make_batches,
    score_groups,
    split_group,
)


def random_groups(count: int, seed: int = 0, *, own_contexts: bool = False) -> list:
    """Questions of 1 to 4 choices; some contexts of one token, some differing within the question."""
    rng = np.random.default_rng(seed)
    groups = []
    for i in range(count):
        context = rng.integers(0, 256, [1, 9, 22][i % 3]).tolist()
        pairs = [(context, rng.integers(0, 256, rng.integers(1, 7)).tolist()) for _ in range(1 + i % 4)]
        if own_contexts and i % 2:
            half = context[: len(context) // 2]
            pairs = [(half + [100 + j] * (j + 1), pairs[0][1]) for j in range(len(pairs))]
        groups.append(pairs)
    return groups


def assert_scores_equal_torch(scores, groups, torch_log_probs):
    for row, pairs in zip(scores, groups, strict=True):
        for score, (context, continuation) in zip(row, pairs, strict=True):
            expected, greedy = torch_log_probs(context, continuation)
            np.testing.assert_allclose(score.log_prob, expected.sum(), rtol=1e-5, atol=1e-5)
            assert score.tokens == len(continuation)
            assert score.greedy == greedy


@pytest.mark.parametrize("own_contexts", [False, True])
def test_log_likelihoods_equal_transformers(model, variables, torch_log_probs, own_contexts):
    groups = random_groups(10, own_contexts=own_contexts)
    scores = score_groups(model, variables, groups, batch_tokens=64)
    assert_scores_equal_torch(scores, groups, torch_log_probs)


def test_sets_of_groups_share_one_program(model, variables, torch_log_probs):
    groups = [*random_groups(7, 1), *random_groups(5, 2)]
    before = _stems_and_tails._cache_size()
    scores = [
        *score_groups(model, variables, groups[:7], fitting=groups, batch_tokens=48),
        *score_groups(model, variables, groups[7:], fitting=groups, batch_tokens=48),
    ]
    assert _stems_and_tails._cache_size() == before + 1
    assert_scores_equal_torch(scores, groups, torch_log_probs)


def test_a_continuation_is_greedy_where_every_token_is_the_likeliest(model, variables, llama):
    ids = [5, 77, 3]
    for _ in range(4):
        with torch.no_grad():
            likeliest, second = llama(torch.tensor([ids])).logits[0, -1].topk(2).indices.tolist()
        ids.append(likeliest)
    pairs = [(ids[:3], ids[3:]), (ids[:3], [*ids[3:-1], second])]
    assert [score.greedy for score in score_groups(model, variables, [pairs])[0]] == [True, False]


@pytest.mark.parametrize("group", [[], [([], [1])], [([1], [2]), ([1], [])]])
def test_nothing_to_score_is_an_error_that_names_the_item(model, variables, group):
    with pytest.raises(NaloraError, match="evaluation item 1"):
        score_groups(model, variables, [[([1], [2])], group])


# ---------------------------------------------------------------- plan


def test_a_group_splits_after_what_all_texts_share():
    split = split_group(0, [([5, 6, 7], [8]), ([5, 6, 7], [9, 8])])
    assert (split.stem, split.tails, split.targets) == ([5, 6], [[7], [7, 9]], [[8], [9, 8]])
    split = split_group(0, [([5, 6, 1], [4]), ([5, 6, 2, 3], [4])])
    assert (split.stem, split.tails, split.scored) == ([5], [[6, 1], [6, 2, 3]], [1, 1])
    # A continuation that begins as the other's context ends is still scored.
    split = split_group(0, [([5], [6, 7]), ([5, 6], [7])])
    assert (split.stem, split.tails, split.scored) == ([], [[5, 6], [5, 6]], [2, 1])
    assert split_group(0, [([1, 2], [4]), ([2, 2], [4])]).stem == []


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 25), tokens=st.sampled_from([16, 64, 1024]))
def test_batches_hold_every_text_once_and_all_have_one_shape(seed, count, tokens):
    groups = random_groups(count, seed, own_contexts=True)
    splits = [split_group(i, pairs) for i, pairs in enumerate(groups)]
    layout = choose_layout(splits, tokens=tokens, shards=3)
    assert layout.rows % 3 == 0
    seen = {}
    for batch in make_batches(splits, layout):
        assert batch.stem["tokens"].shape == (layout.rows, layout.stem)
        assert batch.targets.shape == (layout.rows, layout.lanes, layout.tail)
        for number in np.unique(batch.owner[batch.owner >= 0]).tolist():
            row, lane, column = (int(axis[0]) for axis in np.nonzero(batch.owner == number))
            segment = batch.tails["segments"][row, lane, column]
            stem = batch.stem["segments"][row] == segment
            tail = batch.tails["segments"][row, lane] == segment
            positions = [*batch.stem["positions"][row, stem], *batch.tails["positions"][row, lane, tail]]
            text = [*batch.stem["tokens"][row, stem], *batch.tails["tokens"][row, lane, tail]]
            scored = batch.targets[row, lane][batch.owner[row, lane] == number]
            assert positions == list(range(len(text)))
            assert number not in seen
            seen[number] = (text, list(scored))
    every = [pair for pairs in groups for pair in pairs]
    assert seen == {
        number: ([*context, *continuation][:-1], continuation)
        for number, (context, continuation) in enumerate(every)
    }
