"""Stages of a fine-tuning run, in order of execution.

settings -> session -> inputs -> job -> restore -> evaluate the base -> fit -> finish
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from nalora_jax.assembly.compilation import use_compilation_cache
from nalora_jax.assembly.mechanisms import first_step, log_first_step
from nalora_jax.assembly.optimizers import make_schedule
from nalora_jax.common import trees
from nalora_jax.common.digests import seal
from nalora_jax.common.files import write_atomically
from nalora_jax.common.imports import import_files
from nalora_jax.common.terminal import outliving_terminal
from nalora_jax.config import RunConfig, check
from nalora_jax.config.settings import UNCHANGED
from nalora_jax.data.given import Data, Format, given_sources
from nalora_jax.data.pipeline import stream_text
from nalora_jax.data.source import Source
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.evaluator import Answering, describe
from nalora_jax.evaluate.run_log import ADAPTER, read_evaluation
from nalora_jax.evaluate.statistics import compare
from nalora_jax.kinds.job import Inputs, Job, Kind, Start
from nalora_jax.mesh import distributed, processes
from nalora_jax.mesh.distributed import platform_of
from nalora_jax.method.rules import make
from nalora_jax.method.step import TrainState
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.remat import check_remat
from nalora_jax.ops.dispatch import check_implementation
from nalora_jax.train import loop
from nalora_jax.train.callbacks import Callback, Ended, make_callbacks
from nalora_jax.train.output import Output
from nalora_jax.train.preemption import StopSignals, stop_signals
from nalora_jax.train.profile import Profile
from nalora_jax.train.progress import Stages
from nalora_jax.train.session import Session, open_session, say_counts

log = logging.getLogger(__name__)

REPORT = "report.html"  # in a run's folder, written by `write_report`
BEFORE = "before.json"  # in a run's folder: metrics of the base model and digests of the questions
# Builds a job in a layout of its choice, by a function of settings whose layout is concrete.
ChooseLayout = Callable[[RunConfig, ModelConfig, Callable[[RunConfig], Job]], Job]

# Writes the card of a run's adapter, given its folder, the exported state and the metrics before
# and after.
WriteCard = Callable[
    [Path, Job, TrainState, Mapping[str, Any], Mapping[str, Any]], None
]


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


def fine_tune(
    config: RunConfig,
    kind: Kind,
    start: Start,
    *,
    answering: Answering,
    choose_layout: ChooseLayout,
    write_card: WriteCard,
    write_report: Callable[[Path], Path],
    data: Data | None = None,
    format: Format | None = None,
    callbacks: Sequence[Callback] = (),
    source: Mapping[str, Source] | None = None,
) -> RunResult:
    """Fine-tunes a model. All processes of a multi-host run call it; the first one logs and writes.

    Args:
      config: the run's settings.
      kind: reads the data, builds the program and exports the adapter.
      start: makes the initial adapters.
      answering: completes held-out prompts for the report.
      choose_layout: chooses the mesh and the rematerialization policy of a decoder.
      write_card: writes the adapter's README.md.
      write_report: writes the report into a run's folder and returns its path.
      data, format, callbacks, source: see `nalora_jax.run`, which also lists the errors.
    """
    # Several runs in one program are trained by `--sweep` only.
    for flag, size in (
        ("run", config.mesh.run),
        ("runs-per-device", config.mesh.runs_per_device),
    ):
        if size > 1:
            raise NaloraError(
                f"--mesh.{flag}", expected="0 or 1 without --sweep", found=size
            )
    config, source = checked_settings(config, data, format, source)
    listeners = [*make_callbacks(config.callbacks), *callbacks]
    with (
        attended() as stop,
        open_session(config, stop, listeners) as session,
        session.naming_checkpoints(config),
        session.closing,
    ):
        spent = Stages()
        inputs = read_inputs(config, kind, start, answering, session, source)
        job = prepare_job(inputs, kind, session, choose_layout)
        state = restore(job, session)
        spent.end("preparing")
        with session.reporting_errors():
            evaluate_base(job, session)
            spent.end("evaluating the base")
            result = fit(job, state, session)
            state = best_state(job, result, session)
            spent.end("training")
            return finish(
                job, state, result.step, session, spent, write_card, write_report
            )


def checked_settings(
    config: RunConfig,
    data: Data | None,
    format: Format | None,
    source: Mapping[str, Source] | None,
) -> tuple[RunConfig, Mapping[str, Source] | None]:
    """Returns checked settings, and the records given from Python by split.

    Raises:
      NaloraError: bad settings, or an unknown mechanism.
    """
    check(config)
    config = replace(config, imports=import_files(config.imports))
    data_config, source = given_sources(
        config.data, data=data, source=source, format=format
    )
    for text in config.mechanisms:
        make(text)  # raises for an unknown name before anything is loaded
    return replace(config, data=data_config), source


@contextmanager
def attended() -> Iterator[StopSignals]:
    """Connects the processes of a run; handles signals, a closed terminal and lost processes within
    the block."""
    with outliving_terminal():
        processes.initialize_distributed()
        with processes.lost_peers_named(), stop_signals() as stop:
            yield stop


# ---------------------------------------------------------------- files, records, settings


def read_inputs(
    config: RunConfig,
    kind: Kind,
    start: Start,
    answering: Answering,
    session: Session,
    source: Mapping[str, Source] | None,
) -> Inputs:
    """Reads all that a run needs before its weights; each file is opened once.

    Raises:
      NaloraError: bad files or data, or settings that do not continue the run in the folder.
    """
    if config.compute.compilation_cache:
        use_compilation_cache()
    inputs = kind.open_inputs(
        start.with_adapter(config, session.recorded or None), source
    )
    session.check_continues(inputs.config)
    return replace(inputs, start=start, answering=answering)


# ---------------------------------------------------------------- layout, weights, adapters, step


def prepare_job(
    inputs: Inputs, kind: Kind, session: Session, choose_layout: ChooseLayout
) -> Job:
    """Returns the job in the layout that `choose_layout` chooses; image and text encoders have the
    mesh of their settings."""

    def build(placed: RunConfig) -> Job:
        # `inputs.config`, which is recorded, keeps its automatic fields; only `placed` has concrete
        # ones.
        return built(inputs, kind, placed, checked_mesh(placed), session.output)

    if inputs.base is None:
        return build(inputs.config)
    return choose_layout(inputs.config, inputs.base, build)


def built(
    inputs: Inputs,
    kind: Kind,
    placed: RunConfig,
    mesh: Mesh,
    output: Output,
    like: Job | None = None,
) -> Job:
    """Loads the base and builds step and evaluators; ``like`` is a job with the same program, to
    share."""
    loaded, assembly, data = kind.build_step(inputs, placed, mesh, output, like)
    # The same adapters: the evaluators' compiled programs are shared.
    if like is not None and like.assembly.spec == assembly.spec:
        return Job(kind, inputs, loaded, assembly, data, like.evaluator, like.selector)
    reported, selecting = (
        kind.evaluator(inputs, loaded, assembly, items) for items in inputs.held_out
    )
    return Job(kind, inputs, loaded, assembly, data, reported, selecting)


def checked_mesh(placed: RunConfig) -> Mesh:
    """Returns the mesh, after checking that its devices support the settings."""
    mesh = distributed.make_mesh(placed.mesh)
    check_implementation(placed.compute.implementation, platform_of(mesh).name)
    check_remat(placed.compute.remat, platform_of(mesh).name)
    return mesh


# ---------------------------------------------------------------- start or resumption


def restore(job: Job, session: Session) -> TrainState:
    """Returns the state to train from: the first one, or the last checkpoint's.

    Raises:
      NaloraError: a damaged checkpoint, other evaluation questions than before, or a callback that
        cannot start.
    """
    config = job.config
    assembly = job.assembly
    trained = f"{trees.count_elements(assembly.state.lora):,}"
    log.info("%s trained parameters on %s", trained, assembly.spec.describe())
    log.info("training data: %s", stream_text(job.data.describe()))
    log_first_step(assembly.mechanisms, config.steps)
    session.open_checkpoints(job)
    state = assembly.state
    if session.output.resumes:
        state, position = session.checkpointer.restore("latest", state)
        session.batches.set_state(position)
        steps = session.recorded.get("steps", config.steps)
        _log_resumption(config, int(state.step), steps, session.label)
        session.before = _known_before(session.output, job.inputs.questions)
    session.begin(int(state.step))
    return state


def _log_resumption(config: RunConfig, start: int, steps: int, label: str) -> None:
    """Logs the step that a run resumes from; warns if its learning rates change.

    Args:
      config: its settings.
      start: the step.
      steps: its number of steps before it was stopped.
      label: see `Session`.
    """
    last = ", the last one: no step is left" if start == config.steps else ""
    log.info("%sresumed from step %d%s", label, start, last)
    if steps != config.steps:
        rate_before = float(make_schedule(config.optimizer, steps)(start))
        rate = float(make_schedule(config.optimizer, config.steps)(start))
        log.warning(
            "%s--steps %d instead of %d: the learning-rate schedule spans the steps, so it goes on "
            "at %.2e where it was at %.2e; the result is not that of an uninterrupted run",
            *(label, config.steps, steps, rate, rate_before),
        )


def _known_before(
    output: Output, questions: Mapping[str, str]
) -> dict[str, Any] | None:
    """Returns the base model's held-out metrics of a resumed run; None if not yet measured.

    ``questions`` are the digests of the held-out examples (`Inputs`).

    Raises:
      NaloraError: they are of other examples than the evaluation data now has.
    """
    saved = output.folder / BEFORE
    if not saved.exists():
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


# ---------------------------------------------------------------- evaluate, train, export, report


def evaluate_base(
    job: Job, session: Session, measured: BaseMetrics | None = None
) -> BaseMetrics | None:
    """Evaluates the base, unless an interrupted run did; returns the metrics for other runs.

    Args:
      job: the run.
      session: its session, which gets the metrics.
      measured: the metrics, if a run with the same questions measured them.
    """
    if session.before:
        return measured
    if measured is None:
        # Adapters that start at zero are included, so that base and result are measured with the
        # same programs. Rewards of the base are exactly 0 only without adapters, by the reference's
        # program.
        base: tuple[Any, Any] = (job.loaded.params, None)
        if job.config.lora.init in UNCHANGED and job.config.preference.loss == "none":
            base = (job.assembly.params, job.assembly.state.lora)
        measured = BaseMetrics(
            job.evaluator.measure(*base, samples=True), job.selector.measure(*base)
        )
    before = session.before = dict(measured.reported)
    # Stored for a resumed run, which does not evaluate the base again.
    text = json.dumps(seal(before | {"questions": job.inputs.questions}))
    processes.on_first_process(
        lambda: write_atomically(session.output.folder / BEFORE, text)
    )
    session.callbacks.tell("on_eval", 0, before, "initial")
    session.progress.say(f"before: {describe(before)}")
    choosing = session.selected(0, measured.selecting)
    say_counts(
        int(before.get("n", 0)), choosing.n, chosen=job.config.train.eval_every > 0
    )
    return measured


def fit(job: Job, state: TrainState, session: Session) -> loop.FitResult:
    """Runs the training steps.

    Raises:
      TrainingDivergedError: the loss or the state is no longer finite.
      Interrupted: a signal requested a stop; the last step is saved.
    """
    assembly = job.assembly
    params = assembly.view(assembly.params)
    session.state_metrics.compile_ahead(state)
    batches = distributed.global_batches(session.batches, assembly.mesh)
    profile = Profile(job.config.debug.profiled, session.output.common)
    with session.stop.between_steps(), profile:
        result = loop.run_steps(
            assembly.step,
            params,
            state,
            batches,
            session.follower(state),
            profile=profile,
        )
    if result.interrupted:
        raise session.stopped(result)
    return result


def best_state(job: Job, result: loop.FitResult, session: Session) -> TrainState:
    """Returns the state with the best evaluation; the last one without evaluations."""
    session.checkpointer.wait()
    step = session.checkpointer.best_step()
    # Not evaluated, or the best state is the last one, which is in memory.
    if step is None or step == result.step:
        return result.state
    state, _ = session.checkpointer.restore("best", job.assembly.state)
    message = "%sthe best evaluation was at step %d: exporting that one"
    log.info(message, session.label, int(state.step))
    return state


def finish(
    job: Job,
    state: TrainState,
    last: int,
    session: Session,
    spent: Stages,
    write_card: WriteCard,
    write_report: Callable[[Path], Path],
) -> RunResult:
    """Evaluates and exports a state on examples that did not select it, and writes the report.

    Args:
      job: the run.
      state: the state to export.
      last: the last step.
      session: its session.
      spent: times of its stages.
      write_card, write_report: see `fine_tune`.
    """
    before = session.before
    folder = session.output.folder
    best = int(state.step)
    assert before is not None
    after: dict[str, Any] = job.evaluator.measure(
        job.assembly.params, state.lora, samples=True
    )
    right_before = before.get("right", ())
    # Per-example results of the same examples allow a paired test.
    if "right" in after and len(right_before) == len(after["right"]):
        after["paired"] = compare(right_before, after["right"])
    session.callbacks.tell("on_eval", best, after, "final")
    session.progress.say(f"after (step {best}): {describe(after)}")
    first = first_step(job.assembly.mechanisms)
    if best < first:
        log.warning(
            "%sthe exported adapter of step %d is that of plain LoRA: mechanisms act from step %d",
            *(session.label, best, first),
        )
    spent.end("evaluating the result")
    adapter = folder / ADAPTER
    after = after | {"step": best}
    job.kind.export_run(job, adapter, state, session.output.share)
    write_card(adapter, job, state, before, after)
    spent.end("exporting")
    session.callbacks.tell("on_end", Ended(last, best, seconds=spent.seconds))
    processes.on_first_process(lambda: log.info("report: %s", write_report(folder)))
    return RunResult(folder, adapter, folder / REPORT, before, after, best)
