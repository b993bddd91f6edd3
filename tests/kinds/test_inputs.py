"""What is said of a run's data before its model is read."""

from __future__ import annotations

import json
import logging

from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.kinds.inputs import open_records, settle_schedule


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


def test_one_epoch_is_logged_in_the_singular(caplog) -> None:
    caplog.set_level(logging.INFO)
    steps = [settle_schedule(RunConfig(epochs=epochs), 64, 40, "rows").steps for epochs in (1, 1.5)]
    assert steps == [5, 8]
    messages = [message for message in caplog.messages if "epoch" in message]
    assert messages == ["1 epoch of 40 rows: 5 steps of 8", "1.5 epochs of 40 rows: 8 steps of 8"]
