"""Signals that arrive twice."""

from __future__ import annotations

import contextlib
import signal

import pytest

from nalora_jax.errors import Interrupted
from nalora_jax.train import preemption
from nalora_jax.train.preemption import stop_signals


@pytest.mark.parametrize(
    ("first", "second", "foreground", "after", "cut"),
    [
        (signal.SIGTERM, signal.SIGTERM, True, 1, False),
        (signal.SIGTERM, signal.SIGINT, True, 1, False),
        (signal.SIGINT, signal.SIGINT, False, 1, False),
        (signal.SIGINT, signal.SIGINT, True, 1, True),
        (signal.SIGTERM, signal.SIGTERM, False, 31, True),
    ],
)
def test_only_a_second_ctrl_c_or_a_late_signal_cuts_a_save_short(
    monkeypatch, first, second, foreground, after, cut
) -> None:
    now = [0.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(preemption, "in_foreground", lambda: foreground)
    for polled in (True, False):  # also while the checkpoint is written after the last step
        with stop_signals() as stop, contextlib.ExitStack() as steps:
            steps.enter_context(stop.between_steps())
            signal.raise_signal(first)
            if not polled:
                steps.close()
            now[0] += after
            with pytest.raises(Interrupted) if cut else contextlib.nullcontext():
                signal.raise_signal(second)
            assert stop.signal == first
