"""Exact match of generated completions, and accuracy of needle retrieval by length and depth.

The texts of needle retrieval come from `nalora_jax.data.tasks`, with lengths in tokens of the
model, the question included. Every model with the same tokenizer gets the same texts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cache
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
from nalora_jax.evaluate.intervals import accuracy_of


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
      normalise: applied to both before the comparison, such as
        `nalora_jax.evaluate.answers.normalize_text`.
      batch_size: prompts per batch.
      **settings: the fields of
        `nalora_jax.evaluate.generate.GenerationSettings`.

    Returns:
      Records with ``prompt``, ``expected`` and ``answer`` (texts) and ``correct``.

    Raises:
      NaloraError: there are no items, or a prompt cannot be continued.
    """
    if not items:
        raise NaloraError(
            "evaluation data", expected="at least one question", found="none"
        )
    prompts = [item.prompt_ids for item in items]
    answers = generator.generate(prompts, batch_size=batch_size, **settings)
    records = []
    for item, answer in zip(items, answers, strict=True):
        records.append(
            {
                "prompt": item.prompt,
                "expected": item.completion,
                "answer": answer,
                "correct": matches(answer, item.completion, normalise),
            }
        )
    return records


# ---------------------------------------------------------------- needles

_NEW_TOKENS = 16  # length limit of an answer
_BATCH_TOKENS = 32_768  # of prompts that are processed together


def needle_items(
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    *,
    per_cell: int = 10,
    chat: bool = False,
    haystack: Sequence[str] = (),
) -> dict[int, list[CompletionItem]]:
    """Returns the questions of each length: ``per_cell`` for each of `DEPTHS`, in this order.

    Args:
      tokenizer: tokenizer of the model.
      lengths: largest number of tokens of a prompt with its answer, different ones.
      per_cell: questions of each length and depth.
      chat: wrap prompts in the model's chat template.
      haystack: sentences of the text; by default of BoolQ's held-out passages.

    Raises:
      NaloraError: a length is too short, or the default text cannot be downloaded.
    """
    haystack = haystack or sentences("validation")
    data = DataConfig(eval_split="needle", chat=chat)

    @cache
    def size(sentence: str) -> int:
        return len(tokenizer.encode(sentence, special=False))

    def sized(
        length: int,
        depth: int,
        number: int,
        room: int,
    ) -> tuple[CompletionItem, int]:
        """Returns a question in a text of about ``room`` tokens, and its number of tokens."""
        records = [needle_record(haystack, length, depth, number, size, room)]
        source = {"needle": RecordsSource("needle", records)}
        (item,) = eval_examples(
            data,
            tokenizer,
            split="needle",
            limit=0,
            source=source,
        )
        assert isinstance(item, CompletionItem)
        return item, len(item.prompt_ids) + len(item.completion_ids)

    questions: dict[int, list[CompletionItem]] = {length: [] for length in lengths}
    # The room for the text is the length without the question, less what tokenization adds.
    for length, depth, number in itertools.product(lengths, DEPTHS, range(per_cell)):
        _, shortest = sized(length, depth, number, 0)
        if shortest > length:
            raise NaloraError(
                "--needle",
                expected=f"lengths of at least {shortest} tokens",
                found=length,
            )
        room = length - shortest
        item, tokens = sized(length, depth, number, room)
        while tokens > length:  # sentences may have more tokens when they are joined
            room -= tokens - length
            item, tokens = sized(length, depth, number, room)
        questions[length].append(item)
    return questions


def needle_answers(
    generator: Generator, questions: Mapping[int, Sequence[CompletionItem]]
) -> list[dict[str, Any]]:
    """Answers every question of `needle_items` greedily.

    An answer is correct if its first number is the needle's.

    Returns:
      Records with ``length``, ``depth``, ``expected`` and ``answer`` (texts) and ``correct``.

    Raises:
      NaloraError: a length exceeds the model's context.
    """
    room = generator.max_length - _NEW_TOKENS
    if max(questions) > room:
        raise NaloraError(
            "--needle",
            expected=f"lengths of at most {room} tokens, for the model's context",
            found=max(questions),
            remedy="a run with --model.rope-scaling has a longer context",
        )
    records = []
    for length, items in questions.items():
        answered = exact_match(
            generator,
            items,
            normalise=first_number,
            batch_size=max(1, min(16, _BATCH_TOKENS // length)),
            max_new_tokens=_NEW_TOKENS,
            stop=("\n",),
        )
        for number, record in enumerate(answered):
            del record["prompt"]  # as long as the context
            # the items are in the order of their depths, equally many of each
            depth = DEPTHS[number * len(DEPTHS) // len(items)]
            records.append(
                {
                    "length": length,
                    "depth": depth,
                    **record,
                }
            )
    return records


def needle_summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the accuracies of `needle_answers` as JSON values.

    Returns:
      ``depths``; ``rows``, one for each length with its ``cells`` (accuracy at each depth),
      ``accuracy`` and 95% interval; the ``accuracy`` of all with ``low`` and ``high``; and ``n``.
    """
    rows = []
    for length in dict.fromkeys(record["length"] for record in records):
        of_length = [record for record in records if record["length"] == length]
        cells = []
        for depth in DEPTHS:
            correct = [r["correct"] for r in of_length if r["depth"] == depth]
            cells.append(float(np.mean(correct)))
        rows.append({"length": length, "cells": cells} | accuracy_of(of_length))
    return {
        "depths": list(DEPTHS),
        "rows": rows,
        **accuracy_of(records),
        "n": len(records),
    }


def first_number(text: str) -> str:
    """Returns the first run of digits in a text, or "" if there is none."""
    found = re.search(r"\d+", text)
    if found is None:
        return ""
    return found.group()
