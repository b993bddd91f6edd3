"""Stages of a fine-tuning run, in order of execution.

settle -> read inputs -> build -> restore -> evaluate the base -> take steps -> finish
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
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
from nalora_jax.common.terminal import outlive_terminal
from nalora_jax.config import RunConfig, check
from nalora_jax.config.settings import UNCHANGED
from nalora_jax.data.given import Data, RecordFormat, resolve_sources
from nalora_jax.data.pipeline import stream_text
from nalora_jax.data.source import Source
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.evaluator import describe
from nalora_jax.evaluate.intervals import compare
from nalora_jax.evaluate.run_log import ADAPTER, MODEL, read_evaluation
from nalora_jax.kinds.record import Inputs, Job, check_kind, run_kind
from nalora_jax.loading.initial_adapter import take_adapter_settings
from nalora_jax.mesh import distributed, processes
from nalora_jax.mesh.distributed import platform_of
from nalora_jax.method.rules import make
from nalora_jax.method.step import TrainState
from nalora_jax.models.remat import check_remat
from nalora_jax.ops.dispatch import check_implementation
from nalora_jax.planner.choice import accept_layout
from nalora_jax.train import loop
from nalora_jax.train.callbacks import Callback, Ended, Exported, make_callbacks
from nalora_jax.train.output import Output
from nalora_jax.train.preemption import StopSignals, stop_signals
from nalora_jax.train.profile import Profile
from nalora_jax.train.progress import Stages
from nalora_jax.train.session import (
    Running,
    Session,
    open_checkpoints,
    open_session,
    say_counts,
)

log = logging.getLogger(__name__)

REPORT = "report.html"  # in a run's folder, written by `nalora_jax.report.writer`
BEFORE = "before.json"  # in a run's folder: metrics of the base model and digests of the questions


class Settled(NamedTuple):
    """A run whose settings are checked."""

    config: RunConfig
    source: Mapping[str, Source] | None  # records given from Python, by split
    callbacks: Sequence[Callback]


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
    callbacks: Sequence[Callback] = (),
    *,
    data: Data | None = None,
    format: RecordFormat | None = None,
    source: Mapping[str, Source] | None = None,
) -> RunResult:
    """Fine-tunes a model. All processes of a multi-host run call it; the first one logs and writes.

    Args:
      config: the run's settings.
      callbacks: what surrounds the run (its card, its report, trackers), besides its log and the
        callbacks that the settings name.
      data, format, source: see `nalora_jax.run`, which also lists the errors.
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
    settled = settle(config, callbacks, data=data, format=format, source=source)
    with (
        attend_processes() as stop,
        open_session(settled.config, stop, settled.callbacks) as session,
    ):
        spent = Stages()
        inputs = read_inputs(settled, session)
        job = build_job(inputs, session.output)
        running = restore(job, session)
        spent.end("preparing")
        with running.reporting_errors():
            evaluate_base(running)
            spent.end("evaluating the base")
            last = take_steps(running)
            state = best_state(running, last)
            spent.end("training")
            return finish(running, state, last.step, spent)


def settle(
    config: RunConfig,
    callbacks: Sequence[Callback] = (),
    *,
    data: Data | None = None,
    format: RecordFormat | None = None,
    source: Mapping[str, Source] | None = None,
) -> Settled:
    """Checks the settings of a run, once; arguments are those of `fine_tune`.

    Raises:
      NaloraError: bad settings, or an unknown kind, mechanism or callback.
    """
    check(config)
    config = replace(config, imports=import_files(config.imports))
    if not config.has_adapters:
        config = config.without_mechanisms()
    check_kind(config)
    data_config, source = resolve_sources(
        config.data, data=data, source=source, format=format
    )
    for text in config.mechanisms:
        make(text)  # raises for an unknown name before anything is loaded
    listeners = [*callbacks, *make_callbacks(config.callbacks)]
    return Settled(replace(config, data=data_config), source, listeners)


@contextmanager
def attend_processes() -> Iterator[StopSignals]:
    """Connects the processes of a run; handles signals, a closed terminal and lost processes within
    the block."""
    with outlive_terminal():
        processes.initialize_distributed()
        with processes.name_lost_peers(), stop_signals() as stop:
            yield stop


# ---------------------------------------------------------------- files, records, settings


def read_inputs(settled: Settled, session: Session) -> Inputs:
    """Reads all that a run needs before its weights; each file is opened once.

    Raises:
      NaloraError: bad files or data, or settings that do not continue the run in the folder.
    """
    config = settled.config
    if config.compute.compilation_cache:
        use_compilation_cache()
    config = take_adapter_settings(config, session.recorded or None)
    inputs = run_kind(config).open_inputs(config, settled.source)
    session.check_continues(inputs.config)
    return inputs


# ---------------------------------------------------------------- layout, weights, adapters, step


def build_job(inputs: Inputs, output: Output) -> Job:
    """Returns the job in a layout that the planner chooses; image and text encoders have the mesh
    of their settings."""

    def build(placed: RunConfig) -> Job:
        # `inputs.config`, which is recorded, keeps its automatic fields; only `placed` has concrete
        # ones.
        return build_placed(inputs, placed, checked_mesh(placed), output)

    if inputs.base is None:
        return build(inputs.config)
    return accept_layout(inputs.config, inputs.base, build)


def build_placed(
    inputs: Inputs,
    placed: RunConfig,
    mesh: Mesh,
    output: Output,
    like: Job | None = None,
) -> Job:
    """Loads the base and builds step and evaluators; ``like`` is a job with the same program, to
    share."""
    kind = run_kind(placed)
    built = kind.build_step(inputs, placed, mesh, output, like)
    # The same adapters: the evaluators' compiled programs are shared.
    if like is not None and like.assembly.spec == built.assembly.spec:
        return Job(kind, inputs, *built, like.evaluator, like.selector)
    reported, selecting = (
        kind.evaluator(inputs, built.loaded, built.assembly, items)
        for items in inputs.held_out
    )
    return Job(kind, inputs, *built, reported, selecting)


def checked_mesh(placed: RunConfig) -> Mesh:
    """Returns the mesh, after checking that its devices support the settings."""
    mesh = distributed.make_mesh(placed.mesh)
    check_implementation(placed.compute.implementation, platform_of(mesh).name)
    check_remat(placed.compute.remat, platform_of(mesh).name)
    return mesh


# ---------------------------------------------------------------- start or resumption


def restore(job: Job, session: Session) -> Running:
    """Returns the run with the state to train from: the first one, or the last checkpoint's.

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
    checkpointer = open_checkpoints(job, session)
    batches = job.data.batches()
    state = assembly.state
    before = None
    if session.output.resumes:
        state, position = checkpointer.restore("latest", state)
        batches.set_state(position)
        steps = session.recorded.get("steps", config.steps)
        _log_resumption(config, int(state.step), steps, session.label)
        before = _known_before(session.output, job.inputs.questions)
    return Running(job, session, checkpointer, batches, state, before)


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


def _weights_of_base(job: Job) -> tuple[Any, Any]:
    """Returns the frozen weights and the adapters with which the base is evaluated.

    Adapters that start at zero do not change the base, and are included: base and result are then
    measured by the same compiled programs. There are two exceptions: a start that changes the
    frozen weights (such as PiSSA), and rewards relative to the base, which are exactly 0 only by
    the program of the reference, without adapters.
    """
    is_reference = job.kind.compares_with_base and not job.config.adapter
    if is_reference or job.config.lora.init not in UNCHANGED:
        return job.loaded.params, None
    return job.assembly.params, job.assembly.state.lora


def evaluate_base(
    run: Running, measured: BaseMetrics | None = None
) -> BaseMetrics | None:
    """Evaluates the base, unless an interrupted run did; returns the metrics for other runs.

    The metrics are stored in the run's folder, given to callbacks and to the selection of the best
    step, and shown.

    Args:
      run: the run, which gets the metrics.
      measured: the metrics, if a run with the same questions measured them.
    """
    job = run.job
    if run.before:
        return measured
    if measured is None:
        base = _weights_of_base(job)
        measured = BaseMetrics(
            job.evaluator.measure(*base, samples=True), job.selector.measure(*base)
        )
    before = run.before = dict(measured.reported)
    # Stored for a resumed run, which does not evaluate the base again.
    text = json.dumps(seal(before | {"questions": job.inputs.questions}))
    processes.run_on_first_process(
        lambda: write_atomically(run.output.folder / BEFORE, text)
    )
    run.callbacks.tell("on_eval", 0, before, "initial")
    run.progress.say(f"before: {describe(before)}")
    choosing = run.select(0, measured.selecting)
    say_counts(
        int(before.get("n", 0)), choosing.n, chosen=job.config.train.eval_every > 0
    )
    return measured


def take_steps(run: Running) -> loop.FitResult:
    """Runs the training steps.

    Raises:
      TrainingDivergedError: the loss or the state is no longer finite.
      Interrupted: a signal requested a stop; the last step is saved.
    """
    job = run.job
    assembly = job.assembly
    params = assembly.view(assembly.params)
    run.state_metrics.compile_ahead(run.state)
    batches = distributed.global_batches(run.batches, assembly.mesh)
    profile = Profile(job.config.debug.profiled, run.output.common)
    with run.stop.between_steps(), profile:
        result = loop.run_steps(
            assembly.step, params, run.state, batches, run.follow(), profile=profile
        )
    if result.interrupted:
        raise run.interruption(result)
    return result


def best_state(run: Running, last: loop.FitResult) -> TrainState:
    """Returns the state with the best evaluation; the last one without evaluations."""
    run.checkpointer.wait()
    step = run.checkpointer.best_step()
    # Not evaluated, or the best state is the last one, which is in memory.
    if step is None or step == last.step:
        return last.state
    state, _ = run.checkpointer.restore("best", run.job.assembly.state)
    message = "%sthe best evaluation was at step %d: exporting that one"
    log.info(message, run.label, int(state.step))
    return state


def finish(run: Running, state: TrainState, last: int, spent: Stages) -> RunResult:
    """Evaluates and exports a state on examples that did not select it.

    Args:
      run: the run.
      state: the state to export.
      last: the last step.
      spent: times of the run's stages.
    """
    job = run.job
    before = run.before
    folder = run.output.folder
    best = int(state.step)
    assert before is not None
    after: dict[str, Any] = job.evaluator.measure(
        job.assembly.params, state.lora, samples=True
    )
    right_before = before.get("right", ())
    # Per-example results of the same examples allow a paired test.
    if "right" in after and len(right_before) == len(after["right"]):
        after["paired"] = compare(right_before, after["right"])
    run.callbacks.tell("on_eval", best, after, "final")
    run.progress.say(f"after (step {best}): {describe(after)}")
    first = first_step(job.assembly.mechanisms)
    if best < first:
        log.warning(
            "%sthe exported adapter of step %d is that of plain LoRA: mechanisms act from step %d",
            *(run.label, best, first),
        )
    spent.end("evaluating the result")
    exported = folder / ADAPTER
    if job.config.tune:
        exported = folder / MODEL
    after = after | {"step": best}
    spec = job.kind.export_run(job, exported, state, run.output.share)
    run.callbacks.tell("on_export", Exported(exported, job, spec, best, before, after))
    spent.end("exporting")
    run.callbacks.tell("on_end", Ended(last, best, seconds=spent.seconds))
    return RunResult(folder, exported, folder / REPORT, before, after, best)
