"""A run while it lasts: the messages that name it."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nalora_jax.train.output import Output
from nalora_jax.train.preemption import StopSignals
from nalora_jax.train.run import best_state
from nalora_jax.train.session import Session


def test_the_best_evaluation_names_its_run_of_a_sweep(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    session = Session(Output(tmp_path, False), StopSignals(), (), label="seed-1: ")
    best = SimpleNamespace(step=15)
    session.checkpointer = SimpleNamespace(
        wait=lambda: None, best_step=lambda: 15, restore=lambda which, like: (best, {})
    )
    job: Any = SimpleNamespace(assembly=SimpleNamespace(state=None))
    last: Any = SimpleNamespace(step=20, state=None)
    assert best_state(job, last, session) is best
    assert caplog.messages == ["seed-1: the best evaluation was at step 15: exporting that one"]
