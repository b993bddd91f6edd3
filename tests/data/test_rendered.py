from __future__ import annotations

import re

import numpy as np
import pytest

from nalora_jax.config import DataConfig
from nalora_jax.data.sources import FileSource
from nalora_jax.data.tokenize import rendered
from nalora_jax.errors import NaloraError

GOOD = {"messages": [{"role": "user", "content": "up"}, {"role": "assistant", "content": "the sky"}]}
EMPTY = {"messages": [{"role": "user", "content": "up"}, {"role": "assistant", "content": ""}]}
ODD = {"question": "up", "answer": "the sky"}


def error_of(path, tokenizer, **options):
    source = FileSource(path)
    with pytest.raises(NaloraError) as error:
        list(rendered(source, np.arange(len(source)), DataConfig(**options), tokenizer))
    return str(error.value)


def test_a_message_names_up_to_ten_broken_records(write_jsonl, tokenizer):
    message = error_of(write_jsonl(*[GOOD] * 30, EMPTY, *[GOOD] * 200, "{oops", GOOD, ODD), tokenizer)
    lines = message.splitlines()
    assert lines[0].endswith("expected records without errors, found 3 broken ones:")
    assert [re.match(r"  data.jsonl:(\d+)", line)[1] for line in lines[1:]] == ["31", "232", "234"]
    assert "found an empty text" in lines[1]
    many = error_of(write_jsonl(GOOD, *[EMPTY] * 40, name="many.jsonl"), tokenizer)
    assert "found 10 or more broken ones:" in many
    assert len(many.splitlines()) == 11
    assert many.endswith("; the model would learn to end at once: write the answer, or remove the record")


@pytest.mark.parametrize("place", [0, 150, 299])
def test_one_odd_record_is_told_the_form_of_the_others(write_jsonl, tokenizer, place):
    records = [GOOD] * 299
    message = error_of(write_jsonl(*records[:place], ODD, *records[place:]), tokenizer)
    assert message.endswith(
        f"data.jsonl:{place + 1}: expected chat messages (messages), as in the other records, "
        "found fields 'question', 'answer'; fix or remove this record"
    )


def test_a_wrong_setting_is_one_error(write_jsonl, tokenizer):
    message = error_of(write_jsonl(*[GOOD] * 30), tokenizer, messages_field="turns")
    assert "data.jsonl:1: expected a field 'prompt' (or 'turns'), found 'messages'; name" in message
