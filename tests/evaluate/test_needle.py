"""The grid of needle retrieval: lengths in tokens, accuracy by cell, comparison."""

from __future__ import annotations

import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.evaluator import compare_records
from nalora_jax.evaluate.intervals import wilson
from nalora_jax.evaluate.needle import needle_answers, needle_items, needle_summary
from nalora_jax.report.sections import needle_cells
from nalora_jax.report.tables import text_table
from tests.data.test_tasks import HAYSTACK

LENGTHS = (520, 800)


@pytest.fixture(scope="module")
def questions(tokenizer):
    return needle_items(tokenizer, LENGTHS, per_cell=2, haystack=HAYSTACK)


class Deep:
    """Finds needles from a depth on; elsewhere it gives the first number of the text."""

    max_length = 1000

    def __init__(self, questions, first):
        every = [item for items in questions.values() for item in items]
        self.answers = {
            tuple(item.prompt_ids): f"{item.completion} More 12."
            if i // 2 % 5 >= first
            else " 7654321."
            for i, item in enumerate(every)
        }

    def generate(self, prompts, **settings):
        assert settings["stop"] == ("\n",)
        return [self.answers[tuple(prompt)] for prompt in prompts]


def test_prompts_have_the_length_in_tokens(questions, tokenizer):
    longest = max(len(tokenizer.encode(f" {sentence}")) for sentence in HAYSTACK)
    for length in LENGTHS:
        sizes = [len(item.prompt_ids) + len(item.completion_ids) for item in questions[length]]
        assert len(sizes) == 5 * 2
        assert length - longest - 1 < min(sizes) <= max(sizes) <= length


def test_accuracy_by_length_and_depth(questions):
    records = needle_answers(Deep(questions, 2), questions)
    grid = needle_summary(records)
    assert [row["cells"] for row in grid["rows"]] == [[0, 0, 1, 1, 1]] * 2
    assert (grid["accuracy"], grid["n"], grid["depths"]) == (0.6, 20, [0, 25, 50, 75, 100])
    assert (grid["low"], grid["high"]) == wilson(12, 20)
    assert text_table(*needle_cells(grid)).splitlines() == [
        "tokens        0%    25%    50%    75%   100%    all",
        "520         0.00   0.00   1.00   1.00   1.00   0.60",
        "800         0.00   0.00   1.00   1.00   1.00   0.60",
    ]
    better = compare_records(records, needle_answers(Deep(questions, 0), questions))["accuracy"]
    assert (better["gained"], better["lost"], better["difference"]) == (8, 0, 0.4)


def test_lengths_fit_the_question_and_the_context(questions, tokenizer):
    with pytest.raises(
        NaloraError, match=r"--needle: expected lengths of at least \d+ tokens, found 100"
    ):
        needle_items(tokenizer, [100], haystack=HAYSTACK)
    short = Deep(questions, 0)
    short.max_length = 800
    message = r"--needle: expected lengths of at most 784 tokens, .*; a run with --model.rope"
    with pytest.raises(NaloraError, match=message):
        needle_answers(short, questions)
