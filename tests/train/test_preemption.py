"""Signals that arrive twice, or at one of two processes."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from nalora_jax import run
from nalora_jax.config import MeshConfig, TrainConfig
from nalora_jax.errors import Interrupted
from nalora_jax.train import preemption
from nalora_jax.train.preemption import stop_signals
from tests import tiny


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
    monkeypatch.setattr(preemption, "is_in_foreground", lambda: foreground)
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


def test_a_sigterm_to_one_process_stops_both_and_one_process_completes_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=100_000)
    mesh = MeshConfig(-1, 1, 1)
    config = tiny.make_config(tmp_path, steps=100_000, train=train, mesh=mesh, mechanisms=())
    settings = tiny.write_settings(config, tmp_path / "settings.py")
    command = ["-m", "nalora_jax", "train", "--config", str(settings)]
    monkeypatch.setenv("NALORA_CACHE", tiny.new_cache(tmp_path / "cache"))
    first, second = tiny.start(command, count=2)
    tiny.wait_for_line(first, "step 3/")
    second.send_signal(signal.SIGTERM)
    (status, _, error), (other, *_) = tiny.finish([first, second])
    assert (status, other) == (143, 143), error
    step = max(tiny.logged(config.output))
    assert f"interrupted by SIGTERM; saved step {step}; continue with" in error
    run(replace(config, resume="auto", steps=step + 3))
    assert f'"resumed": {{"step": {step},' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert max(tiny.logged(config.output)) == step + 3
