"""The stages of a run after its preparation: start or resumption, training, evaluation, export."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from nalora_jax.common import trees
from nalora_jax.common.digests import seal
from nalora_jax.common.files import write_atomically
from nalora_jax.common.redaction import redacted
from nalora_jax.config import RunConfig
from nalora_jax.config.preference import UNCHANGED
from nalora_jax.data.pipeline import stream_text
from nalora_jax.errors import Interrupted, NaloraError, bounded_text
from nalora_jax.evaluate.evaluator import describe
from nalora_jax.evaluate.run_log import read_evaluation
from nalora_jax.evaluate.statistics import compare
from nalora_jax.layout import distributed
from nalora_jax.method.step import TrainState
from nalora_jax.train.adapted import ADAPTER
from nalora_jax.train.callbacks import Callback, Callbacks, Ended, Started
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.train.export import card
from nalora_jax.train.hooks import RunHooks, say_counts
from nalora_jax.train.log import MetricsLog
from nalora_jax.train.loop import FitResult, Follower, Schedule, fit
from nalora_jax.train.machine import describe_device, versions
from nalora_jax.train.mechanisms import first_step, log_first_step
from nalora_jax.train.optimizers import make_schedule
from nalora_jax.train.output import Output
from nalora_jax.train.pieces import Pieces
from nalora_jax.train.preemption import StopSignals
from nalora_jax.train.profile import Profile
from nalora_jax.train.progress import Progress, Stages
from nalora_jax.weights.card import write_card

log = logging.getLogger(__name__)

BEFORE = "before.json"  # in a run's folder: metrics of the base model and digests of the questions


@dataclass(frozen=True)
class RunResult:
    """The outputs of a run."""

    folder: Path
    adapter: Path  # PEFT files of the best checkpoint
    report: Path
    before: Mapping[str, Any]  # held-out metrics of the base model
    after: Mapping[str, Any]  # held-out metrics of the exported adapter
    best_step: int


class BaseMetrics(NamedTuple):
    """Held-out metrics of the base model."""

    reported: Mapping[str, Any]  # on the questions that results are reported on
    selecting: Mapping[str, Any]  # on those that select the checkpoint


class Running:
    """A run between its preparation and its end.

    Args:
      config: its settings; automatic fields of the layout may be open.
      output: its locked folder.
      recorded: the last recorded settings of a resumed run.
      pieces: its parts.
      callbacks: its callbacks.
      stop: stop requests.
      stack: closes what the run opens.
      console: of its messages; the terminal, with a progress bar, by default.
    """

    def __init__(
        self,
        config: RunConfig,
        output: Output,
        recorded: Mapping[str, Any],
        pieces: Pieces,
        callbacks: Sequence[Callback],
        stop: StopSignals,
        stack: ExitStack,
        console: Console | None = None,
    ) -> None:
        self.config, self.output, self.pieces = config, output, pieces
        assembly, self.batches = pieces.assembly, pieces.data.batches()
        log.info(
            "%s trained parameters on %s", f"{trees.count(assembly.state.lora):,}", assembly.spec.describe()
        )
        log.info("training data: %s", stream_text(pieces.data.describe()))
        log_first_step(assembly.mechanisms, config.steps)
        self._checkpointer = stack.enter_context(
            Checkpointer(
                output.checkpoints,
                fingerprint=pieces.loaded.fingerprint,
                config=redacted(config.to_dict()),
                keep=config.train.keep,
                best_metric=pieces.evaluator.metric,
                best_mode=pieces.evaluator.mode,
            )
        )
        self.state, self.start = self._start(recorded)
        self.before = _known_before(output, pieces.questions)
        self._callbacks, progress, self._begun = _listeners(
            config, output.folder, self.start, callbacks, console
        )
        self.hooks = RunHooks(
            self._callbacks,
            progress,
            pieces.selector,
            assembly.params,
            self._checkpointer,
            self.batches,
            stop,
            assembly.state_metrics,
            ranked_from=config.adalora.settled_at(config.steps),
        )
        stack.enter_context(self._callbacks)
        stack.enter_context(progress)
        self._callbacks.start(self._started())

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Notifies the callbacks of an error that ends the run."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:  # trackers mark every failed run
            self._callbacks.end(Ended(message=redacted(bounded_text(error)) or "interrupted"))
            raise

    def measure_before(self, measured: BaseMetrics | None = None) -> BaseMetrics | None:
        """Evaluates the base, unless an interrupted run did; returns the metrics for other runs.

        Args:
          measured: the metrics, if a run with the same questions measured them.
        """
        if self.before:
            return measured
        if measured is None:
            base = self._base()
            reported = self.pieces.evaluator.measure(*base, samples=True)
            measured = BaseMetrics(reported, self.pieces.selector.measure(*base))
        self.before = dict(measured.reported)
        text = json.dumps(seal(self.before | {"questions": self.pieces.questions}))
        distributed.on_first_process(lambda: write_atomically(self.output.folder / BEFORE, text))
        self.hooks.told.evaluation(0, self.before, "initial")
        self.hooks.progress.say(f"before: {describe(self.before)}")
        choosing = self.hooks.selected(0, measured.selecting)
        say_counts(int(self.before.get("n", 0)), choosing.n, chosen=self.config.train.eval_every > 0)
        return measured

    def fit(self, profile: Profile) -> FitResult:
        """Runs the training steps.

        Raises:
          Interrupted: a signal requested a stop; the last step is saved.
        """
        assembly, hooks = self.pieces.assembly, self.hooks
        params = assembly.view(assembly.params)
        hooks.state_metrics.compile_ahead(self.state)
        batches = distributed.global_batches(hooks.batches, assembly.mesh)
        with hooks.stop.between_steps(), profile:
            result = fit(
                assembly.step,
                params,
                self.state,
                batches,
                hooks,
                *self._schedules(),
                start=self.start,
                begun=self._begun,
                profile=profile,
            )
        if result.interrupted:
            raise self.stopped(result)
        return result

    def follower(self) -> Follower:
        """Returns the actions after each step, for a loop over several runs."""
        schedule, rate = self._schedules()
        params = self.pieces.assembly.params
        return Follower(self.hooks, schedule, rate, self.state, self.start, params, self._begun)

    def restore_best(self, result: FitResult) -> None:
        """Sets the state to the one with the best evaluation; to the last one without evaluations."""
        self._checkpointer.wait()
        self.state = result.state
        step = self._checkpointer.best_step()
        if step is not None and step != result.step:
            self.state, _ = self._checkpointer.restore("best", self.pieces.assembly.state)
            log.info("the best evaluation was at step %d: exporting that one", int(self.state.step))

    def finish(self, step: int, spent: Stages) -> RunResult:
        """Evaluates and exports the state after the last ``step``."""
        assert self.before is not None
        after = _measure_after(self.state, self.before, self.pieces.evaluator, self.hooks)
        first = first_step(self.pieces.assembly.mechanisms)
        if after["step"] < first:
            log.warning(
                "the exported adapter of step %d is that of plain LoRA: mechanisms act from step %d",
                *(after["step"], first),
            )
        spent.end("evaluating the result")
        adapter = self.pieces.export(self.output.folder / ADAPTER, self.state)
        readme = card(
            self.config, self.pieces.loaded, self.pieces.assembly, self.state.lora, self.before, after
        )
        distributed.on_first_process(lambda: write_card(adapter, readme))
        spent.end("exporting")
        self._callbacks.end(Ended(step, after["step"], seconds=spent.seconds))
        return RunResult(
            self.output.folder, adapter, _report(self.output), self.before, after, after["step"]
        )

    def fail(self, error: Exception) -> None:
        """Records the error that ended the run."""
        self._callbacks.end(Ended(message=redacted(str(error))))

    def stopped(self, result: FitResult) -> Interrupted:
        """Returns the error of a run that a signal stopped, once its state is saved."""
        self._checkpointer.wait()
        return Interrupted(self.hooks.stop.signal, result.step, way_on(self.config))

    def _start(self, recorded: Mapping[str, Any]) -> tuple[TrainState, int]:
        """Returns the state to train from and its step; moves the batches to the same position."""
        config, assembly = self.config, self.pieces.assembly
        if not self.output.resumes:
            return assembly.state, 0
        state, position = self._checkpointer.restore("latest", assembly.state)
        self.batches.set_state(position)
        start = int(state.step)
        log.info(
            "resumed from step %d%s",
            start,
            ", the last one: no step is left" if start == config.steps else "",
        )
        steps = recorded.get("steps", config.steps)
        if steps != config.steps:
            was, now = (
                float(make_schedule(config.optimizer, total)(start)) for total in (steps, config.steps)
            )
            log.warning(
                "--steps %d instead of %d: the learning-rate schedule spans the steps, so it goes on at %.2e where it "
                "was at %.2e; the result is not that of an uninterrupted run",
                *(config.steps, steps, now, was),
            )
        return state, start

    def _started(self) -> Started:
        """Returns the facts about the run that callbacks get before its first step."""
        pieces, origin = self.pieces, self.pieces.loaded.origin
        more: dict[str, Any] = {"data": dict(pieces.data.describe())}
        if pieces.in_turns is not None:
            more["data"]["in_turns"] = pieces.in_turns
        if origin:
            more["base"] = origin.to_dict()
        if pieces.assembly.mechanisms.entries:
            more["mechanisms_from"] = first_step(pieces.assembly.mechanisms)
        settings = redacted(self.config.to_dict())
        return Started(self.output.folder, settings, self.start, versions(), describe_device(), more)

    def _base(self) -> tuple[Any, Any]:
        """Returns weights and adapters that compute the base model.

        Adapters that start at zero are included, so that base and result are measured with the same programs.
        Rewards of the base are exactly 0 only without adapters, by the program of the reference.
        """
        if self.config.lora.init in UNCHANGED and self.config.preference.loss == "none":
            return self.pieces.assembly.params, self.pieces.assembly.state.lora
        return self.pieces.loaded.params, None

    def _schedules(self) -> tuple[Schedule, Callable[[int], Any]]:
        """Returns the intervals of the loop's actions, and the learning rate by step."""
        config, train = self.config, self.config.train
        return (
            Schedule(config.steps, train.log_every, train.eval_every, train.save_every, train.patience),
            make_schedule(config.optimizer, config.steps),
        )


def _report(output: Output) -> Path:
    """Writes the report; returns its path."""
    from nalora_jax.report.html import FILE, write_report  # not earlier: Matplotlib takes memory

    distributed.on_first_process(lambda: log.info("report: %s", write_report(output.folder)))
    return output.folder / FILE


def _known_before(output: Output, questions: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the base model's held-out metrics of a resumed run; None if not yet measured.

    Raises:
      NaloraError: they are of other questions than the evaluation data now has.
    """
    saved = output.folder / BEFORE
    if not (output.resumes and saved.exists()):
        return None
    evaluation = read_evaluation(saved)
    asked = evaluation.pop("questions", questions)
    if asked != questions:
        raise NaloraError(
            "--data.eval-split",
            expected="the questions that the run measured its base model on",
            found="other ones: the evaluation data has changed since",
            remedy="restore that data, or start a new run in another --output",
        )
    return evaluation


def _listeners(
    config: RunConfig, folder: Path, start: int, callbacks: Sequence[Callback], console: Console | None
) -> tuple[Callbacks, Progress, Mapping[str, Any]]:
    """Returns the callbacks, the progress display and `MetricsLog.begun`.

    Processes other than 0 show and log nothing.
    """
    if jax.process_index():
        return Callbacks(None), Progress(config.steps, console=Console(quiet=True)), {}
    metrics = MetricsLog(folder, resume=start or None, goes_on=start < config.steps)
    return (
        Callbacks(metrics, callbacks),
        Progress(config.steps, start=start, console=console),
        metrics.begun,
    )


def way_on(config: RunConfig) -> str:
    """Returns the options that resume a stopped run."""
    return f"continue with --output {config.output} --resume"


def _measure_after(
    best: TrainState, before: Mapping[str, Any], evaluator: Any, hooks: RunHooks
) -> dict[str, Any]:
    """Evaluates the best state on the reported examples, which were not used to select it."""
    after: dict[str, Any] = evaluator.measure(hooks.params, best.lora, samples=True)
    if "right" in after and len(before.get("right", ())) == len(after["right"]):
        after["paired"] = asdict(compare(before["right"], after["right"]))
    step = int(best.step)
    hooks.told.evaluation(step, after, "final")
    hooks.progress.say(f"after (step {step}): {describe(after)}")
    return after | {"step": step}
