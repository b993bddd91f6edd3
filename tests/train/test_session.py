"""What a run says and writes beside its steps."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nalora_jax.config import RunConfig
from nalora_jax.train.session import Session, say_counts


@pytest.mark.parametrize(
    ("choosing", "chosen", "warned"), [(4, True, True), (4, False, False), (10, True, False)]
)
def test_a_choice_by_few_examples_is_warned_of(
    caplog: pytest.LogCaptureFixture, choosing: int, chosen: bool, warned: bool
) -> None:
    with caplog.at_level(logging.INFO, "nalora_jax"):
        say_counts(8, choosing, chosen=chosen)
    said, *warnings = (record.getMessage() for record in caplog.records)
    by = f", the choice of the checkpoint on {choosing} others" if chosen else ""
    assert said == f"results rest on 8 held-out examples{by}"
    assert ["only 4 examples choose the checkpoint" in text for text in warnings] == [True] * warned


@pytest.mark.parametrize("waits", [False, True])
def test_a_write_ends_before_another_runs_write_begins(waits: bool) -> None:
    """In a sweep of several processes: Orbax's barriers of two writes at a time would have the same name."""
    calls: list[str] = []
    checkpointer: Any = SimpleNamespace(
        save=lambda *_: calls.append("save"), wait=lambda: calls.append("wait"), folder=Path("run")
    )
    silent: Any = SimpleNamespace(save=lambda *_: None, get_state=dict, resumes=False)
    session = Session(silent, silent, ())
    session.checkpointer, session.batches, session.callbacks = checkpointer, silent, silent
    session.job, session.waits_for_writes = SimpleNamespace(config=RunConfig()), waits  # type: ignore[assignment]
    state: Any = None
    session.save(3, state, None)
    assert calls == ["save"] + ["wait"] * waits
