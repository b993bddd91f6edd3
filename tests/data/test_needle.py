"""Texts of needle retrieval, and their TFDS data set."""

import hashlib
import json
import re
from itertools import pairwise

import pytest

from nalora_jax.config import DataConfig
from nalora_jax.data import tasks
from nalora_jax.data.sources import open_source
from nalora_jax.data.tasks import DEPTHS, OTHERS, needle_record, words

HAYSTACK = [f"Sentence {i} of the text has a few more words than {i // 3}." for i in range(90)]
NEEDLE = re.compile(r"The secret number of ([A-Z]\w+) is (\d{7})\.")


@pytest.mark.parametrize("depth", [0, 50, 100])
def test_the_needle_is_at_its_depth_in_consecutive_sentences(depth):
    record = needle_record(HAYSTACK, 400, depth, 7)
    text, question = record["prompt"].split("\n\n")
    city = re.fullmatch(
        r"Question: What is the secret number of (\w+)\?\nAnswer: The secret number of \1 is", question
    )[1]
    numbers = dict(NEEDLE.findall(text))
    assert len(numbers) == 1 + OTHERS
    assert record["completion"] == f" {numbers[city]}."
    before, after = text.split(f"The secret number of {city} is {numbers[city]}.")
    sentences = [NEEDLE.sub("", part).count(".") for part in (before, after)]
    assert sentences[0] == round(depth / 100 * sum(sentences))
    assert words(text) <= 400 < words(text) + max(map(words, HAYSTACK))
    places = [int(number) for number in re.findall(r"Sentence (\d+) of", text)]
    assert [(after - before) % 90 for before, after in pairwise(places)] == [1] * (len(places) - 1)


def test_records_depend_on_length_depth_and_number_alone():
    records = [
        needle_record(HAYSTACK, *key)
        for key in ((400, 50, 7), (400, 50, 7), (400, 25, 7), (401, 50, 7), (400, 50, 8))
    ]
    assert records[0] == records[1]
    assert len({record["completion"] for record in records}) == 4
    shorter = needle_record(HAYSTACK, 400, 50, 7, room=0)
    assert shorter["completion"] == records[0]["completion"]
    assert "Sentence" not in shorter["prompt"]
    # The same in every release of NumPy and Python.
    digest = hashlib.sha256(json.dumps(records[0], sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "1e8595dcc19bf779"


@pytest.mark.network
def test_the_data_set_is_real_text_with_other_passages_held_out(cache):
    train, held = (
        open_source(DataConfig(dataset="needle:250"), split) for split in ("train", "validation")
    )
    assert (len(train), len(held)) == (tasks.NEEDLE_SIZES["train"], tasks.NEEDLE_SIZES["validation"])
    for source in (train, held):
        for record in source.read(range(0, len(source), 40)):
            assert record["completion"].strip(" .") in record["prompt"]
            assert 200 < words(record["prompt"]) <= 250 + 17
    assert [record["depth"] for record in held.read(range(5))] == list(DEPTHS)
    assert len({record["depth"] for record in train.read(range(200))}) > 50
    assert not set(tasks.sentences("train")) & set(tasks.sentences("validation"))
