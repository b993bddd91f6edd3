"""Accuracy of needle retrieval by length and depth of the text.

The texts come from `nalora_jax.data.needle`, with lengths in tokens of the model, the question
included. Every model with the same tokenizer gets the same texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nalora_jax.config import DataConfig
from nalora_jax.data.items import CompletionItem
from nalora_jax.data.needle import DEPTHS, needle_record, sentences
from nalora_jax.data.questions import eval_examples
from nalora_jax.data.source import RecordsSource
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.exact_match import exact_match
from nalora_jax.evaluate.generate import Generator
from nalora_jax.evaluate.statistics import compare, wilson

_NEW_TOKENS = 16
# Tokens of the prompts that are processed together.
_BATCH_TOKENS = 32_768


@dataclass(frozen=True)
class NeedleItems:
    """The questions of a grid, in its order: lengths, then depths, then questions of a cell."""

    lengths: tuple[int, ...]
    per_cell: int
    items: tuple[CompletionItem, ...]


@dataclass(frozen=True)
class NeedleResult:
    """Answers to the questions of a grid."""

    lengths: tuple[int, ...]
    correct: np.ndarray  # bool [lengths, depths, questions of a cell]
    answers: tuple[str, ...]  # as generated

    def to_dict(self) -> dict[str, Any]:
        """Returns the accuracies as JSON values: by cell, by length and of all with their 95% intervals."""
        rows = []
        for length, row in zip(self.lengths, self.correct, strict=True):
            low, high = wilson(int(row.sum()), row.size)
            cells = row.mean(axis=1).tolist()
            rows.append(
                {"length": length, "cells": cells, "accuracy": float(row.mean()), "low": low, "high": high}
            )
        low, high = wilson(int(self.correct.sum()), self.correct.size)
        total = {"accuracy": float(self.correct.mean()), "low": low, "high": high, "n": self.correct.size}
        return {"depths": list(DEPTHS), "rows": rows} | total


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


def retrieve(generator: Generator, questions: NeedleItems) -> NeedleResult:
    """Answers every question greedily; an answer is correct if its first number is the needle's.

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
    per_length, correct = len(DEPTHS) * questions.per_cell, []
    answers: list[str] = []
    for i, length in enumerate(questions.lengths):
        items = questions.items[i * per_length : (i + 1) * per_length]
        batch = max(1, min(16, _BATCH_TOKENS // length))
        options: dict[str, Any] = {"batch_size": batch, "max_new_tokens": _NEW_TOKENS, "stop": ("\n",)}
        result = exact_match(generator, items, normalise=first_number, **options)
        correct.append(result.correct.reshape(len(DEPTHS), questions.per_cell))
        answers += result.answers
    return NeedleResult(questions.lengths, np.stack(correct), tuple(answers))


def first_number(text: str) -> str:
    """Returns the first run of digits in a text, or "" if there is none."""
    return next(iter(re.findall(r"\d+", text)), "")


def needle_table(result: Mapping[str, Any]) -> str:
    """Returns the accuracies of `NeedleResult.to_dict` as lines of text.

    Example:
      tokens     0%    25%    50%    75%   100%    all
      512      1.00   1.00   0.90   1.00   1.00   0.98
    """
    heads = ["tokens", *(f"{depth}%" for depth in result["depths"]), "all"]
    lines = [f"{heads[0]:<9}" + "".join(f"{head:>7}" for head in heads[1:])]
    for row in result["rows"]:
        cells = [*row["cells"], row["accuracy"]]
        lines.append(f"{row['length']:<9}" + "".join(f"{cell:>7.2f}" for cell in cells))
    return "\n".join(lines)


def difference(before: NeedleResult, after: NeedleResult) -> dict[str, Any]:
    """Returns the paired comparison of two models on the same questions."""
    return vars(compare(before.correct.ravel(), after.correct.ravel()))


def needle_records(questions: NeedleItems, result: NeedleResult) -> list[dict[str, Any]]:
    """Returns one record per question: length, depth, expected and generated text."""
    cells = [
        (length, depth)
        for length in questions.lengths
        for depth in DEPTHS
        for _ in range(questions.per_cell)
    ]
    columns = zip(cells, questions.items, result.answers, result.correct.ravel().tolist(), strict=True)
    return [
        {
            "length": length,
            "depth": depth,
            "expected": item.completion,
            "answer": answer,
            "correct": correct,
        }
        for (length, depth), item, answer, correct in columns
    ]
