"""Exact match of generated completions with references, and accuracy of needle retrieval by length and depth.

The texts of needle retrieval come from `nalora_jax.data.tasks`, with lengths in tokens of the model, the
question included. Every model with the same tokenizer gets the same texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nalora_jax.config import DataConfig
from nalora_jax.data.items import CompletionItem
from nalora_jax.data.questions import eval_examples
from nalora_jax.data.source import RecordsSource
from nalora_jax.data.tasks import DEPTHS, needle_record, sentences
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.answers import Normalise, matches
from nalora_jax.evaluate.generate import Generator
from nalora_jax.evaluate.statistics import wilson


def exact_match(
    generator: Generator,
    items: Sequence[CompletionItem],
    *,
    normalise: Normalise,
    batch_size: int = 16,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Generates a completion of every prompt and compares it with the reference.

    Args:
      generator: the model.
      items: prompts with reference completions.
      normalise: applied to both before the comparison, such as `nalora_jax.evaluate.answers.normalised_text`.
      batch_size: prompts per batch.
      **settings: generation settings, the fields of `nalora_jax.evaluate.generate.Settings`.

    Returns:
      Records with ``prompt``, ``expected`` and ``answer`` (texts) and ``correct``.

    Raises:
      NaloraError: there are no items, or a prompt cannot be continued.
    """
    if not items:
        raise NaloraError("evaluation data", expected="at least one question", found="none")
    answers = generator.generate([item.prompt_ids for item in items], batch_size=batch_size, **settings)
    return [
        {
            "prompt": item.prompt,
            "expected": item.completion,
            "answer": answer,
            "correct": matches(answer, item.completion, normalise),
        }
        for item, answer in zip(items, answers, strict=True)
    ]


# ---------------------------------------------------------------- needles

_NEW_TOKENS = 16
# Tokens of the prompts that are processed together.
_BATCH_TOKENS = 32_768


@dataclass(frozen=True)
class NeedleItems:
    """The questions of a grid, in its order: lengths, then depths, then questions of a cell."""

    lengths: tuple[int, ...]
    per_cell: int
    items: tuple[CompletionItem, ...]


def needle_items(
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    *,
    per_cell: int = 10,
    chat: bool = False,
    haystack: Sequence[str] = (),
) -> NeedleItems:
    """Returns the questions of a grid of ``lengths`` and `DEPTHS`.

    Args:
      tokenizer: tokenizer of the model.
      lengths: largest number of tokens of a prompt with its answer.
      per_cell: questions of each length and depth.
      chat: wrap prompts in the model's chat template.
      haystack: sentences of the text; by default of BoolQ's held-out passages.

    Raises:
      NaloraError: a length is too short, or the default text cannot be downloaded.
    """
    haystack = haystack or sentences("validation")
    sizes: dict[str, int] = {}

    def size(sentence: str) -> int:
        if sentence not in sizes:
            sizes[sentence] = len(tokenizer.encode(sentence, special=False))
        return sizes[sentence]

    data = DataConfig(eval_split="needle", chat=chat)
    records = []
    for length in lengths:
        for depth in DEPTHS:
            for number in range(per_cell):
                records.append(_fitting(haystack, length, depth, number, size, tokenizer, data))
    items = _items(records, tokenizer, data)
    return NeedleItems(tuple(lengths), per_cell, tuple(items))


def _fitting(
    haystack: Sequence[str],
    length: int,
    depth: int,
    number: int,
    size: Any,
    tokenizer: Tokenizer,
    data: DataConfig,
) -> dict[str, Any]:
    """Returns a record of at most ``length`` tokens, with its question and the chat template."""

    def tokens(record: dict[str, Any]) -> int:
        (item,) = _items([record], tokenizer, data)
        return len(item.prompt_ids) + len(item.completion_ids)

    room = length - tokens(needle_record(haystack, length, depth, number, size, 0))
    if room < 0:
        raise NaloraError("--needle", expected=f"lengths of at least {length - room} tokens", found=length)
    while True:
        record = needle_record(haystack, length, depth, number, size, room)
        excess = tokens(record) - length
        if excess <= 0:
            return record
        room -= excess  # joined sentences have other tokens


def _items(records: list[dict[str, Any]], tokenizer: Tokenizer, data: DataConfig) -> list[CompletionItem]:
    source = {"needle": RecordsSource("needle", records)}
    items = eval_examples(data, tokenizer, split="needle", limit=0, source=source)
    return [item for item in items if isinstance(item, CompletionItem)]


def needle_answers(generator: Generator, questions: NeedleItems) -> list[dict[str, Any]]:
    """Answers every question greedily; an answer is correct if its first number is the needle's.

    Returns:
      Records with ``length``, ``depth``, ``expected`` and ``answer`` (texts) and ``correct``.

    Raises:
      NaloraError: a length exceeds the model's context.
    """
    longest = max(questions.lengths)
    if longest + _NEW_TOKENS > generator.max_length:
        raise NaloraError(
            "--needle",
            expected=f"lengths of at most {generator.max_length - _NEW_TOKENS} tokens, for the model's context",
            found=longest,
            remedy="a run with --model.rope-scaling has a longer context",
        )
    per_length, records = len(DEPTHS) * questions.per_cell, []
    for i, length in enumerate(questions.lengths):
        items = questions.items[i * per_length : (i + 1) * per_length]
        batch = max(1, min(16, _BATCH_TOKENS // length))
        options: dict[str, Any] = {"batch_size": batch, "max_new_tokens": _NEW_TOKENS, "stop": ("\n",)}
        answers = exact_match(generator, items, normalise=first_number, **options)
        for number, record in enumerate(answers):
            del record["prompt"]  # as long as the context
            records.append({"length": length, "depth": DEPTHS[number // questions.per_cell], **record})
    return records


def needle_summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the accuracies as JSON values: by cell, by length and of all with their 95% intervals."""
    rows = []
    for length in dict.fromkeys(record["length"] for record in records):
        of_length = [record for record in records if record["length"] == length]
        cells = [
            float(np.mean([record["correct"] for record in of_length if record["depth"] == depth]))
            for depth in DEPTHS
        ]
        rows.append({"length": length, "cells": cells} | _accuracy(of_length))
    return {"depths": list(DEPTHS), "rows": rows} | _accuracy(records) | {"n": len(records)}


def _accuracy(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    right = sum(record["correct"] for record in records)
    low, high = wilson(right, len(records))
    return {"accuracy": right / len(records), "low": low, "high": high}


def first_number(text: str) -> str:
    """Returns the first run of digits in a text, or "" if there is none."""
    return next(iter(re.findall(r"\d+", text)), "")
