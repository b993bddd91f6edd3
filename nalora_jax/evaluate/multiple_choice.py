"""Multiple choice by log-likelihood: the answer is the most likely choice after the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from nalora_jax.data.items import ChoiceItem
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.likelihood import Score, score_groups
from nalora_jax.evaluate.statistics import wilson
from nalora_jax.models.decoder import Decoder

# Normalisation of a choice's log-likelihood.
Per = Literal["choice", "token", "character", "byte"]


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with the model's answer, for display."""

    prompt: str
    answer: str  # of the model
    expected: str
    correct: bool


@dataclass(frozen=True)
class MultipleChoiceResult:
    """Accuracy on a set of questions, with its 95% interval."""

    accuracy: float  # with the requested normalisation
    low: float
    high: float
    accuracy_per_choice: float  # by summed log-likelihood ("acc")
    loss: float  # of the correct choices, nats per token
    n: int
    predictions: np.ndarray  # int [n]: choice of each question, with the requested normalisation
    correct: np.ndarray  # bool [n], for paired comparisons
    samples: tuple[AnsweredQuestion, ...]


def score_choices(
    model: Decoder,
    variables: Mapping[str, Any],
    items: Sequence[ChoiceItem],
    *,
    mesh: Mesh | None = None,
) -> list[list[Score]]:
    """Returns the score of every choice of every question; see `score_groups` for the arguments."""
    groups = [list(zip(item.contexts, item.choice_ids, strict=True)) for item in items]
    return score_groups(model, variables, groups, mesh=mesh)


def multiple_choice(
    model: Decoder,
    variables: Mapping[str, Any],
    items: Sequence[ChoiceItem],
    *,
    per: Per = "choice",
    mesh: Mesh | None = None,
    samples: int = 3,
) -> MultipleChoiceResult:
    """Evaluates the model on all questions.

    Args:
      model: the decoder; its programs are compiled once for all adapters.
      variables: ``params``, and ``lora`` if there are adapters.
      items: the questions.
      per: normalisation of the log-likelihoods for the headline accuracy.
      mesh: mesh of the weights, if they are sharded.
      samples: number of questions to show with their answers.

    Raises:
      NaloraError: there are no questions, or one has an empty prompt or choice.
    """
    if not items:
        raise NaloraError("evaluation data", expected="at least one question", found="none")
    scores = score_choices(model, variables, items, mesh=mesh)
    gold = np.array([item.gold for item in items])
    answers = predict(items, scores, per)
    correct = answers == gold
    low, high = wilson(int(correct.sum()), len(items))
    right = [row[item.gold] for row, item in zip(scores, items, strict=True)]
    return MultipleChoiceResult(
        accuracy=float(correct.mean()),
        low=low,
        high=high,
        accuracy_per_choice=float(np.mean(predict(items, scores) == gold)),
        loss=-sum(score.log_prob for score in right) / sum(score.tokens for score in right),
        n=len(items),
        predictions=answers,
        correct=correct,
        samples=tuple(
            _sample(*row) for row in zip(items[:samples], answers[:samples].tolist(), strict=True)
        ),
    )


def predict(
    items: Sequence[ChoiceItem], scores: Sequence[Sequence[Score]], per: Per = "choice"
) -> np.ndarray:
    """Returns the most likely choice of each question, ``int [n]``; the first one of ties.

    Args:
      items: the questions.
      scores: scores of their choices.
      per: normalisation of log-likelihoods; characters and bytes are counted without outer spaces.
    """
    chosen = []
    for item, row in zip(items, scores, strict=True):
        sizes = [_size(text, score, per) for text, score in zip(item.choices, row, strict=True)]
        chosen.append(
            int(np.argmax([score.log_prob / size for score, size in zip(row, sizes, strict=True)]))
        )
    return np.array(chosen, np.int64)


def _size(text: str, score: Score, per: Per) -> int:
    text = text.strip()
    sizes = {"choice": 1, "token": score.tokens, "character": len(text), "byte": len(text.encode())}
    return max(sizes[per], 1)


def _sample(item: ChoiceItem, answer: int) -> AnsweredQuestion:
    return AnsweredQuestion(
        item.prompt, item.choices[answer].strip(), item.choices[item.gold].strip(), answer == item.gold
    )
