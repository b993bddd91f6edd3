"""Scores of one model by item, and paired comparison of two models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from nalora_jax.data.items import ChoiceItem, CompletionItem, Item
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.likelihood import Score, score_groups
from nalora_jax.evaluate.multiple_choice import predict
from nalora_jax.evaluate.statistics import bootstrap, compare, paired_bootstrap, wilson
from nalora_jax.models.decoder import Decoder


@dataclass(frozen=True)
class Answers:
    """The results of one model on the items of one data set.

    Attributes:
      records: one JSON-able record per item, see `answer_items`.
      summary: ``loss`` per completion token, ``low`` and ``high`` (95% interval of the headline
        metric), ``n``; for multiple choice ``accuracy``, by log-likelihood per character.
    """

    records: list[dict[str, Any]]
    summary: dict[str, Any]


def by_kind(items: Sequence[Item]) -> tuple[list[ChoiceItem], list[CompletionItem]]:
    """Returns the questions with choices and the completions, one of them empty.

    Raises:
      NaloraError: no items, or items of both kinds.
    """
    choices = [item for item in items if isinstance(item, ChoiceItem)]
    completions = [item for item in items if isinstance(item, CompletionItem)]
    if bool(choices) == bool(completions):
        actual = "both" if choices else "no questions"
        raise NaloraError(
            "evaluation data", expected="questions with choices, or all without", found=actual
        )
    return choices, completions


def answer_items(
    model: Decoder, variables: Mapping[str, Any], items: Sequence[Item], *, mesh: Mesh | None = None
) -> Answers:
    """Scores every item: the choices of a question, or a reference completion.

    Args:
      model: the decoder.
      variables: ``params``, and ``lora`` if there are adapters.
      items: all with choices, or all without.
      mesh: mesh of the weights, if they are sharded.

    Returns:
      Records with ``item`` (its number), ``prompt``, ``loss`` (summed over the ``tokens`` of the
      correct choice or the reference), and ``completion``; or ``choices``, their ``log_probs``,
      ``gold``, ``answer`` (indices) and ``correct``.

    Raises:
      NaloraError: no items, or items of both kinds.
    """
    choices, completions = by_kind(items)
    pairs = [list(zip(item.contexts, item.choice_ids, strict=True)) for item in choices]
    pairs += [[(item.prompt_ids, item.completion_ids)] for item in completions]
    scores = score_groups(model, variables, pairs, mesh=mesh)
    records = _choice_records(choices, scores) if choices else _completion_records(completions, scores)
    return Answers([{"item": i, **record} for i, record in enumerate(records)], _summary(records))


def _choice_records(items: Sequence[ChoiceItem], scores: Sequence[Sequence[Score]]) -> list[dict[str, Any]]:
    answers = predict(items, scores, "character").tolist()
    return [
        {
            "prompt": item.prompt,
            "choices": item.choices,
            "log_probs": [score.log_prob for score in row],
            "gold": item.gold,
            "answer": answer,
            "correct": answer == item.gold,
            "loss": -row[item.gold].log_prob,
            "tokens": row[item.gold].tokens,
        }
        for item, row, answer in zip(items, scores, answers, strict=True)
    ]


def _completion_records(
    items: Sequence[CompletionItem], scores: Sequence[Sequence[Score]]
) -> list[dict[str, Any]]:
    return [
        {
            "prompt": item.prompt,
            "completion": item.completion,
            "loss": -row[0].log_prob,
            "tokens": row[0].tokens,
        }
        for item, row in zip(items, scores, strict=True)
    ]


def _summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    losses, tokens = (
        np.array([record[name] for record in records], np.float64) for name in ("loss", "tokens")
    )
    loss, count = float(losses.sum() / tokens.sum()), len(records)
    if "correct" in records[0]:
        right = sum(record["correct"] for record in records)
        low, high = wilson(right, count)
        return {"accuracy": right / count, "low": low, "high": high, "loss": loss, "n": count}
    low, high = bootstrap(losses, tokens)
    return {"loss": loss, "low": low, "high": high, "perplexity": math.exp(min(loss, 700.0)), "n": count}


def compare_answers(other: Answers, model: Answers) -> dict[str, Any]:
    """Compares two models on the same items in the same order: ``model`` minus ``other``.

    Returns:
      ``loss``: difference per completion token with its paired bootstrap interval ``low`` and
        ``high``.
      For multiple choice also ``accuracy``: the fields of
        `nalora_jax.evaluate.statistics.Comparison`, which include McNemar's test.

    Raises:
      NaloraError: the two have other items.
    """
    if [record["prompt"] for record in other.records] != [record["prompt"] for record in model.records]:
        remedy = "models whose tokenizers or chat templates differ read other prompts: give --no-chat"
        raise NaloraError(
            "--against", expected="answers to the same questions", found="other ones", remedy=remedy
        )
    before, after = (
        [np.array([record[name] for record in each.records], np.float64) for name in ("loss", "tokens")]
        for each in (other, model)
    )
    low, high = paired_bootstrap(*before, *after)
    difference = model.summary["loss"] - other.summary["loss"]
    differences: dict[str, Any] = {"loss": {"difference": difference, "low": low, "high": high}}
    if "correct" in model.records[0]:
        right = ([record["correct"] for record in each.records] for each in (other, model))
        differences["accuracy"] = asdict(compare(*right))
    return differences


def describe_comparison(values: Mapping[str, Any]) -> str:
    """Returns one line with the result of `compare_answers`.

    Example:
      accuracy +0.080 (95% interval 0.028 to 0.133; 55 gained, 23 lost, McNemar p = 0.0004), loss -2.52 (-2.61 to -2.43)
    """
    parts = []
    if "accuracy" in values:
        parts.append(f"accuracy {describe_paired(values['accuracy'])}")
    loss = values["loss"]
    parts.append(f"loss {loss['difference']:+.4f} ({loss['low']:+.4f} to {loss['high']:+.4f})")
    return ", ".join(parts)


def describe_paired(values: Mapping[str, Any]) -> str:
    """Returns a difference of shares with its interval and test; values as in `Comparison`."""
    counts = f"{values['gained']} gained, {values['lost']} lost, McNemar p = {values['p_value']:.2g}"
    return f"{values['difference']:+.3f} (95% interval {values['low']:+.3f} to {values['high']:+.3f}; {counts})"
