"""Terminal output of training: one line per log step, and on a terminal a progress bar below."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from nalora_jax.common import notes

STARTING = "  starting ..."


class Progress:
    """Display of a run's numbers at log steps (`step_columns`) and of the remaining time.

    A context manager.

    Args:
      total: optimizer steps of the whole run.
      start: steps completed before (above 0 after a resume).
      console: output console; standard output by default.
      hidden: names of numbers that the line leaves out; JSON lines have all.
      clock: seconds since any origin; replaced in tests.

    Example:
      >>> with Progress(total=100) as progress:
      ...     for step in range(1, 101):
      ...         progress.advance(step)                      # every step; touches no device value
      ...         if step % 10 == 0:
      ...             progress.log(step, {"loss": 3.2, "learning_rate": 1e-3})
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        console: Console | None = None,
        hidden: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self._clock = clock
        self._hidden = hidden
        self.console = console or Console(highlight=False)
        self._first: tuple[int, float] | None = None
        self._bar: RichProgress | None = None
        self._numbers = STARTING
        self._listening = ExitStack()
        # A file or a pipe gets one line a log step, and no bar.
        if self.console.is_terminal and not notes.writes_json():
            text = TextColumn(
                "{task.completed:.0f}/{task.total:.0f}{task.fields[numbers]}",
                markup=False,
            )
            width = 16 if self.console.width >= 100 else 6
            self._bar = RichProgress(
                BarColumn(bar_width=width), text, console=self.console
            )
            self._task = self._bar.add_task(
                "train", total=total, completed=start, numbers=self._numbers
            )

    def advance(self, step: int) -> None:
        """Records that ``step`` steps have been started."""
        if self._bar is not None:
            # The first step was dispatched: the compilation is over.
            if self._numbers == STARTING:
                self._numbers = ""
            self._bar.update(self._task, completed=step, numbers=self._numbers)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Prints the numbers of a log step with the remaining time, and shows them next to the bar.

        ``values`` has the keys of metrics.jsonl; None is skipped. With JSON output it prints one
        object.
        """
        left = None
        if step < self.total:
            left = self.seconds_left(step)
        if notes.writes_json():
            numbers = {
                name: value
                for name, value in values.items()
                if isinstance(value, int | float)
            }
            self._write(
                {"step": step, "total": self.total} | numbers | {"seconds_left": left}
            )
            return
        shown = {n: value for n, value in values.items() if n not in self._hidden}
        line = "".join(f"  {column}" for column in step_columns(shown))
        if left is not None:
            line += f"  {duration(left)} left"
        self.say(f"step {step}/{self.total}{line}")
        self._numbers = line
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=line)

    def seconds_left(self, step: int) -> float | None:
        """Returns seconds until the last step at the mean speed since the first log step, or None.

        It is None at the first log step. Earlier time is not counted, because it includes the
        compilation.
        """
        now = self._clock()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return None
        first, then = self._first
        return (now - then) / (step - first) * (self.total - step)

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if notes.writes_json():
            self._write({"message": text})
        else:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _write(self, values: Mapping[str, object]) -> None:
        """Prints one JSON object on a line."""
        self.console.print(
            json.dumps(values), markup=False, highlight=False, soft_wrap=True
        )

    def _counted(self, what: str, count: int, total: int | None) -> None:
        """Shows progress of work other than steps in the bar's line; restores the line when it is
        done.

        Args:
          what: name of the work.
          count, total: units done and overall; ``total`` is None if unknown.
        """
        assert self._bar is not None
        done = total is not None and count >= total
        if done:
            numbers = self._numbers
        else:
            numbers = f"  {notes.progress_text(what, count, total)}"
        self._bar.update(self._task, numbers=numbers)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            # Work other than steps, e.g. a compilation, reports its progress to the bar.
            self._listening.enter_context(notes.pass_progress_to(self._counted))
        return self

    def __exit__(self, *error: object) -> None:
        self._listening.close()
        if self._bar is not None:
            self._bar.stop()


def step_columns(values: Mapping[str, float | None]) -> list[str]:
    """Returns the numbers of a log step, each with its name or unit.

    Example:
      >>> step_columns({"loss": 3.21, "learning_rate": 1e-3, "tokens_per_second": 1234.0})
      ['loss 3.210', 'lr 1.0e-03', '1,234 tok/s']
    """
    formats = {
        "loss": "loss {:.3f}",
        "learning_rate": "lr {:.1e}",
        "tokens_per_second": "{:,.0f} tok/s",
        "reward": "reward {:.3f}",
        "rewards_margin": "reward margin {:+.3f}",
        "rewards_accuracy": "preferred {:.0%}",
        "agreement": "agreement {:.0%}",
        "misalignment": "misalignment {:.3f}",
    }
    shown = ((text, values.get(name)) for name, text in formats.items())
    return [text.format(value) for text, value in shown if value is not None]


class Stages:
    """Wall time in seconds by stage.

    A stage starts when the previous one ends, the first one at construction.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, stage: str) -> None:
        """Records the end of ``stage``."""
        now = time.perf_counter()
        self.seconds[stage], self._since = now - self._since, now


def duration(seconds: float) -> str:
    """Returns a duration as ``m:ss`` or ``h:mm:ss``.

    Example:
      >>> duration(125.4), duration(3725)
      ('2:05', '1:02:05')
    """
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds_left:02d}"
    return f"{minutes}:{seconds_left:02d}"
