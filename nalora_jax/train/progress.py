"""What a run shows while it trains: a progress bar on a terminal, one plain line per log step elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Loss, learning rate, tokens/s, misalignment and time left; a context manager.

    Args:
      total: optimizer steps of the whole run.
      start: step that the run starts from (above 0 after a resume).
      console: where to write; standard output by default.
      clock: seconds from any origin; replaced in tests.

    Example:
      >>> with Progress(total=100) as progress:
      ...     for step in range(1, 101):
      ...         progress.advance(step)                      # every step; touches no device value
      ...         if step % 10 == 0:
      ...             progress.log(step, {"loss": 3.2, "learning_rate": 1e-3, "tokens_per_second": 900.0})
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self._clock = total, clock
        self.console = console or Console(highlight=False)
        self._first: tuple[int, float] | None = None
        self._bar: RichProgress | None = None
        if self.console.is_terminal:
            text = TextColumn("{task.completed:.0f}/{task.total:.0f}{task.fields[numbers]}", markup=False)
            width = 16 if self.console.width >= 100 else 6
            self._bar = RichProgress(BarColumn(bar_width=width), text, console=self.console)
            self._task = self._bar.add_task("train", total=total, completed=start, numbers="  starting ...")

    def advance(self, step: int) -> None:
        """Say that ``step`` steps have been started."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Show the numbers of a log step (keys as in metrics.jsonl; those that are missing or None are left out)."""
        shown = "".join(f"  {part}" for part in describe(values))
        left = self.seconds_left(step)
        shown += f"  {duration(left)} left" if left is not None and step < self.total else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=shown)
        else:
            self.say(f"step {step}/{self.total}{shown}")

    def seconds_left(self, step: int) -> float | None:
        """Seconds until the last step at the mean speed since the first log step, or None at that step.

        What came before the first log step is left out, because it holds the compilation.
        """
        now = self._clock()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return None
        first, then = self._first
        return (now - then) / (step - first) * (self.total - step)

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del kind, error, trace
        if self._bar is not None:
            self._bar.stop()


def describe(values: Mapping[str, float | None]) -> list[str]:
    """The numbers of a log step, each with its name or unit.

    Example:
      >>> describe({"loss": 3.21, "learning_rate": 1e-3, "tokens_per_second": 1234.0, "misalignment": 0.26})
      ['loss 3.210', 'lr 1.0e-03', '1,234 tok/s', 'misalignment 0.260']
    """
    formats = {
        "loss": "loss {:.3f}",
        "learning_rate": "lr {:.1e}",
        "tokens_per_second": "{:,.0f} tok/s",
        "misalignment": "misalignment {:.3f}",
    }
    return [text.format(value) for name, text in formats.items() if (value := values.get(name)) is not None]


def duration(seconds: float) -> str:
    """A length of time as ``m:ss`` or ``h:mm:ss``.

    Example:
      >>> duration(125.4), duration(3725)
      ('2:05', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
