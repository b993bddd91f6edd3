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
from nalora_jax.evaluate.likelihood import Pair, Score, score_groups
from nalora_jax.evaluate.statistics import bootstrap, wilson
from nalora_jax.models.decoder import Decoder

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
        self.choices = [item for item in items if isinstance(item, ChoiceItem)]
        self.completions = [item for item in items if isinstance(item, CompletionItem)]
        if bool(self.choices) == bool(self.completions):
            actual = "both" if self.choices else "no questions"
            raise NaloraError(
                "evaluation data",
                expected="questions with choices, or all without",
                found=actual,
            )
        self._model = model
        self._mesh = mesh
        self._answers = answers
        # Of `nalora_jax.evaluate.seeing`: an image in a prompt's text, and pixels by the id of an
        #   item.
        self._image, self._pixels = "", dict[int, list[np.ndarray]]()
        self._fitting = [
            item
            for item in fitting
            if isinstance(item, ChoiceItem) == bool(self.choices)
        ]
        if self.choices:
            self.metric, self.mode = ("accuracy", "max")
        else:
            self.metric, self.mode = ("loss", "min")

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
        if not self.choices:
            return [
                {
                    "item": number,
                    "prompt": item.prompt,
                    "completion": item.completion,
                    "loss": -score.log_prob,
                    "tokens": score.tokens,
                }
                for number, (item, (score,)) in enumerate(
                    zip(self.completions, scores, strict=True)
                )
            ]
        records = []
        for number, (item, row) in enumerate(zip(self.choices, scores, strict=True)):
            sizes = [max(len(choice.strip()), 1) for choice in item.choices]
            log_probs = [score.log_prob for score in row]
            answer = int(np.argmax(np.divide(log_probs, sizes)))
            values = {
                "item": number,
                "prompt": item.prompt,
                "choices": item.choices,
                "log_probs": log_probs,
            }
            values |= {
                "gold": item.gold,
                "answer": answer,
                "correct": answer == item.gold,
            }
            values |= {
                "loss": -row[item.gold].log_prob,
                "tokens": row[item.gold].tokens,
            }
            records.append(values)
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
            perplexity = math.exp(min(loss, 700.0))
            return {
                "loss": loss,
                "low": low,
                "high": high,
                "perplexity": perplexity,
                "n": count,
            }
        right = sum(record["correct"] for record in records)
        low, high = wilson(right, count)
        most_likely = [
            int(np.argmax(record["log_probs"])) == record["gold"] for record in records
        ]
        return {
            "accuracy": right / count,
            "low": low,
            "high": high,
            "accuracy_per_choice": sum(most_likely) / count,
            "loss": loss,
            "n": count,
            "chance": sum(1 / len(record["choices"]) for record in records) / count,
        }

    def samples(
        self, params: Any, lora: Any | None, records: Sequence[ItemRecord]
    ) -> dict[str, Any]:
        """Returns answers to some items; of multiple choice also ``right``, a bool for every
        item."""
        if self.choices:
            samples = [
                {
                    "prompt": record["prompt"],
                    "answer": record["choices"][record["answer"]].strip(),
                    "expected": record["choices"][record["gold"]].strip(),
                    "correct": record["correct"],
                }
                for record in records[:_CHOICES]
            ]
            return {
                "samples": samples,
                "right": [record["correct"] for record in records],
            }
        if self._answers is None:
            return {}
        sampled = self.completions[:SAMPLES]
        pixels = self._pixels
        image = self._image
        images = [pixels[id(item)] for item in sampled] if pixels else None
        answers = self._answers(
            variables_of(params, lora), [item.prompt_ids for item in sampled], images
        )
        samples = []
        for item, answer in zip(sampled, answers, strict=True):
            prompt = item.prompt
            if image:
                prompt = prompt.replace(image, "[image]")
            sample = {
                "prompt": prompt,
                "turns": [{"role": role, "text": text} for role, text in item.turns],
                "answer": answer.text.strip(),
                "cut": answer.reason == "length",
                "expected": item.completion.strip(),
            }
            samples.append(sample)
        return {"samples": samples}

    def _scores(self, variables: Mapping[str, Any]) -> list[list[Score]]:
        """Returns the scores of every item's choices, or of its completion alone."""
        groups, fits = (
            list(map(_pairs, items))
            for items in (self.choices or self.completions, self._fitting)
        )
        return score_groups(
            self._model, variables, groups, fitting=fits, mesh=self._mesh
        )


def _pairs(item: Any) -> list[Pair]:
    """Returns the contexts and continuations of an item."""
    if isinstance(item, ChoiceItem):
        return list(zip(item.contexts, item.choice_ids, strict=True))
    return [(item.prompt_ids, item.completion_ids)]
