"""Answers to multiple-choice questions, by hand and against transformers."""

from __future__ import annotations

import numpy as np
import pytest

from nalora_jax.data.items import ChoiceItem
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.likelihood import Score
from nalora_jax.evaluate.multiple_choice import multiple_choice, predict
from nalora_jax.evaluate.statistics import wilson


def question(prompt: str, choices: list[str], gold: int) -> ChoiceItem:
    return ChoiceItem(list(prompt.encode()), [list(c.encode()) for c in choices], gold, prompt, choices)


QUESTIONS = [
    question("Which way is up?", [" up", " down", " sideways"], 0),
    question("Two and two", [" is four", " is five"], 0),
    question("Q", [" a", " bb", " ccc", " dddd"], 2),
    question("Left or right", [" left", " right"], 1),
]


def test_accuracy_and_loss_equal_transformers(model, variables, torch_log_probs):
    result = multiple_choice(model, variables, QUESTIONS)
    tables = [[torch_log_probs(q.prompt_ids, c)[0] for c in q.choice_ids] for q in QUESTIONS]
    answers = [int(np.argmax([t.sum() for t in row])) for row in tables]
    per_token = [int(np.argmax([t.mean() for t in row])) for row in tables]
    gold = [q.gold for q in QUESTIONS]
    right = np.concatenate([row[q.gold] for row, q in zip(tables, QUESTIONS, strict=True)])
    assert result.predictions.tolist() == answers
    assert result.correct.tolist() == [a == g for a, g in zip(answers, gold, strict=True)]
    assert result.accuracy == np.mean(result.correct)
    assert (result.low, result.high) == wilson(int(result.correct.sum()), 4)
    np.testing.assert_allclose(result.loss, -right.mean(), rtol=1e-5)
    assert multiple_choice(model, variables, QUESTIONS, per="token").predictions.tolist() == per_token
    first = result.samples[0]
    assert (first.prompt, first.expected) == ("Which way is up?", "up")
    assert first.answer == QUESTIONS[0].choices[answers[0]].strip()
    assert first.correct == (answers[0] == 0)


def test_choices_with_prompts_of_their_own(model, variables, torch_log_probs):
    prompts = [list(f"The trophy is too {x}".encode()) for x in ("big", "small")]
    ending = list(b" for the case")
    item = ChoiceItem(prompts[0], [ending, ending], 0, "...", ["big", "small"], prompts)
    expected = [torch_log_probs(prompt, ending)[0].sum() for prompt in prompts]
    result = multiple_choice(model, variables, [item])
    assert result.predictions.tolist() == [int(np.argmax(expected))]
    np.testing.assert_allclose(result.loss, -expected[0] / len(ending), rtol=1e-5)


def test_normalisation_divides_by_what_it_says():
    item = question("?", [" ab", " äö", " abcdef"], 0)
    scores = [[Score(-4.0, 2, False), Score(-5.0, 4, False), Score(-6.0, 1, False)]]
    assert predict([item], scores).tolist() == [0]
    # -4 / 2, -5 / 4, -6 / 1
    assert predict([item], scores, "token").tolist() == [1]
    # -4 / 2, -5 / 2, -6 / 6
    assert predict([item], scores, "character").tolist() == [2]
    # -4 / 2, -5 / 4, -9 / 6: an umlaut has two bytes
    longer = [[scores[0][0], scores[0][1], Score(-9.0, 1, False)]]
    assert predict([item], longer, "byte").tolist() == [1]


def test_no_questions_is_an_error(model, variables):
    with pytest.raises(NaloraError, match="at least one question"):
        multiple_choice(model, variables, [])
