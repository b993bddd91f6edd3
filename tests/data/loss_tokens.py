"""The texts that the loss is on."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import Any

from nalora_jax.config import DataConfig
from nalora_jax.data.chat import render_record
from nalora_jax.data.tokenize import tokenize
from nalora_jax.data.tokenizer import Tokenizer


def learned(record: dict[str, Any], tokenizer: Tokenizer, **options: Any) -> list[str]:
    """Returns the text of each run of loss tokens of a record, with the end of a text that the tokenizer adds."""
    rendered = render_record(record, DataConfig(**options), tokenizer, "here")
    (example,) = tokenize([rendered], tokenizer)
    pairs = zip(example.ids.tolist(), example.answer.tolist(), strict=True)
    runs = [list(group) for counts, group in groupby(pairs, key=itemgetter(1)) if counts]
    return [tokenizer.decode([token for token, _ in run], skip_special=False) for run in runs]
