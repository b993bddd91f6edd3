"""Hooks of the training loop: logging, evaluation, saving and stop requests."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nalora_jax.data.items import FEW
from nalora_jax.data.pipeline import BatchIterator
from nalora_jax.evaluate.evaluator import describe
from nalora_jax.method.step import TrainState
from nalora_jax.train.callbacks import Callbacks
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.train.loop import LoopEvaluation
from nalora_jax.train.machine import peak_memory
from nalora_jax.train.preemption import StopSignals
from nalora_jax.train.progress import Progress
from nalora_jax.train.state_metrics import StateMetrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunHooks:
    """The loop's `Hooks` of a run: logging, evaluation, saving and stop requests."""

    told: Callbacks
    progress: Progress
    selector: Any
    params: Any
    checkpointer: Checkpointer
    batches: BatchIterator
    stop: StopSignals
    state_metrics: StateMetrics
    ranked_from: int = 0  # first step that can be selected as the best
    waits_for_writes: bool = False  # a checkpoint is written before the next step, not during it

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        self.progress.advance(step)

    def log(self, step: int, record: Mapping[str, Any], state: TrainState) -> None:
        """Writes and shows a log step, with metrics of the state and peak memory."""
        self.told.log(step, {**record, **self.state_metrics.measure(state), **peak_memory()})
        self.progress.log(step, record)

    def evaluate(self, step: int, state: TrainState) -> LoopEvaluation:
        """Evaluates the adapter on the held-out examples that select the checkpoint."""
        return self.select(step, self.params, state.lora)

    def save(self, step: int, state: TrainState, measured: LoopEvaluation | None) -> None:
        """Starts writing a checkpoint, and waits for it if other runs write theirs."""
        metrics = None
        if measured is not None and step >= self.ranked_from:
            metrics = measured.metrics
        self.checkpointer.save(step, state, self.batches.get_state(), metrics)
        if self.waits_for_writes:
            self.checkpointer.wait()
        self.told.save(step, self.checkpointer.folder / str(step))

    def asked_to_stop(self, step: int) -> bool:
        """Returns True if a stop signal arrived."""
        return self.stop.asked(step)

    def select(self, step: int, params: Any, lora: Any | None) -> LoopEvaluation:
        """Evaluates an adapter, logs the result and returns the metric that ranks checkpoints."""
        return self.selected(step, self.selector.measure(params, lora))

    def selected(self, step: int, values: Mapping[str, Any]) -> LoopEvaluation:
        """Logs the metrics of an adapter that may be selected, and returns the one that ranks it."""
        self.told.evaluation(step, values)
        self.progress.say(f"step {step}: {describe(values)}")
        score = value = float(values[self.selector.metric])
        if self.selector.mode == "min":
            score = -value
        return LoopEvaluation(score, {self.selector.metric: value}, int(values.get("n", 0)))


def say_counts(reported: int, choosing: int, *, chosen: bool) -> None:
    """Logs the numbers of held-out examples, and warns if too few select the checkpoint.

    Args:
      reported: examples that results are reported on.
      choosing: separate examples that select the checkpoint.
      chosen: True if a checkpoint is selected, that is if there are evaluations during training.
    """
    by = ""
    if chosen:
        by = f", the choice of the checkpoint on {choosing} others"
    log.info("results rest on %d held-out examples%s", reported, by)
    if chosen and choosing < FEW:
        log.warning(
            "only %d examples choose the checkpoint, so that the choice is mostly chance: hold "
            "out more (--data.eval-split), or take the last step's with --train.eval-every 0",
            choosing,
        )
