"""Evaluation of language models: multiple choice by log-likelihood, and the loss of reference
completions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from nalora_jax.data.items import ChoiceItem, CompletionItem, Item
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.evaluator import (
    SAMPLES,
    Answers,
    Evaluator,
    ItemRecord,
    variables_of,
)
from nalora_jax.evaluate.intervals import accuracy_of, bootstrap
from nalora_jax.evaluate.likelihood import Score, ScoredPair, score_groups
from nalora_jax.models.decoder import Decoder

_LARGEST_EXPONENT = 700.0  # exp of more than 709 is no float
_CHOICES = 48  # questions from which the report draws its samples


class TextEvaluator(Evaluator):
    """Evaluates a language model on questions with choices, or on completions.

    Args:
      model: the decoder, with the adapters' spec.
      answers: completes prompts for the samples; None: no samples of completions.
      items: examples of one kind: multiple choice (metric: accuracy) or completions (metric: loss
        per token).
      mesh: mesh of the weights, if they are sharded.
      fitting: items of all evaluators that share one program.

    Raises:
      NaloraError: no items, or items of both kinds.
    """

    def __init__(
        self,
        model: Decoder,
        answers: Answers | None,
        items: Sequence[Item],
        *,
        mesh: Mesh | None = None,
        fitting: Sequence[Item] = (),
    ) -> None:
        """Divides the items by kind; the class describes the arguments and errors."""
        self.choices = [item for item in items if isinstance(item, ChoiceItem)]
        self.completions = [item for item in items if isinstance(item, CompletionItem)]
        if bool(self.choices) == bool(self.completions):
            actual = "no questions"
            if self.choices:
                actual = "both"
            raise NaloraError(
                "evaluation data",
                expected="questions with choices, or all without",
                found=actual,
            )
        self._model = model
        self._mesh = mesh
        self._answers = answers
        # of `nalora_jax.evaluate.vision`: an image's text in a prompt, pixels by the id of an item
        self._image = ""
        self._pixels: dict[int, list[Any]] = {}
        self._items: Sequence[Item] = self.completions
        kind: type[Item] = CompletionItem
        self.metric = "loss"
        self.mode = "min"
        if self.choices:
            self._items = self.choices
            kind = ChoiceItem
            self.metric = "accuracy"
            self.mode = "max"
        self._fitting = [item for item in fitting if isinstance(item, kind)]

    def records(self, params: Any, lora: Any | None) -> list[dict[str, Any]]:
        """Scores the choices or the reference completions after their prompts.

        The answer is the choice with the largest log-likelihood per character: the summed
        log-likelihood favours short choices.

        Returns:
          Records with ``item`` (its number), ``prompt``, and the ``loss``, summed over the
          ``tokens`` of the correct choice or of the ``completion``. Of multiple choice also
          ``choices``, their ``log_probs``, ``gold`` and ``answer`` (indices), and ``correct``.

        Raises:
          NaloraError: a question has an empty prompt or choice.
        """
        scores = self._scores(variables_of(params, lora))
        records: list[dict[str, Any]] = []
        if not self.choices:
            for completion, (score,) in zip(self.completions, scores, strict=True):
                record = {
                    "item": len(records),
                    "prompt": completion.prompt,
                    "completion": completion.completion,
                    "loss": -score.log_prob,
                    "tokens": score.tokens,
                }
                records.append(record)
            return records
        for item, row in zip(self.choices, scores, strict=True):
            sizes = [max(len(choice.strip()), 1) for choice in item.choices]
            log_probs = [score.log_prob for score in row]
            answer = int(np.argmax(np.divide(log_probs, sizes)))
            record = {
                "item": len(records),
                "prompt": item.prompt,
                "choices": item.choices,
                "log_probs": log_probs,
                "gold": item.gold,
                "answer": answer,
                "correct": answer == item.gold,
                "loss": -row[item.gold].log_prob,
                "tokens": row[item.gold].tokens,
            }
            records.append(record)
        return records

    def summary(self, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns the metrics of `records`.

        Returns:
          ``accuracy`` of multiple choice, also by the summed log-likelihood
          (``accuracy_per_choice``), and its ``chance`` level; ``loss`` per token of the correct
          choice or the reference (for completions also ``perplexity``); ``low`` and ``high``, the
          95% interval of the accuracy or of the loss, over items; ``n``, items.
        """
        losses = np.array([record["loss"] for record in records], np.float64)
        tokens = np.array([record["tokens"] for record in records], np.float64)
        if not tokens.sum():
            raise NaloraError(
                "evaluation data", expected="at least one target token", found="none"
            )
        loss = float(losses.sum() / tokens.sum())
        count = len(records)
        if not self.choices:
            low, high = bootstrap(losses, tokens)
            return {
                "loss": loss,
                "low": low,
                "high": high,
                "perplexity": math.exp(min(loss, _LARGEST_EXPONENT)),
                "n": count,
            }
        likeliest = [int(np.argmax(record["log_probs"])) for record in records]
        golds = [record["gold"] for record in records]
        right_by_sum = int(np.sum(np.equal(likeliest, golds)))
        chances = [1 / len(record["choices"]) for record in records]
        return {
            **accuracy_of(records),
            "accuracy_per_choice": right_by_sum / count,
            "loss": loss,
            "n": count,
            "chance": sum(chances) / count,
        }

    def samples(
        self,
        params: Any,
        lora: Any | None,
        records: Sequence[ItemRecord],
    ) -> dict[str, Any]:
        """Returns ``samples``, the answers to some items.

        For multiple choice it also returns ``right``, one bool for every item.
        """
        if self.choices:
            right = [record["correct"] for record in records]
            return {"samples": _choice_samples(records[:_CHOICES]), "right": right}
        if self._answers is None:
            return {}
        sampled = self.completions[:SAMPLES]
        prompts = [item.prompt_ids for item in sampled]
        images = None
        if self._pixels:
            images = [self._pixels[id(item)] for item in sampled]
        answers = self._answers(variables_of(params, lora), prompts, images)
        samples = []
        for item, answer in zip(sampled, answers, strict=True):
            prompt = item.prompt
            if self._image:
                prompt = prompt.replace(self._image, "[image]")
            samples.append(
                {
                    "prompt": prompt,
                    "turns": [
                        {"role": role, "text": text} for role, text in item.turns
                    ],
                    "answer": answer.text.strip(),
                    "cut": answer.reason == "length",
                    "expected": item.completion.strip(),
                }
            )
        return {"samples": samples}

    def _scores(self, variables: Mapping[str, Any]) -> list[list[Score]]:
        """Returns the scores of every item's choices, or of its completion alone."""
        groups = list(map(_pairs, self._items))
        fitting = list(map(_pairs, self._fitting))
        return score_groups(
            self._model,
            variables,
            groups,
            fitting=fitting,
            mesh=self._mesh,
        )


def _choice_samples(records: Sequence[ItemRecord]) -> list[dict[str, Any]]:
    """Returns multiple-choice questions with the texts of the model's and the right answers."""
    samples = []
    for record in records:
        choices = record["choices"]
        samples.append(
            {
                "prompt": record["prompt"],
                "answer": choices[record["answer"]].strip(),
                "expected": choices[record["gold"]].strip(),
                "correct": record["correct"],
            }
        )
    return samples


def _pairs(item: Any) -> list[ScoredPair]:
    """Returns (context ids, continuation ids) of each choice of an item, or of its completion."""
    if isinstance(item, ChoiceItem):
        return list(zip(item.contexts, item.choice_ids, strict=True))
    return [(item.prompt_ids, item.completion_ids)]
