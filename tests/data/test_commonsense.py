"""The library's own TFDS builder, on the real package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nalora_jax.config import DataConfig
from nalora_jax.data import tasks
from nalora_jax.data.sources import open_source

READ = """
import sys
from nalora_jax.config import DataConfig
from nalora_jax.data.sources import open_source

source = open_source(DataConfig(dataset="socialiqa"), "train")
print(len(source), source[0]["prompt"])
assert "tensorflow" not in sys.modules
"""


@pytest.mark.network
def test_prepares_and_reads_without_tensorflow(cache):
    """From the package to records in a fresh process; the package itself comes from the shared cache."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", READ], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "33410 Question: Cameron decided to have a barbecue"
    )  # nothing of TFDS's own
    folder = cache / "tfds" / "commonsense" / "socialiqa" / tasks.VERSION
    assert (folder / "dataset_info.json").exists()
    assert not list(folder.parent.glob("incomplete*"))


@pytest.mark.network
def test_socialiqa():
    source = open_source(DataConfig(dataset="socialiqa"), "validation")
    assert len(source) == 1_954
    for record in source.read(range(0, len(source), 500)):
        assert len(record["choices"]) == 3
        assert record["completion"] == f" {record['choices'][record['gold']]}"
        assert record["prompt"].startswith("Question: ")
        assert record["prompt"].endswith("\nAnswer:")
        assert record["prompt"].count("Question:") == 1, "worked examples are left out"
        assert record["choice_prompts"] == []


@pytest.mark.network
def test_answers_by_letter():
    record = open_source(DataConfig(dataset="arc_challenge_mc"), "test")[0]
    assert record["choices"] == ["A", "B", "C", "D"]
    assert record["completion"] == f" {'ABCD'[record['gold']]}"
    assert "\n A. " in record["prompt"]


@pytest.mark.network
def test_fill_in_sentences_have_a_prompt_per_choice():
    records = open_source(DataConfig(dataset="winogrande"), "validation").read(range(50))
    for record in records:
        first, second = record["choice_prompts"]
        assert first.endswith(record["choices"][0])
        assert second.endswith(record["choices"][1])
        assert record["prompt"] == record["choice_prompts"][record["gold"]]
        assert record["completion"].startswith(" ")
