"""The data of studies/gate_data.py: fixed records, no prompt twice, the language's word order."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nalora_jax.common import imports
from nalora_jax.common.digests import digest_of
from nalora_jax.config import DataConfig
from nalora_jax.data import sources
from nalora_jax.errors import NaloraError

FILE = Path(__file__).parents[2] / "studies" / "gate_data.py"
DIGESTS = {  # of 4,000 records
    "format": "e67a25a3067d25e752f8b35302629366a01a2b57801d58ed5924a3687a1bcbc1",
    "synthetic": "9607bbe9b56fbe570f5cfa6aff2a0d604cda28962e3558025df635edc4f73600",
}


@pytest.fixture
def gate_data(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The globals of the file; its sources are registered for one test."""
    monkeypatch.setattr(imports, "_IMPORTED", dict(imports._IMPORTED))
    monkeypatch.setattr(sources._OPENERS, "_values", dict(sources._OPENERS._values))
    imports.import_file(str(FILE))
    return sources._OPENERS.get("code").__globals__


def records(dataset: str) -> list[dict[str, str]]:
    source = sources.open_source(DataConfig(dataset=dataset), "train")
    found = source.read(range(len(source)))
    assert len({record["prompt"] for record in found}) == len(found)
    return found


@pytest.mark.parametrize(("name", "digest"), DIGESTS.items())
def test_generated_records_are_fixed_and_those_of_more_records(
    gate_data, tmp_path, monkeypatch, name, digest
) -> None:
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path))
    found = records(f"{name}:4000")
    assert digest_of(json.dumps(found)) == digest
    assert records(f"{name}:40") == found[:40]
    with pytest.raises(NaloraError, match="number of records"):
        records(f"{name}:many")


def test_a_sentence_begins_with_its_time_and_ends_with_its_subject(gate_data) -> None:
    words = gate_data["_LEXICON"]
    assert len(set(words.values())) == len(words)
    for seed in range(20):
        prompt, translation = gate_data["sentence"](random.Random(seed))
        english = prompt.split("\n")[0].removeprefix("English: ").rstrip(".").lower().split()
        translated = translation.removesuffix(".").split()
        times = [
            word for word in ("yesterday", "today", "often", "never", "always") if word in english
        ]
        assert set(translated[: len(times)]) == {words[time] for time in times}
        number = words.get(english[0], "")  # of the subject, whose last word it is
        assert number == "" or translated[-1] == number


@pytest.mark.network
def test_django_and_wagtail_give_functions_and_translations(gate_data) -> None:
    functions, messages = records("code"), records("german")
    assert len(functions) == 1366
    assert len(messages) == 1234
    for record in functions:
        compile(record["prompt"] + record["completion"], "function", "exec")
    german = {record["prompt"]: record["completion"] for record in messages}
    assert german["English: Add another %(model)s\nGerman:"] == " %(model)s hinzufügen"
    assert len({record["completion"] for record in functions}) == len(functions)
