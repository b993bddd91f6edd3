"""The training loop; it fetches values from the devices at log steps only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from nalora_jax.assembly.compilation import compile_ahead
from nalora_jax.assembly.schedule import Schedule
from nalora_jax.assembly.state_metrics import first_bad_row, non_finite
from nalora_jax.common import trees
from nalora_jax.common.notes import count_progress
from nalora_jax.errors import NaloraError, TrainingDivergedError
from nalora_jax.method.step import TrainState
from nalora_jax.train.profile import Profile

_ANEW = (
    "the checkpoints of earlier steps are kept; start anew in another --output with a lower "
    "--optimizer.learning-rate or a longer warm-up"
)


class LoopEvaluation(NamedTuple):
    """The result of one evaluation for the loop."""

    score: float  # higher is better
    metrics: Mapping[str, float]  # metrics that rank the checkpoint
    n: int = 0  # number of examples; 0 if unknown


class Hooks(Protocol):
    """Actions between steps; the loop decides when they run."""

    def log(self, step: int, record: Mapping[str, Any], state: TrainState) -> None:
        """Shows and writes the metrics of a log step, and metrics of the state after it."""

    def evaluate(self, step: int, state: TrainState) -> LoopEvaluation:
        """Computes the held-out metric, writes it and returns it."""

    def save(
        self, step: int, state: TrainState, measured: LoopEvaluation | None
    ) -> None:
        """Starts saving a checkpoint; ``measured`` is the evaluation of this step, if any."""

    def asked_to_stop(self, step: int) -> bool:
        """Returns True, in all processes, if the run has to save and end after this step."""

    def advance(self, step: int) -> None:
        """Records that a step has been dispatched."""


@dataclass
class FitResult:
    """The outcome of the loop."""

    state: TrainState
    step: int
    # (step, held-out metric)
    metrics: list[tuple[int, float]] = field(default_factory=list)
    stopped_early: bool = False
    # Stopped by request; the state was saved, but not evaluated.
    interrupted: bool = False


def run_steps(
    step_fn: Callable[[Any, TrainState, Any], tuple[TrainState, dict[str, Any]]],
    params: Any,
    state: TrainState,
    batches: Iterator[Any],
    follower: Follower,
    *,
    profile: Profile | None = None,
) -> FitResult:
    """Runs the remaining steps of a run and returns their outcome.

    Args:
      step_fn: the compiled step.
      params: frozen base weights.
      state: the follower's state; donated to the step.
      batches: one (sharded) batch per step, starting at the next step.
      follower: logs, evaluates and saves at its schedule's intervals and after the last step.
      profile: traces some of the steps.

    Raises:
      TrainingDivergedError: a loss is not finite, or an adapter or optimizer moment of a state to
        save. Checkpoints of earlier steps are kept; a diverged state is never saved.
    """
    profile = profile or Profile()
    start = follower.result.step
    for step in range(start + 1, follower.schedule.steps + 1):
        batch = next(batches)
        # Before the first step only: all steps have its shapes.
        if step == start + 1:
            with count_progress("compiling the step"):
                compile_ahead(step_fn, params, state, batch)
        with profile.step(step, state):
            state, metrics = step_fn(params, state, batch)
        profile.end(step, metrics)
        # The function is called before the next step.
        if not follower.after(step, metrics, lambda: state):  # noqa: B023
            break
    return follower.result


class Follower:
    """The actions after each step of one run: logging, evaluation, saving and the end.

    Args:
      hooks: logging, evaluation, saving.
      schedule: intervals.
      learning_rate: schedule value at a step count, for the log.
      state: state after ``start`` steps.
      start: steps completed before.
      params: frozen base weights, for the message about a diverged run.
      begun: the log record of the steps up to ``start`` whose log step is still due, if any.

    Attributes:
      schedule: intervals.
      result: the outcome so far.
    """

    def __init__(
        self,
        hooks: Hooks,
        schedule: Schedule,
        learning_rate: Callable[[int], Any],
        state: TrainState,
        start: int,
        params: Any,
        begun: Mapping[str, Any] | None = None,
    ) -> None:
        self.result = FitResult(state, start)
        self.schedule = schedule
        self._hooks = hooks
        self._rate = learning_rate
        self._params = params
        self._meter = _Meter(begun or {})

    def after(
        self, step: int, metrics: Mapping[str, Any], state: Callable[[], TrainState]
    ) -> bool:
        """Acts after ``step``; returns False if the run ends.

        Args:
          step: number of the step.
          metrics: of the step, on the devices.
          state: returns the state after it.

        Raises:
          TrainingDivergedError: see `run_steps`.
        """
        hooks = self._hooks
        schedule = self.schedule
        result = self.result
        hooks.advance(step)
        self._meter.add(step, metrics)
        last = step == schedule.steps
        result.interrupted = hooks.asked_to_stop(step) and not last
        to_log = schedule.logs(step)  # in an uninterrupted run, too
        evaluates = schedule.evaluates(step) and not result.interrupted
        saves = schedule.saves(step) or result.interrupted
        # Every step that is evaluated or saved is logged, so that the metrics are fetched and a
        # diverged state is found first.
        if to_log or result.interrupted:
            result.state = state()
            result.step = step
            with _naming_bad_weights(self._params):
                record = self._meter.record(
                    # The schedule counts steps from 0.
                    float(self._rate(step - 1)),
                    complete=to_log,
                )
                hooks.log(step, record, result.state)
                if saves:
                    _refuse_diverged(step, result.state)
        measured = None
        if evaluates:
            measured = hooks.evaluate(step, result.state)
            result.metrics.append((step, measured.score))
        if saves:
            hooks.save(step, result.state, measured)
            self._meter.restart_clock()
        if (
            evaluates
            and not last
            and _exhausted([m for _, m in result.metrics], schedule.patience)
        ):
            result.stopped_early = True
        return not (last or result.interrupted or result.stopped_early)


@contextmanager
def _naming_bad_weights(params: Any) -> Iterator[None]:
    """Names a non-finite array of the frozen weights in the error of a diverged run, if there is
    one."""
    try:
        yield
    except TrainingDivergedError as error:
        bad = non_finite(params)
        if not bad:
            raise
        fault = f"NaN or infinity in {len(bad)} of its arrays"
        remedy = (
            "the model's files are damaged, or were converted wrongly: replace them"
        )
        row = first_bad_row(trees.flatten(params)[bad[0]])
        where = f"the base model: {bad[0]}[{row}]"
        raise TrainingDivergedError(
            where, expected="finite numbers", found=fault, remedy=remedy
        ) from error


def _refuse_diverged(step: int, state: TrainState) -> None:
    """Raises an error if the state is not finite; a step's loss is of the state before it."""
    bad = non_finite(state)
    if bad:
        raise TrainingDivergedError(
            f"step {step}: {bad[0]}",
            expected="finite numbers",
            found=f"NaN or infinity in {len(bad)} arrays",
            remedy=_ANEW,
        )


def _exhausted(metrics: list[float], patience: int) -> bool:
    """Returns True if the last ``patience`` evaluations did not improve the best metric.

    ``metrics`` are higher for better states. With ``patience`` 0 it returns False.
    """
    return (
        patience > 0
        and len(metrics) > patience
        and max(metrics[-patience:]) <= max(metrics[:-patience])
    )


class _Meter:
    """Device metrics of the steps since the last record, fetched together for the next one.

    Args:
      begun: an incomplete record, whose steps count for the next one.
    """

    def __init__(self, begun: Mapping[str, Any]) -> None:
        self._begun = begun
        self._steps: list[tuple[int, Mapping[str, Any]]] = []
        self._compiled = False
        self.restart_clock()

    def restart_clock(self) -> None:
        """Excludes the time since the last record (evaluation, saving) from tokens/s."""
        self._since = time.perf_counter()
        self._timed = 0

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds the metrics of a step, which stay on the devices until `record`."""
        if not self._compiled:
            # The first call may compile, which would dominate the time of the steps.
            jax.block_until_ready(metrics["loss"])
            self._compiled = True
            self.restart_clock()
        else:
            self._timed += 1
        self._steps.append((step, metrics))

    def record(self, learning_rate: float, *, complete: bool = True) -> dict[str, Any]:
        """Returns means over the steps since the last record, and layers of the last step.

        A record that is not complete has ``target_tokens``, the weight of its means.
        """
        names = ("loss", "tokens", "target_tokens", "grad_norm")
        # Numbers of the steps, as device arrays; fetched at once below.
        numbers = []
        for _, metrics in self._steps:
            named = {name: metrics[name] for name in names}
            numbers.append(named | dict(metrics.get("measured", {})))
        last_step, last_metrics = self._steps[-1]
        fetched, layers, idle = jax.device_get(
            (numbers, last_metrics["layers"], last_metrics.get("idle", {}))
        )
        seconds = time.perf_counter() - self._since
        rows: list[dict[str, float]] = []
        for values in fetched:
            rows.append({name: float(value) for name, value in values.items()})
        for (step, _), row in zip(self._steps, rows, strict=True):
            if not math.isfinite(row["loss"]):
                raise TrainingDivergedError(
                    f"step {step}: loss",
                    expected="a finite number",
                    found=row["loss"],
                    remedy=_ANEW,
                )
        _require_acting(last_step, idle)
        # The steps since the clock was restarted.
        timed = rows[len(rows) - self._timed :]
        spent = seconds
        if self._begun:  # its means have the weight of all its steps
            begun = {
                name: _number(self._begun.get(name)) for name in (*rows[0], "seconds")
            }
            # Counts in the time, but not in tokens/s, as it ran in another process.
            spent += begun.pop("seconds")
            rows.insert(0, begun)
        targets = sum(row["target_tokens"] for row in rows)
        # The loss of a step is a mean over its loss tokens.
        loss = sum(row["loss"] * row["target_tokens"] for row in rows)
        tokens_per_second = None
        if timed:
            tokens_per_second = sum(row["tokens"] for row in timed) / seconds
        record = {
            "loss": loss / max(targets, 1.0),
            "learning_rate": learning_rate,
            "grad_norm": rows[-1]["grad_norm"],
            "tokens": sum(row["tokens"] for row in rows),
            "tokens_per_second": tokens_per_second,
            "seconds": spent,
        }
        # Metrics of the objective, e.g. rewards: means weighted by loss tokens.
        for name in sorted({*rows[0]} - {*names}):
            # NaN: not measured in this step
            known = [row for row in rows if not math.isnan(row[name])]
            weight = sum(row["target_tokens"] for row in known)
            record[name] = math.nan
            if known:
                total = sum(row[name] * row["target_tokens"] for row in known)
                record[name] = total / max(weight, 1.0)
        record |= summarise_layers(layers)
        if not complete:
            record["target_tokens"] = targets
        self._steps = []
        self._begun = {}
        self.restart_clock()
        return record


def _number(value: float | None) -> float:
    """Returns a value of the log, where null is written for NaN."""
    return math.nan if value is None else float(value)


def _require_acting(step: int, idle: Mapping[str, Any]) -> None:
    """Raises an error if a mechanism is on but no statistics of its gates have been measured."""
    silent = sorted(label for label, inactive in idle.items() if inactive)
    if silent:
        raise NaloraError(
            f"step {step}: {', '.join(silent)}",
            expected="statistics of the gates ten steps after the warm-up, so that the "
            "mechanism acts",
            found="no token measured",
            remedy="check the content of the batches and --compute.stats-stride, or switch the "
            "mechanism off",
        )


def summarise_layers(blocks: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Returns whole-model means and the per-layer rows of the gated blocks; {} without blocks.

    Rows of several towers are concatenated, and ``towers`` gives the number of rows of each.

    Args:
      blocks: by path, metrics of `nalora_jax.assembly.mechanisms.layer_means`, ``[layers]`` or
        ``[layers, parts]``.

    Returns:
      ``misalignment`` and ``misalignment_limit``, None if no gate was measured, and ``layers``.
    """
    if not blocks:
        return {}
    layers = {}
    for name in next(iter(blocks.values())):
        of_blocks = [np.asarray(block[name]) for block in blocks.values()]
        layers[name] = np.concatenate(of_blocks)
    rows = {
        path.partition("/")[0]: len(block["feature"]) for path, block in blocks.items()
    }
    feature = np.nan_to_num(np.asarray(layers["feature"], np.float64))
    total = np.sum(feature)

    def overall(name: str) -> float | None:
        """Returns the mean of a metric over layers, weighted by their ``feature`` metric."""
        if not total > 0:
            return None
        return float(np.sum(feature / total * np.nan_to_num(layers[name])))

    summary: dict[str, Any] = {
        "misalignment": overall("misalignment"),
        "misalignment_limit": overall("limit"),
        "layers": layers,
    }
    if len(rows) > 1:
        summary["towers"] = rows
    return summary
