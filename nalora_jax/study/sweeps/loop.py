"""The training loop over the runs of one program.

Each run logs, evaluates and saves as a solo run does. A run that is finished, stopped early or
diverged keeps its state while the others train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from signal import Signals
from typing import Any

import jax
import numpy as np

from nalora_jax.common.notes import counting
from nalora_jax.errors import TrainingDivergedError
from nalora_jax.layout import distributed
from nalora_jax.method.step import TrainState
from nalora_jax.study.sweeps.program import SweepProgram
from nalora_jax.study.sweeps.stack import batch_of
from nalora_jax.train.loop import FitResult, Follower
from nalora_jax.train.preemption import StopSignals


class RunLoop:
    """A run in the loop.

    Args:
      follower: its actions after each step.
      batches: its host batches, starting at its next step.
      start: steps completed before.
      steps: steps of the run.

    Attributes:
      error: set if the run diverged.
    """

    def __init__(
        self, follower: Follower, batches: Iterator[Mapping[str, np.ndarray]], *, start: int, steps: int
    ) -> None:
        self.follower, self.step, self.active = follower, start, start < steps
        self.error: TrainingDivergedError | None = None
        self._batches = batches
        self._batch: Mapping[str, np.ndarray] | None = None

    @property
    def interrupted(self) -> bool:
        """True if a stop request ended the run."""
        return self.follower.result.interrupted

    def batch(self) -> Mapping[str, np.ndarray]:
        """Returns the next batch; of a run that has ended, the last one again."""
        if self.active or self._batch is None:
            self._batch = next(self._batches)
        return self._batch

    def after(self, metrics: Mapping[str, Any], state: Callable[[], TrainState]) -> None:
        """Acts after a step of the program."""
        if not self.active:
            return
        self.step += 1
        try:
            self.active = self.follower.after(self.step, metrics, state)
        except TrainingDivergedError as error:
            self.active, self.error = False, error


class StopOfAll(StopSignals):
    """The stop request of several runs, asked once after each step, so that all end together."""

    def __init__(self, signals: StopSignals) -> None:
        super().__init__()
        self._signals, self._asked = signals, False

    @property
    def signal(self) -> Signals:
        """Returns the signal that stopped the runs."""
        return self._signals.signal

    def ask(self, step: int) -> None:
        """Reads the request after ``step`` steps of the program; all processes call it."""
        self._asked = self._signals.asked(step)

    def asked(self, step: int) -> bool:
        """Returns True if the runs have to stop."""
        del step
        return self._asked


def fit_all(
    program: SweepProgram, runs: Sequence[RunLoop], measured: StatesMetrics, stop: StopOfAll | None = None
) -> list[FitResult]:
    """Runs all steps of all runs, and returns their results.

    Args:
      program: the compiled program.
      runs: in the program's order.
      measured: the metrics of states that the runs' hooks read.
      stop: the stop request that the runs' hooks read.
    """
    states = program.begin([run.follower.result.state for run in runs])
    first, step = True, 0
    while any(run.active for run in runs):
        rows = [run.batch() for run in runs]
        batch = batch_of([*rows, *rows[-1:] * (len(program.runs) - len(rows))], program.mesh)
        if first:
            with counting("compiling the step"):
                program.lower(states, batch).compile()
            first = False
        states, metrics = program.step(states, batch, [run.active for run in runs])
        step += 1
        if stop is not None:
            stop.ask(step)
        fetched = _Fetched(metrics)
        measured.of(program, states)
        for index, run in enumerate(runs):
            run.after(_OfRun(fetched, index), partial(program.state_of, states, index))
    return [run.follower.result for run in runs]


class StatesMetrics:
    """`nalora_jax.train.state_metrics.StateMetrics` of several runs, computed by one program."""

    def __init__(self) -> None:
        self._measure: Callable[[], list[dict[str, Any]]] = list
        self._found: list[dict[str, Any]] | None = None

    def of(self, program: SweepProgram, states: TrainState) -> None:
        """Sets the states that are measured when a run asks."""
        self._measure, self._found = lambda: program.measure(states), None

    def run(self, index: int) -> _StateMetricsOfRun:
        """Returns the metrics of one run."""
        return _StateMetricsOfRun(self, index)

    def found(self) -> list[dict[str, Any]]:
        """Returns the metrics of all runs."""
        if self._found is None:
            self._found = self._measure()
        return self._found


class _StateMetricsOfRun:
    def __init__(self, shared: StatesMetrics, index: int) -> None:
        self._shared, self._index = shared, index

    def compile_ahead(self, state: TrainState) -> None:
        """Returns at once: the program of all runs compiles at the first log step."""

    def measure(self, state: TrainState) -> dict[str, Any]:
        """Returns the metrics of the run's current state."""
        del state
        return self._shared.found()[self._index]


class _Fetched:
    """Metrics ``[runs, ...]`` of a step, fetched when the first run reads them."""

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self._metrics = metrics

    @cached_property
    def on_host(self) -> Mapping[str, Any]:
        """The metrics in host memory."""
        fetched: Mapping[str, Any] = jax.tree.map(distributed.fetch, self._metrics)
        self._metrics = {}
        return fetched


class _OfRun(Mapping[str, Any]):
    """The metrics of one run."""

    def __init__(self, fetched: _Fetched, index: int) -> None:
        self._fetched, self._index = fetched, index

    def __getitem__(self, name: str) -> Any:
        return jax.tree.map(lambda leaf: leaf[self._index], self._fetched.on_host[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._fetched.on_host)

    def __len__(self) -> int:
        return len(self._fetched.on_host)
