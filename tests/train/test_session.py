"""A run while it lasts: the messages that name it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

from nalora_jax.train.run import best_state
from nalora_jax.train.session import Running


def test_the_best_evaluation_names_its_run_of_a_sweep(caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    run = object.__new__(Running)
    run.label = "seed-1: "
    best = SimpleNamespace(step=15)
    checkpointer: Any = SimpleNamespace(
        wait=lambda: None, best_step=lambda: 15, restore=lambda which, like: (best, {})
    )
    job: Any = SimpleNamespace(assembly=SimpleNamespace(state=None))
    run.checkpointer = checkpointer
    run.job = job
    last: Any = SimpleNamespace(step=20, state=None)
    assert best_state(run, last) is best
    assert caplog.messages == ["seed-1: the best evaluation was at step 15: exporting that one"]
