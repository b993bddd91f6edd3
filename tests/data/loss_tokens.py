"""The texts that the loss is on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from nalora_jax.config import DataConfig
from nalora_jax.data.chat import render_record
from nalora_jax.data.tokenize import tokenize
from nalora_jax.data.tokenizer import Tokenizer


def runs(ids: Sequence[int], mask: Sequence[Any], tokenizer: Tokenizer) -> list[str]:
    """Returns the text of each run of tokens that count."""
    groups = groupby(zip(ids, mask, strict=True), key=itemgetter(1))
    tokens = ([token for token, _ in group] for counts, group in groups if counts)
    return [tokenizer.decode(run, skip_special=False) for run in tokens]


def learned(record: dict[str, Any], tokenizer: Tokenizer, **options: Any) -> list[str]:
    """Returns the runs of loss tokens of a record, with the end of a text that the tokenizer adds."""
    rendered = render_record(record, DataConfig(**options), tokenizer, "here")
    (example,) = tokenize([rendered], tokenizer)
    return runs(example.ids.tolist(), example.answer.tolist(), tokenizer)
