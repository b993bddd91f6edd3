"""The session of a run: its locked folder, its log, and the actions between its steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
from rich.console import Console

from nalora_jax.assembly.mechanisms import first_step
from nalora_jax.assembly.optimizers import make_schedule
from nalora_jax.assembly.schedule import Schedule
from nalora_jax.common.redaction import redact
from nalora_jax.config import RunConfig
from nalora_jax.data.items import FEW
from nalora_jax.data.pipeline import BatchIterator
from nalora_jax.errors import Interrupted, NaloraError, bounded_text
from nalora_jax.evaluate.evaluator import describe
from nalora_jax.evaluate.run_log import ROLLOUTS, recorded_settings, to_json
from nalora_jax.kinds.record import Job, run_kind
from nalora_jax.mesh.machine import describe_device, peak_memory, versions
from nalora_jax.method.step import TrainState
from nalora_jax.train.callbacks import Callback, Callbacks, Ended, Started, read_samples
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.train.log import MetricsLog
from nalora_jax.train.loop import FitResult, Follower, LoopEvaluation
from nalora_jax.train.output import Output, has_checkpoint, last_step, open_output
from nalora_jax.train.preemption import StopSignals
from nalora_jax.train.progress import Progress
from nalora_jax.train.snapshot import check_settings

log = logging.getLogger(__name__)


class Session:
    """A run's locked folder, before its model is known.

    Args:
      output: its locked folder.
      stop: stop requests.
      callbacks: what surrounds the run, besides its log.
      console: of its messages; the terminal, with a progress bar, by default.
      label: precedes its log messages if other runs train with it, as ``"seed-1: "``.

    Attributes:
      closing: closes what the run opens: checkpoints, callbacks, progress bar.
      recorded: last recorded settings of a resumed run; {} otherwise.
      runs_in_program: number of runs that the compiled step trains; above 1 in a sweep.
    """

    def __init__(
        self,
        output: Output,
        stop: StopSignals,
        callbacks: Sequence[Callback],
        console: Console | None = None,
        label: str = "",
    ) -> None:
        self.output = output
        self.stop = stop
        self.callbacks = callbacks
        self.runs_in_program = 1
        self.console = console
        self.label = label
        self.closing = ExitStack()
        self.recorded: Mapping[str, Any] = {}
        if output.resumes:
            self.recorded = recorded_settings(output.folder)

    def check_continues(self, config: RunConfig) -> None:
        """Checks that a resumed run has its recorded settings, before a model is loaded.

        The checkpoints are checked again later, because they record settings in full precision.

        Raises:
          NaloraError: the run has done more steps than ``config`` has, or a setting must not
            change.
        """
        if not self.output.resumes:
            return
        done = last_step(self.output.checkpoints)
        if done is not None and done > config.steps:
            remedy = (
                "leave --steps out to resume with the number of the run, or start a new run in "
                "another --output"
            )
            expected = f"{done} or more, which the run in {self.output.folder} has done"
            raise NaloraError(
                "--steps", expected=expected, found=config.steps, remedy=remedy
            )
        if self.recorded:
            where = f"--resume {self.output.folder}"
            check_settings(where, self.recorded, to_json(redact(config.to_dict())))


@contextmanager
def open_session(
    config: RunConfig,
    stop: StopSignals,
    callbacks: Sequence[Callback],
    console: Console | None = None,
    label: str = "",
) -> Iterator[Session]:
    """Locks the folder of a run, and closes what its stages open.

    Args:
      config: the run's settings, with the folder.
      stop, callbacks, console, label: see `Session`.

    Raises:
      NaloraError: see `nalora_jax.train.output.open_output`.
      Interrupted: a stop outside of training, with the way to resume if there are checkpoints.
    """
    with open_output(config.output, config.resume) as output:
        session = Session(output, stop, callbacks, console, label)
        try:
            with session.closing:
                yield session
        except Interrupted as stopped:
            if (
                stopped.saved is None
                and not stopped.resume
                and has_checkpoint(output.checkpoints)
            ):
                # The stop came before or after the steps, so nothing was saved for it.
                raise Interrupted(stopped.signal, resume=way_on(config)) from None
            raise


def open_checkpoints(job: Job, session: Session) -> Checkpointer:
    """Opens the checkpoints of a job, which the session closes."""
    config = job.config
    return session.closing.enter_context(
        Checkpointer(
            session.output.checkpoints,
            fingerprint=job.loaded.fingerprint,
            config=redact(config.to_dict()),
            keep=config.train.keep,
            best_metric=job.evaluator.metric,
            best_mode=job.evaluator.mode,
        )
    )


class Running:
    """A run that is ready for its next step: the `nalora_jax.train.loop.Hooks` of its loop.

    Processes other than 0 show and log nothing.

    Args:
      job: the run on its devices.
      session: its folder; closes what is opened here.
      checkpointer: of its folder.
      batches: its next batches.
      state: before its next step.
      before: held-out metrics of the base model, if they are known.

    Attributes:
      state_metrics: metrics of a state; a sweep computes those of all runs at once.
      waits_for_writes: True if a checkpoint is written before the next step, not during it.

    Raises:
      NaloraError: a callback cannot start.
    """

    def __init__(
        self,
        job: Job,
        session: Session,
        checkpointer: Checkpointer,
        batches: BatchIterator,
        state: TrainState,
        before: Mapping[str, Any] | None,
    ) -> None:
        config = job.config
        start = int(state.step)
        self.job = job
        self.output = session.output
        self.stop = session.stop
        self.label = session.label
        self.checkpointer = checkpointer
        self.batches = batches
        self.state = state
        self.before = before
        self.state_metrics = job.assembly.state_metrics
        self.waits_for_writes = False
        # byte of the file of samples up to which callbacks know it
        self._samples_end = 0
        # Numbers of the steps since the last log step, for the next record.
        self._begun: Mapping[str, Any] = {}
        if jax.process_index():
            self.callbacks = Callbacks()
            self.progress = Progress(config.steps, console=Console(quiet=True))
        else:
            goes_on = start < config.steps
            metrics = MetricsLog(
                self.output.folder, resume=start or None, goes_on=goes_on
            )
            self._begun = metrics.begun
            self.callbacks = Callbacks([metrics, *session.callbacks])
            self.progress = Progress(
                config.steps,
                start=start,
                console=session.console,
                hidden=hidden_numbers(config),
            )
        session.closing.enter_context(self.callbacks)
        session.closing.enter_context(self.progress)
        self.callbacks.start(_started(job, self.output, start, session.runs_in_program))

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Notifies the callbacks of an error that ends the run."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            self.fail(error)  # trackers mark every failed run
            raise

    def fail(self, error: BaseException) -> None:
        """Records the error that ended the run."""
        self.callbacks.tell(
            "on_end", Ended(message=redact(bounded_text(error)) or "interrupted")
        )

    def follow(self) -> Follower:
        """Returns the actions after each step, which continue from the state."""
        config = self.job.config
        params = self.job.assembly.params
        # One program, not one for each operation.
        rate = jax.jit(make_schedule(config.optimizer, config.steps))
        step = int(self.state.step)
        return Follower(
            self, Schedule.of(config), rate, self.state, step, params, self._begun
        )

    def interruption(self, result: FitResult) -> Interrupted:
        """Returns the error of a run that a signal stopped, once its state is saved."""
        self.checkpointer.wait()
        return Interrupted(self.stop.signal, result.step, way_on(self.job.config))

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        self.progress.advance(step)

    def log(self, step: int, record: Mapping[str, Any], state: TrainState) -> None:
        """Writes and shows a log step, with metrics of the state and peak memory.

        With rewards, it also passes the stored samples of the step's rollout to the callbacks.
        """
        self.callbacks.tell(
            "on_log",
            step,
            {**record, **self.state_metrics.measure(state), **peak_memory()},
        )
        self.progress.log(step, record)
        path = self.output.folder / ROLLOUTS
        if jax.process_index() == 0 and path.exists():
            groups, self._samples_end = read_samples(path, self._samples_end)
            # A rollout that serves several steps is stored under the first of them. At the first
            # log step of a resumed run the file also has the samples before.
            first = step - self.job.config.rl.updates + 1
            groups = [group for group in groups if group["step"] >= first]
            if groups:
                self.callbacks.tell("on_samples", step, groups)

    def evaluate(self, step: int, state: TrainState) -> LoopEvaluation:
        """Evaluates the adapter on the held-out examples that select the checkpoint."""
        return self.select(
            step, self.job.selector.measure(self.job.assembly.params, state.lora)
        )

    def select(self, step: int, values: Mapping[str, Any]) -> LoopEvaluation:
        """Logs the metrics of an adapter that may be selected, and returns the one that ranks it.

        ``score`` is higher for better adapters: a loss is negated.
        """
        selector = self.job.selector
        self.callbacks.tell("on_eval", step, values, "")
        self.progress.say(f"step {step}: {describe(values)}")
        # The loop takes higher scores for better ones.
        score = value = float(values[selector.metric])
        if selector.mode == "min":
            score = -value
        return LoopEvaluation(score, {selector.metric: value}, int(values.get("n", 0)))

    def save(
        self, step: int, state: TrainState, measured: LoopEvaluation | None
    ) -> None:
        """Starts writing a checkpoint, and waits for it if other runs write theirs.

        Checkpoints before AdaLoRA's ranks are settled are not ranked.
        """
        config = self.job.config
        metrics = None
        # Earlier states have ranks that are still taken, and must not be selected for export.
        if measured is not None and step >= config.adalora.find_final_step(
            config.steps
        ):
            metrics = measured.metrics
        # The log first, so that a restored checkpoint never is of a later step than the log.
        self.output.copy_log()
        self.checkpointer.save(step, state, self.batches.get_state(), metrics)
        if self.waits_for_writes:
            self.checkpointer.wait()
        self.callbacks.tell("on_save", step, self.checkpointer.folder / str(step))

    def asked_to_stop(self, step: int) -> bool:
        """Returns True if a stop signal arrived."""
        return self.stop.asked(step)


def way_on(config: RunConfig) -> str:
    """Returns the options that resume a stopped run."""
    return f"continue with --output {config.output} --resume"


def hidden_numbers(config: RunConfig) -> list[str]:
    """Returns the names of numbers that the line of a log step leaves out."""
    if run_kind(config).draws_samples(config) or not config.mechanisms:
        return ["misalignment"]
    return []


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


def _started(job: Job, output: Output, start: int, runs: int) -> Started:
    """Returns the facts about the run that callbacks get before its first step.

    ``start`` is the number of completed steps, ``runs`` the number of runs that the step trains.
    """
    more: dict[str, Any] = {"data": dict(job.data.describe())}
    if job.inputs.in_turns is not None:
        more["data"]["in_turns"] = job.inputs.in_turns
    if job.loaded.origin:
        more["base"] = job.loaded.origin.to_dict()
    if job.assembly.mechanisms.entries:
        more["mechanisms_from"] = first_step(job.assembly.mechanisms)
    if runs > 1:
        more["runs_in_program"] = runs
    settings = redact(job.config.to_dict())
    return Started(output.folder, settings, start, versions(), describe_device(), more)
