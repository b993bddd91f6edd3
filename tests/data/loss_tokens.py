"""The texts that the loss is on."""

from itertools import groupby
from operator import itemgetter

from nalora_jax.config import DataConfig
from nalora_jax.data.chat_text import render_record
from nalora_jax.data.tokenize import tokenize


def runs(ids, mask, tokenizer):
    """Returns the text of each run of tokens that count."""
    groups = groupby(zip(ids, mask, strict=True), key=itemgetter(1))
    tokens = ([token for token, _ in group] for counts, group in groups if counts)
    return [tokenizer.decode(run, skip_special=False) for run in tokens]


def learned(record, tokenizer, **options):
    """Returns the runs of loss tokens of a record, with the end of a text that the tokenizer
    adds."""
    rendered = render_record(record, DataConfig(**options), tokenizer, "here")
    (example,) = tokenize([rendered], tokenizer)
    return runs(example.ids.tolist(), example.answer.tolist(), tokenizer)
