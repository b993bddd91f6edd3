"""Generation and scoring across the length at which LongRoPE changes its factors, against transformers."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from nalora_jax.evaluate.generate import Generator
from nalora_jax.evaluate.likelihood import score_groups
from tests.models.family_fields import ORIGINAL
from tests.models.test_families import LONGROPE, SIZES, Case, build, reference
from tests.tiny import byte_tokenizer

# Prompts that end 0 to 12 tokens before the switch, and two after it.
LENGTHS = range(ORIGINAL - 12, ORIGINAL + 3)
NEW_TOKENS = 15
PHI3 = Case(
    "phi3",
    "LongRoPE without a window",
    {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL},
    one_length=True,
)


@pytest.fixture(scope="module")
def pair():
    return build(PHI3)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(1, SIZES["vocab_size"], length).tolist() for length in LENGTHS]


def complete(pair, prompts: list[list[int]], **settings) -> list[list[int]]:
    generator = Generator(pair.model, {"params": pair.params}, byte_tokenizer())
    return [
        list(row.ids)
        for row in generator.complete(prompts, max_new_tokens=NEW_TOKENS, stop_ids=(), **settings)
    ]


def theirs(pair, prompt: list[int]) -> list[int]:
    with torch.no_grad():
        ids = pair.theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return ids[0, len(prompt) :].tolist()


def test_greedy_tokens_across_the_switch_equal_transformers(pair, prompts):
    assert complete(pair, prompts, batch_size=6) == [theirs(pair, prompt) for prompt in prompts]


def test_choices_that_cross_the_switch_score_as_transformers_scores_them(pair):
    rng = np.random.default_rng(4)
    context = rng.integers(1, SIZES["vocab_size"], ORIGINAL - 2).tolist()
    choices = [rng.integers(1, SIZES["vocab_size"], length).tolist() for length in (2, 3, 4, 9)]
    scores = score_groups(pair.model, {"params": pair.params}, [[(context, choice) for choice in choices]])[
        0
    ]
    for score, choice in zip(scores, choices, strict=True):
        logits = jax.nn.log_softmax(
            reference(pair, np.array([[*context, *choice[:-1]]]))[0, len(context) - 1 :]
        )
        expected = float(np.asarray(logits)[np.arange(len(choice)), choice].sum())
        np.testing.assert_allclose(score.log_prob, expected, rtol=1e-4)
