"""The stages of a run after its preparation: start or resumption, training, evaluation, export."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from nalora_jax import distributed, trees
from nalora_jax.config import RunConfig
from nalora_jax.config.preference import UNCHANGED
from nalora_jax.data.pipeline import BatchIterator, stream_text
from nalora_jax.errors import Interrupted, NaloraError
from nalora_jax.evaluate.heldout import describe
from nalora_jax.evaluate.statistics import compare
from nalora_jax.files import write_atomically
from nalora_jax.loading.adapted import ADAPTER
from nalora_jax.method.step import TrainState
from nalora_jax.redaction import redacted
from nalora_jax.report.history import read_evaluation
from nalora_jax.runs.checkpoint import Checkpointer
from nalora_jax.runs.export import card
from nalora_jax.runs.hooks import RunHooks, say_counts
from nalora_jax.runs.metrics import MetricsLog
from nalora_jax.runs.output import Output
from nalora_jax.runs.pieces import Pieces
from nalora_jax.runs.preemption import StopSignals
from nalora_jax.seals import seal
from nalora_jax.train.assembly import Assembly
from nalora_jax.train.callbacks import Callback, Callbacks, Ended, Started
from nalora_jax.train.loop import FitResult, Follower, Schedule, fit
from nalora_jax.train.machine import describe_device, versions
from nalora_jax.train.optimizers import make_schedule
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
        self._checkpointer = stack.enter_context(_checkpointer(config, output, pieces))
        self.state, self.start = _start(
            config, output, recorded, assembly, self.batches, self._checkpointer
        )
        self.before = _known_before(output, pieces.questions)
        self._callbacks, progress = _listeners(config, output.folder, self.start, callbacks, console)
        self.hooks = _hooks(
            config, pieces, self._callbacks, progress, self._checkpointer, self.batches, stop
        )
        stack.enter_context(self._callbacks)
        stack.enter_context(progress)
        self._callbacks.start(_started(config, output, self.start, pieces))

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Notifies the callbacks of an error that ends the run."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:  # trackers mark every failed run
            self._callbacks.end(Ended(message=str(error) or "interrupted"))
            raise

    def measure_before(self, measured: BaseMetrics | None = None) -> BaseMetrics | None:
        """Evaluates the base, unless an interrupted run did; returns the metrics for other runs.

        Args:
          measured: the metrics, if a run with the same questions measured them.
        """
        if self.before:
            return measured
        if measured is None:
            base = _base(self.config, self.pieces)
            reported = self.pieces.evaluator.measure(*base, samples=True)
            measured = BaseMetrics(reported, self.pieces.selector.measure(*base))
        self.before = dict(measured.reported)
        chosen = self.config.train.eval_every > 0
        _record_before(self.output.folder, self.hooks, self.pieces, measured, chosen=chosen)
        return measured

    def fit(self, profile: Profile) -> FitResult:
        """Runs the training steps."""
        return _fit(self.config, self.pieces.assembly, self.state, self.start, self.hooks, profile)

    def follower(self) -> Follower:
        """Returns the actions after each step, for a loop over several runs."""
        schedule, rate = _intervals(self.config), make_schedule(self.config.optimizer, self.config.steps)
        return Follower(self.hooks, schedule, rate, self.state, self.start, self.pieces.assembly.params)

    def restore_best(self, result: FitResult) -> None:
        """Sets the state to the one with the best evaluation."""
        self.state = _best(result, self._checkpointer, self.pieces.assembly)

    def finish(self, step: int, spent: Stages) -> RunResult:
        """Evaluates and exports the state after the last ``step``."""
        assert self.before is not None
        after = _measure_after(self.state, self.before, self.pieces.evaluator, self.hooks)
        spent.end("evaluating the result")
        adapter = _export(self.config, self.output, self.pieces, self.state, self.before, after)
        spent.end("exporting")
        self._callbacks.end(Ended(step, after["step"], seconds=spent.seconds))
        return RunResult(
            self.output.folder, adapter, _report(self.output), self.before, after, after["step"]
        )

    def fail(self, error: Exception) -> None:
        """Records the error that ended the run."""
        self._callbacks.end(Ended(message=str(error)))

    def stopped(self, result: FitResult) -> Interrupted:
        """Returns the error of a run that a signal stopped, once its state is saved."""
        self._checkpointer.wait()
        return Interrupted(self.hooks.stop.signal, result.step, way_on(self.config))


def _checkpointer(config: RunConfig, output: Output, pieces: Pieces) -> Checkpointer:
    """Returns the run's checkpointer, which ranks by the metric of its evaluations."""
    return Checkpointer(
        output.checkpoints,
        fingerprint=pieces.loaded.fingerprint,
        config=redacted(config.to_dict()),
        keep=config.train.keep,
        best_metric=pieces.evaluator.metric,
        best_mode=pieces.evaluator.mode,
    )


def _started(config: RunConfig, output: Output, start: int, pieces: Pieces) -> Started:
    """Returns the facts about the run that callbacks get before its first step."""
    origin = pieces.loaded.origin
    more = {"data": dict(pieces.data.describe())}
    if pieces.in_turns is not None:
        more["data"]["in_turns"] = pieces.in_turns
    if origin:
        more["base"] = origin.to_dict()
    return Started(output.folder, redacted(config.to_dict()), start, versions(), describe_device(), more)


def _export(
    config: RunConfig,
    output: Output,
    pieces: Pieces,
    best: TrainState,
    before: dict[str, Any],
    after: dict[str, Any],
) -> Path:
    """Writes the adapter and its card; returns their folder."""
    adapter: Path = pieces.export(output.folder / ADAPTER, best)
    readme = card(config, pieces.loaded, pieces.assembly, best.lora, before, after)
    distributed.on_first_process(lambda: write_card(adapter, readme))
    return adapter


def _report(output: Output) -> Path:
    """Writes the report; returns its path."""
    from nalora_jax.report.html import FILE, write_report  # not earlier: Matplotlib takes memory

    distributed.on_first_process(lambda: log.info("report: %s", write_report(output.folder)))
    return output.folder / FILE


def _start(
    config: RunConfig,
    output: Output,
    recorded: Mapping[str, Any],
    assembly: Assembly,
    batches: BatchIterator,
    checkpointer: Checkpointer,
) -> tuple[TrainState, int]:
    """Returns the state to train from and its step; moves the batches to the same position."""
    if not output.resumes:
        return assembly.state, 0
    state, position = checkpointer.restore("latest", assembly.state)
    batches.set_state(position)
    start = int(state.step)
    log.info(
        "resumed from step %d%s", start, ", the last one: no step is left" if start == config.steps else ""
    )
    steps = recorded.get("steps", config.steps)
    if steps != config.steps:
        was, now = (float(make_schedule(config.optimizer, total)(start)) for total in (steps, config.steps))
        log.warning(
            "--steps %d instead of %d: the learning-rate schedule spans the steps, so it goes on at %.2e where it was "
            "at %.2e; the result is not that of an uninterrupted run",
            *(config.steps, steps, now, was),
        )
    return state, start


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
) -> tuple[Callbacks, Progress]:
    """Returns the callbacks and the progress display; both are silent in processes other than 0."""
    if jax.process_index():
        return Callbacks(None), Progress(config.steps, console=Console(quiet=True))
    listeners = Callbacks(MetricsLog(folder, resume=start or None), callbacks)
    return listeners, Progress(config.steps, start=start, console=console)


def _hooks(
    config: RunConfig,
    pieces: Pieces,
    listeners: Callbacks,
    progress: Progress,
    checkpointer: Checkpointer,
    batches: BatchIterator,
    stop: StopSignals,
) -> RunHooks:
    """Returns the loop's hooks."""
    return RunHooks(
        listeners,
        progress,
        pieces.selector,
        pieces.assembly.params,
        checkpointer,
        batches,
        stop,
        pieces.assembly.state_metrics,
        ranked_from=config.adalora.settled_at(config.steps),
    )


def _base(config: RunConfig, pieces: Pieces) -> tuple[Any, Any]:
    """Returns weights and adapters that compute the base model.

    Adapters that start at zero are included, so that base and result are measured with the same programs.
    Rewards of the base are exactly 0 only without adapters, by the program of the reference.
    """
    if config.lora.init in UNCHANGED and config.preference.loss == "none":
        return pieces.assembly.params, pieces.assembly.state.lora
    return pieces.loaded.params, None


def _record_before(
    folder: Path, hooks: RunHooks, pieces: Pieces, measured: BaseMetrics, *, chosen: bool
) -> None:
    """Writes and logs the metrics of the base."""
    before = dict(measured.reported)
    text = json.dumps(seal(before | {"questions": pieces.questions}))
    distributed.on_first_process(lambda: write_atomically(folder / BEFORE, text))
    hooks.told.evaluation(0, before, "initial")
    hooks.progress.say(f"before: {describe(before)}")
    choosing = hooks.selected(0, measured.selecting)
    say_counts(int(before.get("n", 0)), choosing.n, chosen=chosen)


def _fit(
    config: RunConfig, assembly: Assembly, state: TrainState, start: int, hooks: RunHooks, profile: Profile
) -> FitResult:
    """Runs the training steps.

    Raises:
      Interrupted: a signal requested a stop; the last step is saved.
    """
    schedule = _intervals(config)
    rate = make_schedule(config.optimizer, config.steps)
    params = assembly.view(assembly.params)
    hooks.state_metrics.compile_ahead(state)
    batches = _on_mesh(hooks.batches, assembly.mesh)
    with hooks.stop.between_steps(), profile:
        result = fit(
            assembly.step, params, state, batches, hooks, schedule, rate, start=start, profile=profile
        )
    if result.interrupted:
        hooks.checkpointer.wait()
        raise Interrupted(hooks.stop.signal, result.step, way_on(config))
    return result


def _intervals(config: RunConfig) -> Schedule:
    """Returns the intervals of the loop's actions."""
    train = config.train
    return Schedule(config.steps, train.log_every, train.eval_every, train.save_every, train.patience)


def way_on(config: RunConfig) -> str:
    """Returns the options that resume a stopped run."""
    return f"continue with --output {config.output} --resume"


def _best(result: FitResult, checkpointer: Checkpointer, assembly: Assembly) -> TrainState:
    """Returns the state with the best evaluation; the last one without evaluations."""
    checkpointer.wait()
    step = checkpointer.best_step()
    if step is None or step == result.step:
        return result.state
    state: TrainState
    state, _ = checkpointer.restore("best", assembly.state)
    log.info("the best evaluation was at step %d: exporting that one", int(state.step))
    return state


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


def _on_mesh(batches: BatchIterator, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    for batch in batches:
        yield distributed.make_global_batch(batch, mesh, rows_axis=1)
