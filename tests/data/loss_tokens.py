"""The texts that the loss is on."""

from __future__ import annotations

from typing import Any

from nalora_jax.config import DataConfig
from nalora_jax.data.chat import render_record
from nalora_jax.data.tokenize import tokenize
from nalora_jax.data.tokenizer import Tokenizer


def runs(ids: Any, mask: Any, tokenizer: Tokenizer) -> list[str]:
    """Returns the text of each run of tokens that count."""
    texts, before = [], False
    for token, counts in zip(ids, mask, strict=True):
        if counts:
            texts += [] if before else [[]]
            texts[-1].append(token)
        before = counts
    return [tokenizer.decode(tokens, skip_special=False) for tokens in texts]


def learned(record: dict[str, Any], tokenizer: Tokenizer, **options: Any) -> list[str]:
    """Returns the runs of loss tokens of a record, with the end of a text that the tokenizer adds."""
    rendered = render_record(record, DataConfig(**options), tokenizer, "here")
    (example,) = tokenize([rendered], tokenizer)
    return runs(example.ids, example.answer, tokenizer)
