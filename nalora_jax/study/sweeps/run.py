"""Trains many runs in few programs; each leaves the folder that a solo run leaves.

settings -> groups of one program -> base model, read once -> programs of fitting runs -> comparison
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from nalora_jax import kinds
from nalora_jax.assembly import start
from nalora_jax.common import buckets, digests, notes, redaction
from nalora_jax.config import RunConfig, check
from nalora_jax.data.given import Data, Format
from nalora_jax.errors import Interrupted, NaloraError, TrainingDivergedError
from nalora_jax.evaluate import evaluator, run_log
from nalora_jax.evaluate.generate.generator import answering
from nalora_jax.kinds.job import Inputs, Job
from nalora_jax.mesh import processes
from nalora_jax.method.step import TrainState
from nalora_jax.models.adapters import adapter_spec
from nalora_jax.report import compare, history, html
from nalora_jax.study.sweeps import fit, values
from nalora_jax.study.sweeps.grid import FILE, axes_of, check_names, grid
from nalora_jax.study.sweeps.program import RunLoop, StopOfAll, SweepProgram, fit_all
from nalora_jax.train import cards, preemption, progress
from nalora_jax.train.callbacks import make_callbacks
from nalora_jax.train.output import write_text
from nalora_jax.train.run import (
    BaseMetrics,
    RunResult,
    attended,
    best_state,
    built,
    checked_mesh,
    checked_settings,
    evaluate_base,
    finish,
    read_inputs,
    restore,
)
from nalora_jax.train.session import Session, open_session, way_on

log = logging.getLogger(__name__)
PAGE = "comparison.html"  # in the folder of a sweep
_MOST = 7  # settings on a page


@dataclass(frozen=True)
class SweepResult:
    """The outputs of a sweep.

    Attributes:
      runs: results by the ``output`` of their configs.
      diverged: errors of the runs that diverged, likewise.
      page: path or URL of the comparison.
    """

    runs: Mapping[str, RunResult]
    diverged: Mapping[str, TrainingDivergedError]
    page: str


class _Run(NamedTuple):
    """A run before its weights are read."""

    inputs: Inputs
    session: Session


_Results = dict[str, RunResult | TrainingDivergedError]  # by folder


def sweep_grid(config: RunConfig, options: Sequence[str]) -> SweepResult:
    """Trains all combinations of ``--sweep`` options, which are recorded for ``--resume``.

    Raises:
      NaloraError: an option that cannot vary, and the errors of `sweep`.
    """
    configs = grid(config, axes_of(options))
    settings = redaction.redacted(replace(config, resume=False).to_dict())
    record = {"sweep": list(options), "run": run_log.to_json(settings)}
    text = json.dumps(digests.seal(record), indent=1) + "\n"
    return sweep(configs, locked=lambda: write_text(config.output, FILE, text))


def sweep(
    configs: Sequence[RunConfig],
    *,
    data: Data | None = None,
    format: Format | None = None,
    locked: Callable[[], None] = lambda: None,
) -> SweepResult:
    """Fine-tunes a model once for each config; runs that share a program train together.

    Every run gets the folder, the log, the checkpoints, the adapter and the report of
    `nalora_jax.run`. All processes of a multi-host sweep call it.

    Args:
      configs: settings with different ``output``; ``mesh`` and ``resume`` come from the first.
      data, format: see `nalora_jax.run`.
      locked: called by the first process once the folders of all runs are locked.

    Raises:
      NaloraError: bad settings, files or data, before weights are read.
      TrainingDivergedError: all runs diverged.
      Interrupted: Ctrl-C or SIGTERM; the last completed step of every run is saved.
    """
    check_names(configs)
    configs = [
        replace(check(config), mesh=configs[0].mesh, resume=configs[0].resume)
        for config in configs
    ]
    first = configs[0].output
    folder = str(epath.Path(buckets.url(first) or first).parent)
    results: _Results = {}
    with attended() as stop, _logged_once(), ExitStack() as stack:
        runs = [_open_run(config, data, format, stop, stack) for config in configs]
        processes.on_first_process(locked)
        groups = values.grouped(runs, _key)
        log.info("%d runs in %d group(s), each of one program", len(runs), len(groups))
        firsts = [(group[0].inputs, len(group)) for group in groups]
        fitting = [
            fit.Fitting.of(inputs.config, inputs.base, count)
            for inputs, count in firsts
        ]
        try:
            for group, fits in zip(groups, fitting, strict=True):
                results |= _train_group(group, fits, stop)
        except Interrupted as stopped:
            way = way_on(replace(configs[0], output=folder))
            raise Interrupted(stopped.signal, stopped.saved, way) from None
    diverged = {}
    finished = {}
    for name, result in results.items():
        if isinstance(result, RunResult):
            finished[name] = result
        else:
            diverged[name] = result
            log.warning("%s diverged and was frozen: %s", Path(name).name, result)
    if not finished:
        raise next(iter(diverged.values()))
    processes.on_first_process(lambda: write_text(folder, PAGE, _render_page(finished)))
    page = f"{folder}/{PAGE}"
    log.info("comparison: %s", page)
    return SweepResult(finished, diverged, page)


def _open_run(
    config: RunConfig,
    data: Data | None,
    format: Format | None,
    stop: preemption.StopSignals,
    stack: ExitStack,
) -> _Run:
    """Locks the folder of a run and reads its settings, files and data."""
    config, source = checked_settings(config, data, format, None)
    resume: bool | Literal["auto"] = False
    if config.resume:
        resume = "auto"
    name = Path(config.output).name
    callbacks = make_callbacks(config.callbacks)
    settings = replace(config, resume=resume)
    opened = open_session(settings, stop, callbacks, _Named(name), f"{name}: ")
    session = stack.enter_context(opened)
    kind = kinds.run_kind(config)
    inputs = read_inputs(config, kind, start, answering, session, source)
    return _Run(inputs, session)


def _key(run: _Run) -> str:
    """Returns the key of a run's program; its adapters are known for language models."""
    config = run.inputs.config
    spec = None
    if run.inputs.base is not None:
        spec = adapter_spec(config, run.inputs.base)
    return values.program_key(config, spec)


def _train_group(
    runs: Sequence[_Run], fits: fit.Fitting, stop: preemption.StopSignals
) -> _Results:
    """Trains runs that share a program: one base, as many programs after each other as memory
    requires."""
    mesh = checked_mesh(fits.layout.into(runs[0].inputs.config))
    results: _Results = {}
    first: Job | None = None
    while len(results) < len(runs):
        left = runs[len(results) :]
        first, of_program = _train_together(
            left[: fits.next(len(left))], fits, mesh, stop, first
        )
        results |= of_program
    return results


def _train_together(
    runs: Sequence[_Run],
    fits: fit.Fitting,
    mesh: Mesh,
    stop: preemption.StopSignals,
    like: Job | None,
) -> tuple[Job, _Results]:
    """Trains runs in one program, with the base of an earlier job; returns a job and the
    results."""
    spent = progress.Stages()
    jobs = []
    states = []
    results: _Results = {}
    with ExitStack() as stack:
        for inputs, session in runs:
            stack.enter_context(session.closing)
            session.runs_in_program = len(runs)
            placed = fits.layout.into(inputs.config)
            jobs.append(
                built(
                    inputs, kinds.run_kind(placed), placed, mesh, session.output, like
                )
            )
            like = like or jobs[0]
            states.append(restore(jobs[-1], session))
        # Runs that ask the same questions share them.
        measured: dict[str, BaseMetrics | None] = {}
        for (inputs, session), job in zip(runs, jobs, strict=True):
            stack.enter_context(session.reporting_errors())
            questions = json.dumps(inputs.questions, sort_keys=True)
            measured[questions] = evaluate_base(job, session, measured.get(questions))
        spent.end("preparing")
        loops = _fit([session for _, session in runs], jobs, states, fits, stop)
        spent.end("training")
        for (_, session), loop in zip(runs, loops, strict=True):
            if loop.follower.result.interrupted:
                raise session.stopped(loop.follower.result)
        for (inputs, session), job, loop in zip(runs, jobs, loops, strict=True):
            if loop.error is not None:
                session.fail(loop.error)
                results[inputs.config.output] = loop.error
                continue
            result = loop.follower.result
            best = best_state(job, result, session)
            writers = cards.write_run_card, html.write_report
            results[inputs.config.output] = finish(
                job, best, result.step, session, spent, *writers
            )
    return like or jobs[0], results


def _fit(
    sessions: Sequence[Session],
    jobs: Sequence[Job],
    states: Sequence[TrainState],
    fits: fit.Fitting,
    signals: preemption.StopSignals,
) -> list[RunLoop]:
    """Runs the steps of several runs in one program."""
    stop = StopOfAll(signals)
    loops = []
    program = SweepProgram(
        [job.assembly for job in jobs], fits.width, slots=fits.slots(len(jobs))
    )
    for session, state in zip(sessions, states, strict=True):
        loops.append(RunLoop(session.follower(state), session.batches))
        session.state_metrics = cast(Any, loops[-1])
        session.stop = stop
        # Hosts meet at barriers while Orbax writes; barriers of two runs have the same name.
        session.waits_for_writes = jax.process_count() > 1
    log.info("%s", fits.describe(len(jobs)))
    with signals.between_steps():
        fit_all(program, loops, stop)
    return loops


class _FirstOfEach(logging.Filter):
    """Drops messages of this library that were logged before, except reports of progress."""

    def __init__(self) -> None:
        super().__init__()
        self._logged: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns True for the first of several equal messages."""
        if record.name == notes.__name__ or not record.name.startswith("nalora_jax"):
            return True
        message = record.getMessage()
        is_first = message not in self._logged
        self._logged.add(message)
        return is_first


@contextmanager
def _logged_once() -> Iterator[None]:
    """Logs equal messages once within the block, where several runs have the same data."""
    loggers = logging.getLogger("nalora_jax"), logging.getLogger()
    filters = [
        (handler, _FirstOfEach()) for logger in loggers for handler in logger.handlers
    ]
    for handler, first_of_each in filters:
        handler.addFilter(first_of_each)
    try:
        yield
    finally:
        for handler, first_of_each in filters:
            handler.removeFilter(first_of_each)


class _Named(Console):
    """A console that prints a run's name before each line."""

    def __init__(self, name: str) -> None:
        super().__init__(highlight=False, force_terminal=False)
        self._name = name

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints the objects after the name."""
        super().print(f"{self._name}:", *objects, **options)


def _render_page(results: Mapping[str, RunResult]) -> str:
    """Returns the comparison of runs, by their output; with too many settings for one page, of the
    best runs."""

    def score(named: tuple[str, RunResult]) -> float:
        """Returns a score of the exported adapter, higher for better."""
        after = named[1].after
        return float(after.get("accuracy", -after.get("loss", 0.0)))

    ranked = sorted(results.items(), key=score, reverse=True)
    for output, result in ranked:
        log.info("%s: %s", Path(output).name, evaluator.describe(result.after))
    histories = {
        output: history.read_history(result.folder)
        for output, result in results.items()
    }
    try:
        return compare.render_comparison(list(histories.values()))
    except NaloraError:
        log.info("the comparison shows the best %d of %d runs", _MOST, len(results))
        return compare.render_comparison(
            [histories[output] for output, _ in ranked[:_MOST]]
        )
