"""Tasks of the real reasoning-gym: data and scores by name."""

from __future__ import annotations

import importlib
import sys

import pytest

from nalora_jax.config import DataConfig
from nalora_jax.data import reasoning_gym_tasks
from nalora_jax.data.reasoning_gym_tasks import open_tasks, score_completion
from nalora_jax.data.sources import open_pair, open_source
from nalora_jax.errors import NaloraError

TASK = "reasoning_gym:chain_sum:min_digits=1:max_digits=2:size=60"


def test_a_task_is_a_data_set_with_scores() -> None:
    pytest.importorskip("reasoning_gym")
    train, held_out = open_pair(DataConfig(dataset=TASK))
    records = train.read(range(len(train)))
    assert len(records) == 60
    others = held_out.read(range(len(held_out)))
    assert len(others) > 50
    assert not {one["prompt"] for one in records} & {one["prompt"] for one in others}
    theirs = importlib.import_module("reasoning_gym").create_dataset(
        "chain_sum", min_digits=1, max_digits=2, size=60, seed=0
    )
    for record, entry in zip(records, theirs, strict=True):
        assert record["prompt"] == entry["question"]
        assert record["completion"] == f" {entry['answer']}"
        for answer in (entry["answer"], "12345", ""):
            expected = theirs.score_answer(answer, entry)
            assert score_completion(record, f" {answer}\n") == expected
            text = f"so <answer>1</answer> or <answer>{answer}</answer>."
            assert score_completion(record, text) == expected
    assert score_completion(records[0], records[0]["answer"]) == 1.0


def test_answers_of_tasks_with_many_are_scored() -> None:
    pytest.importorskip("reasoning_gym")
    (record,) = open_source(DataConfig(dataset="reasoning_gym:graph_color:size=1"), "train").read(
        [0]
    )
    assert record["completion"] == " (any)"
    assert score_completion(record, "nonsense") < 1.0


@pytest.mark.parametrize(
    ("argument", "split", "message"),
    [
        ("absent", "train", "expected a task with its settings, found Dataset 'absent'"),
        ("chain_sum:terms=3", "train", "unexpected keyword argument 'terms'"),
        ("chain_sum:min_terms=0", "train", "expected a task with its settings"),
        ("chain_sum", "test", "expected train or validation, found test"),
    ],
)
def test_unknown_tasks_settings_and_splits_are_named(argument, split, message) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(NaloraError, match=message):
        open_tasks(argument, split)


def test_a_missing_library_and_other_records_are_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(NaloraError, match="expected the library reasoning-gym.*pip install"):
        open_tasks("chain_sum", "train")
    with pytest.raises(NaloraError, match="expected records of --data.dataset reasoning_gym:TASK"):
        score_completion({"prompt": "a"}, "b")


def test_values_of_settings_have_their_types() -> None:
    values = [reasoning_gym_tasks._value(text) for text in ("3", "0.5", "True", "abc")]
    assert values == [3, 0.5, True, "abc"]
