"""A whole run on records that a program hands in, with what it leaves to them and who listens to
it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nalora_jax import run
from nalora_jax.config import ComputeConfig, DataConfig, OptimizerConfig, TrainConfig
from nalora_jax.errors import NaloraError
from nalora_jax.train.callbacks import Callback
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")


class Told(Callback):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.events, self.saved = list[tuple[Any, ...]](), list[int]()

    def on_eval(self, step: int, values: Any, kind: str) -> None:
        self.events.append((step, kind))

    def on_save(self, step: int, folder: Path) -> None:
        self.saved.append(int(folder.name))

    def on_end(self, ended: Any) -> None:
        self.events.append((ended.step, ended.best_step))


def test_a_run_on_records_of_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nalora_jax.data.pipeline.SHORTEST", 1)
    monkeypatch.setattr("nalora_jax.data.pipeline.FULL_EFFICIENCY", 0.7)
    config = tiny.make_config(tmp_path)
    lines = (tmp_path / "questions.jsonl").read_text().splitlines()
    records = [{"inner": json.loads(line)} for line in lines]
    config = replace(
        config,
        epochs=2.0,
        data=DataConfig(max_length=0),
        optimizer=OptimizerConfig(learning_rate=0.0),  # automatic, as the length
        train=TrainConfig(batch_size=8, log_every=1, save_every=0),
        callbacks=("tensorboard",),
        compute=ComputeConfig(compilation_cache=False),  # in bfloat16
    )

    def example(record: dict[str, Any]) -> dict[str, Any]:
        return {**record["inner"], "completion": " z"}

    told = Told()
    result = run(config, data=iter(records), format=example, callbacks=[told])
    header = tiny.lines(result.folder)[0]
    settings = header["run"]
    # 48 of 60 records are trained on: 3 positions each, two in a row of 8, 24 rows, 8 a step.
    assert (header["data"]["examples"], header["data"]["in_turns"]) == (48, False)
    assert (settings["steps"], settings["epochs"], settings["data"]["max_length"]) == (6, 2.0, 8)
    assert (settings["train"]["eval_every"], settings["data"]["dataset"]) == (3, "in memory")
    assert (result.before["n"], result.after["n"]) == (8, 8)
    best = result.best_step
    assert told.events == [(0, "initial"), (0, ""), (3, ""), (6, ""), (best, "final"), (6, best)]
    assert told.saved == [3, 6]
    assert list((result.folder / "tensorboard").iterdir())

    again = replace(config, resume=True, epochs=3.0)
    longer = run(again, data=records, format=example)
    assert tiny.lines(longer.folder)[-1]["done"]["step"] == 9
    other = {"prompt": "a b", "completion": " y", "choices": ["c", "y"], "gold": 1}
    with pytest.raises(NaloraError, match="data position"):
        run(
            replace(again, epochs=0.0, steps=12),
            data=[{"inner": other} for _ in records],
            format=example,
        )
