"""Evaluation of language models: multiple choice by log-likelihood, and the loss of reference completions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from nalora_jax.data.items import ChoiceItem, CompletionItem, Item
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.evaluator import SAMPLE_TOKENS, SAMPLES, Evaluator, ItemRecord, variables_of
from nalora_jax.evaluate.generate import Completion, Generator
from nalora_jax.evaluate.likelihood import score_groups
from nalora_jax.evaluate.statistics import bootstrap, wilson
from nalora_jax.models.decoder import Decoder

_CHOICES = 48  # questions from which the report draws its samples


class TextEvaluator(Evaluator):
    """Evaluates a language model on questions with choices, or on completions.

    Args:
      model: the decoder, with the adapters' spec.
      tokenizer: tokenizer of the base model.
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
        tokenizer: Tokenizer,
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
                "evaluation data", expected="questions with choices, or all without", found=actual
            )
        self._model, self._tokenizer, self._mesh, self._fitting = model, tokenizer, mesh, fitting
        self.metric, self.mode = ("accuracy", "max") if self.choices else ("loss", "min")

    def records(self, params: Any, lora: Any | None) -> list[dict[str, Any]]:
        """Returns the records of `choice_records` or `completion_records`."""
        variables = variables_of(params, lora)
        if self.choices:
            every = [item for item in self._fitting if isinstance(item, ChoiceItem)]
            return choice_records(self._model, variables, self.choices, mesh=self._mesh, fitting=every)
        return self._completion_records(variables)

    def summary(self, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns `text_summary`."""
        return text_summary(records)

    def samples(self, params: Any, lora: Any | None, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns answers to some items; of multiple choice also ``right``, a bool for every item."""
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
            return {"samples": samples, "right": [record["correct"] for record in records]}
        sampled = self.completions[:SAMPLES]
        answers = self._generated(variables_of(params, lora), sampled)
        return {
            "samples": [
                {
                    "prompt": self._shown(item.prompt),
                    "turns": [{"role": role, "text": text} for role, text in item.turns],
                    "answer": answer.text.strip(),
                    "cut": answer.reason == "length",
                    "expected": item.completion.strip(),
                }
                for item, answer in zip(sampled, answers, strict=True)
            ]
        }

    def _completion_records(self, variables: Mapping[str, Any]) -> list[dict[str, Any]]:
        every = [item for item in self._fitting if isinstance(item, CompletionItem)]
        return completion_records(self._model, variables, self.completions, mesh=self._mesh, fitting=every)

    def _generated(self, variables: Mapping[str, Any], items: Sequence[CompletionItem]) -> list[Completion]:
        generator = Generator(self._model, variables, self._tokenizer, mesh=self._mesh)
        return generator.complete([item.prompt_ids for item in items], max_new_tokens=SAMPLE_TOKENS)

    def _shown(self, prompt: str) -> str:
        return prompt


def choice_records(
    model: Decoder,
    variables: Mapping[str, Any],
    items: Sequence[ChoiceItem],
    *,
    mesh: Mesh | None = None,
    fitting: Sequence[ChoiceItem] = (),
) -> list[dict[str, Any]]:
    """Answers every question by the choice with the largest log-likelihood per character after the prompt.

    The summed log-likelihood favours short choices. It makes no difference for choices of equal length.

    Args:
      model: the decoder; its programs are compiled once for all adapters.
      variables: ``params``, and ``lora`` if there are adapters.
      items: the questions.
      mesh: mesh of the weights, if they are sharded.
      fitting: items of all calls that share one program; by default the items.

    Returns:
      Records with ``item`` (its number), ``prompt``, ``choices``, their ``log_probs``, ``gold`` and
      ``answer`` (indices), ``correct``, and the ``loss``, summed over the ``tokens`` of the correct
      choice.

    Raises:
      NaloraError: a question has an empty prompt or choice.
    """
    groups, fits = (
        [list(zip(item.contexts, item.choice_ids, strict=True)) for item in each]
        for each in (items, fitting)
    )
    scores = score_groups(model, variables, groups, fitting=fits, mesh=mesh)
    answers = [
        int(
            np.argmax([s.log_prob / max(len(c.strip()), 1) for s, c in zip(row, item.choices, strict=True)])
        )
        for item, row in zip(items, scores, strict=True)
    ]
    return [
        {
            "item": number,
            "prompt": item.prompt,
            "choices": item.choices,
            "log_probs": [score.log_prob for score in row],
            "gold": item.gold,
            "answer": answer,
            "correct": answer == item.gold,
            "loss": -row[item.gold].log_prob,
            "tokens": row[item.gold].tokens,
        }
        for number, (item, row, answer) in enumerate(zip(items, scores, answers, strict=True))
    ]


def completion_records(
    model: Decoder,
    variables: Mapping[str, Any],
    items: Sequence[CompletionItem],
    *,
    mesh: Mesh | None = None,
    fitting: Sequence[CompletionItem] = (),
) -> list[dict[str, Any]]:
    """Scores the reference completions after their prompts.

    Returns:
      Records with ``item`` (its number), ``prompt``, ``completion``, and the ``loss``, summed over the
      ``tokens`` of the completion.
    """
    groups, fits = (
        [[(item.prompt_ids, item.completion_ids)] for item in each] for each in (items, fitting)
    )
    scores = [row[0] for row in score_groups(model, variables, groups, fitting=fits, mesh=mesh)]
    return of_completions(items, [-score.log_prob for score in scores], [score.tokens for score in scores])


def of_completions(
    items: Sequence[CompletionItem], losses: Sequence[float], tokens: Sequence[int]
) -> list[dict[str, Any]]:
    """Returns the records of completions with these losses, summed over so many tokens."""
    return [
        {
            "item": number,
            "prompt": item.prompt,
            "completion": item.completion,
            "loss": loss,
            "tokens": count,
        }
        for number, (item, loss, count) in enumerate(zip(items, losses, tokens, strict=True))
    ]


def text_summary(records: Sequence[ItemRecord]) -> dict[str, Any]:
    """Returns the metrics of records of one kind.

    Returns:
      ``accuracy`` of multiple choice, also by the summed log-likelihood (``accuracy_per_choice``),
      and its ``chance`` level; ``loss`` per token of the correct choice or the reference (for
      completions also ``perplexity``); ``low`` and ``high``, the 95% interval of the accuracy or of
      the loss, over items; ``n``, items.
    """
    losses, tokens = (
        np.array([record[name] for record in records], np.float64) for name in ("loss", "tokens")
    )
    if not tokens.sum():
        raise NaloraError("evaluation data", expected="at least one target token", found="none")
    loss, count = float(losses.sum() / tokens.sum()), len(records)
    if "choices" not in records[0]:
        low, high = bootstrap(losses, tokens)
        perplexity = math.exp(min(loss, 700.0))
        return {"loss": loss, "low": low, "high": high, "perplexity": perplexity, "n": count}
    right = sum(record["correct"] for record in records)
    low, high = wilson(right, count)
    most_likely = [int(np.argmax(record["log_probs"])) == record["gold"] for record in records]
    return {
        "accuracy": right / count,
        "low": low,
        "high": high,
        "accuracy_per_choice": sum(most_likely) / count,
        "loss": loss,
        "n": count,
        "chance": sum(1 / len(record["choices"]) for record in records) / count,
    }
