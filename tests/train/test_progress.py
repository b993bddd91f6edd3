"""What a run shows: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import json

from rich.console import Console

from nalora_jax.config import RLConfig, RunConfig
from nalora_jax.train.progress import Progress
from nalora_jax.train.session import hidden_numbers

VALUES = {"loss": 3.21, "learning_rate": 1e-3, "tokens_per_second": 1234.0, "misalignment": 0.26}


def test_without_a_terminal_each_log_step_is_one_plain_line():
    console, now = Console(file=io.StringIO(), force_terminal=False, width=200), [100.0]
    with Progress(100, console=console, clock=lambda: now[0]) as progress:
        for step in range(1, 31):
            now[0] += 2.0
            progress.advance(step)
            if step % 10 == 0:
                progress.log(step, VALUES)
    numbers = "loss 3.210  lr 1.0e-03  1,234 tok/s  misalignment 0.260"
    assert console.file.getvalue().splitlines() == [
        f"step 10/100  {numbers}",
        f"step 20/100  {numbers}  2:40 left",
        f"step 30/100  {numbers}  2:20 left",
    ]


def test_the_bar_shows_the_numbers_and_lines_go_above_it():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(100, start=40, console=console) as progress:
        progress.advance(41)
        progress.log(50, VALUES)
        progress.say("[saved] checkpoint")
    shown = console.file.getvalue()
    assert "50/100  loss 3.210  lr 1.0e-03  1,234 tok/s  misalignment 0.260" in shown
    assert "[saved] checkpoint" in shown  # brackets are text, not markup


def test_as_json_every_line_is_an_object(monkeypatch):
    monkeypatch.setenv("NALORA_LOG_FORMAT", "json")
    console, now = Console(file=io.StringIO(), force_terminal=True, width=40), [100.0]
    with Progress(30, console=console, clock=lambda: now[0]) as progress:
        for step in (10, 20):
            now[0] += 5.0
            progress.advance(step)
            progress.log(step, VALUES | {"tokens_per_second": None, "layers": [1, 2]})
        progress.say("[before] held-out accuracy 0.5")
    first, second, third = map(json.loads, console.file.getvalue().splitlines())
    numbers = {"loss": 3.21, "learning_rate": 1e-3, "misalignment": 0.26}
    assert first == {"step": 10, "total": 30, "seconds_left": None} | numbers
    assert second["seconds_left"] == 5.0
    assert third == {"message": "[before] held-out accuracy 0.5"}


def test_a_line_leaves_hidden_numbers_out_and_shows_the_reward():
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    with Progress(9, console=console, hidden=["misalignment"]) as progress:
        progress.log(9, VALUES | {"reward": 0.5})
    line = "step 9/9  loss 3.210  lr 1.0e-03  1,234 tok/s  reward 0.500\n"
    assert console.file.getvalue() == line


def test_misalignment_is_hidden_for_plain_lora_and_for_rewards():
    assert hidden_numbers(RunConfig()) == []
    for config in (RunConfig(mechanisms=()), RunConfig(rl=RLConfig(rewards=("number",)))):
        assert hidden_numbers(config) == ["misalignment"]
