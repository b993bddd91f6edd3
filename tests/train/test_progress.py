"""What a run shows: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from nalora_jax.train.progress import Progress, describe, duration

VALUES = {"loss": 3.21, "learning_rate": 1e-3, "tokens_per_second": 1234.0, "misalignment": 0.26}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def plain(**options):
    return Console(file=io.StringIO(), force_terminal=False, width=200, **options)


def test_without_a_terminal_each_log_step_is_one_plain_line():
    console, clock = plain(), Clock()
    with Progress(100, console=console, clock=clock) as progress:
        for step in range(1, 31):
            clock.now += 2.0
            progress.advance(step)
            if step % 10 == 0:
                progress.log(step, VALUES)
    numbers = "loss 3.210  lr 1.0e-03  1,234 tok/s  misalignment 0.260"
    assert console.file.getvalue().splitlines() == [
        f"step 10/100  {numbers}",
        f"step 20/100  {numbers}  2:40 left",
        f"step 30/100  {numbers}  2:20 left",
    ]


def test_time_left_leaves_out_what_came_before_the_first_log_step():
    clock = Clock()
    progress = Progress(100, start=50, console=plain(), clock=clock)
    clock.now += 1000.0  # compiling
    assert progress.seconds_left(60) is None
    clock.now += 10.0
    assert progress.seconds_left(70) == 30.0


def test_the_last_step_has_no_time_left():
    console, clock = plain(), Clock()
    progress = Progress(20, console=console, clock=clock)
    for step in (10, 20):
        clock.now += 1
        progress.log(step, {"loss": 1.0})
    assert console.file.getvalue().splitlines()[-1] == "step 20/20  loss 1.000"


def test_numbers_that_are_missing_are_left_out():
    assert describe({"loss": 1.0, "tokens_per_second": None}) == ["loss 1.000"]


def test_the_bar_shows_the_numbers_and_lines_go_above_it():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(100, start=40, console=console) as progress:
        progress.advance(41)
        progress.log(50, VALUES)
        progress.say("[saved] checkpoint")
    shown = console.file.getvalue()
    assert "50/100  loss 3.210  lr 1.0e-03  1,234 tok/s  misalignment 0.260" in shown
    assert "[saved] checkpoint" in shown  # brackets are text, not markup


def test_the_bar_fits_eighty_columns():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    clock = Clock()
    with Progress(100, console=console, clock=clock) as progress:
        progress.log(10, VALUES)
        clock.now += 60.0
        progress.log(50, VALUES)
    assert "1:15 left" in console.file.getvalue()


def test_durations():
    assert [duration(seconds) for seconds in (0, 59.6, 125.4, 3725)] == ["0:00", "1:00", "2:05", "1:02:05"]
