"""What is said of a run's data before its model is read."""

from __future__ import annotations

import json

from nalora_jax.config import DataConfig
from nalora_jax.train.inputs import open_records


def test_evaluation_on_what_is_trained_on_is_warned_of(tmp_path, caplog) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{i}", "completion": "x"}) + "\n" for i in range(20))
    )
    copy, other = tmp_path / "copy.jsonl", tmp_path / "other.jsonl"
    copy.write_text(data.read_text())
    other.write_text(data.read_text().replace('"x"', '"y"'))
    for eval_split, warned in (
        ("train", True),
        (str(copy), True),
        (str(other), False),
        ("auto", False),
    ):
        caplog.clear()
        open_records(DataConfig(dataset=str(data), train_split="train", eval_split=eval_split))
        assert ("holds the records that are trained on" in caplog.text) == warned
