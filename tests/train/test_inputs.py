"""Inputs are judged by what is quickly read: the data, and the model's description without its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nalora_jax.config import DataConfig
from nalora_jax.errors import NaloraError
from nalora_jax.train.inputs import open_records


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "x"}) + "\n" for i in range(20)))
    return path


def test_data_and_splits_are_opened(data: Path, tmp_path: Path) -> None:
    config = DataConfig(dataset=str(data), train_split="train[:10]", eval_split="train[10:]")
    train, held_out = open_records(config)
    assert (len(train), len(held_out)) == (10, 10)
    (tmp_path / "broken.jsonl").write_text("no JSON\n")
    for changed, said in [
        ({"dataset": str(tmp_path / "none.jsonl")}, "none.jsonl: expected a readable file"),
        ({"eval_split": "train[5:]"}, "--data.eval-split: expected records that .* does not train on"),
        ({"eval_split": "valid"}, r"data.jsonl\[valid\]"),
        ({"eval_split": str(tmp_path / "broken.jsonl")}, "broken.jsonl:1: expected a JSON object"),
        ({"dataset": "socialqia"}, "--data.dataset: .*did you mean socialiqa"),
    ]:
        with pytest.raises(NaloraError, match=said):
            open_records(DataConfig(**(vars(config) | changed)))


def test_evaluation_on_what_is_trained_on_is_warned_of(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy, other = tmp_path / "copy.jsonl", tmp_path / "other.jsonl"
    copy.write_text(data.read_text())
    other.write_text(data.read_text().replace('"x"', '"y"'))
    for eval_split, warned in (("train", True), (str(copy), True), (str(other), False), ("auto", False)):
        caplog.clear()
        open_records(DataConfig(dataset=str(data), train_split="train", eval_split=eval_split))
        assert ("holds the records that are trained on" in caplog.text) == warned
