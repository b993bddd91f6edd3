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

from nalora_jax.common import buckets, digests, notes, redaction
from nalora_jax.config import RunConfig
from nalora_jax.data.given import Data, RecordFormat
from nalora_jax.errors import Interrupted, NaloraError, TrainingDivergedError
from nalora_jax.evaluate import evaluator, run_log
from nalora_jax.kinds.record import Inputs, Job
from nalora_jax.mesh import processes
from nalora_jax.report import compare, history
from nalora_jax.report.writer import ReportWriter
from nalora_jax.study.sweeps import fit, values
from nalora_jax.study.sweeps.grid import SWEEP_FILE, axes_of, check_names, grid
from nalora_jax.study.sweeps.stacked_program import (
    RunLoop,
    StopOfAll,
    SweepProgram,
    fit_all,
)
from nalora_jax.train import preemption, progress
from nalora_jax.train.cards import CardWriter
from nalora_jax.train.output import write_text
from nalora_jax.train.run import (
    BaseMetrics,
    RunResult,
    attend_processes,
    best_state,
    build_placed,
    checked_mesh,
    evaluate_base,
    finish,
    read_inputs,
    restore,
    settle,
)
from nalora_jax.train.session import Running, Session, open_session, way_on

log = logging.getLogger(__name__)
PAGE = "comparison.html"  # in the folder of a sweep
_MOST = 7  # settings on a page


@dataclass(frozen=True)
class SweepResult:
    """The outputs of a sweep.

    Attributes:
      runs: results by the ``output`` of their configs.
      diverged: errors of the runs that diverged, by the ``output`` of their configs.
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
    settings = redaction.redact(replace(config, resume=False).to_dict())
    record = {"sweep": list(options), "run": run_log.to_json(settings)}
    text = json.dumps(digests.seal(record), indent=1) + "\n"
    return sweep(configs, locked=lambda: write_text(config.output, SWEEP_FILE, text))


def sweep(
    configs: Sequence[RunConfig],
    *,
    data: Data | None = None,
    format: RecordFormat | None = None,
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
        replace(config, mesh=configs[0].mesh, resume=configs[0].resume)
        for config in configs
    ]
    first = configs[0].output
    folder = str(epath.Path(buckets.url(first) or first).parent)
    results: _Results = {}
    with attend_processes() as stop, _logged_once(), ExitStack() as stack:
        runs = [_open_run(config, data, format, stop, stack) for config in configs]
        processes.run_on_first_process(locked)
        groups = values.group_by_key(runs, _key)
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
    processes.run_on_first_process(
        lambda: write_text(folder, PAGE, _render_page(finished))
    )
    page = f"{folder}/{PAGE}"
    log.info("comparison: %s", page)
    return SweepResult(finished, diverged, page)


def _open_run(
    config: RunConfig,
    data: Data | None,
    format: RecordFormat | None,
    stop: preemption.StopSignals,
    stack: ExitStack,
) -> _Run:
    """Locks the folder of a run and reads its settings, files and data, but no weights.

    Args:
      config: of the run.
      data, format: as for `sweep`.
      stop: the signals that stop all runs.
      stack: closes the run's session at its end.
    """
    around = [CardWriter(), ReportWriter()]
    settled = settle(config, around, data=data, format=format)
    resume: bool | Literal["auto"] = False
    if config.resume:
        resume = "auto"
    name = Path(config.output).name
    settings = replace(settled.config, resume=resume)
    opened = open_session(settings, stop, settled.callbacks, _Named(name), f"{name}: ")
    session = stack.enter_context(opened)
    return _Run(read_inputs(settled, session), session)


def _key(run: _Run) -> str:
    """Returns the key of a run's program; its adapters are known for language models."""
    config = run.inputs.config
    return values.program_key(config, run.inputs.adapters)


def _train_group(
    runs: Sequence[_Run], fits: fit.Fitting, stop: preemption.StopSignals
) -> _Results:
    """Trains runs that share a program, with one base.

    If memory is too small for all of them, several programs run after each other.
    """
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
    """Trains runs in one program, and finishes each.

    Args:
      runs: before their weights are read.
      fits: their layout.
      mesh: their devices.
      stop: the signals that stop all runs.
      like: a job whose base they share; None reads it.

    Returns:
      A job with the base, and the results by folder.
    """
    spent = progress.Stages()
    trained: list[Running] = []
    results: _Results = {}
    with ExitStack() as stack:
        for inputs, session in runs:
            stack.enter_context(session.closing)
            placed = fits.layout.into(inputs.config)
            job = build_placed(inputs, placed, mesh, session.output, like)
            like = like or job
            session.runs_in_program = len(runs)
            trained.append(restore(job, session))
        # Runs that ask the same questions share them.
        measured: dict[str, BaseMetrics | None] = {}
        for run in trained:
            stack.enter_context(run.reporting_errors())
            questions = json.dumps(run.job.inputs.questions, sort_keys=True)
            measured[questions] = evaluate_base(run, measured.get(questions))
        spent.end("preparing")
        loops = _fit(trained, fits, stop)
        spent.end("training")
        for run, loop in zip(trained, loops, strict=True):
            if loop.follower.result.interrupted:
                raise run.interruption(loop.follower.result)
        for run, loop in zip(trained, loops, strict=True):
            output = run.job.config.output
            if loop.error is not None:
                run.fail(loop.error)
                results[output] = loop.error
                continue
            last = loop.follower.result
            results[output] = finish(run, best_state(run, last), last.step, spent)
    assert like is not None
    return like, results


def _fit(
    runs: Sequence[Running], fits: fit.Fitting, signals: preemption.StopSignals
) -> list[RunLoop]:
    """Runs the steps of several runs in one program; returns their loops, which have ended.

    Args:
      runs: before their next step.
      fits: their layout.
      signals: stop all runs.
    """
    stop = StopOfAll(signals)
    loops = []
    assemblies = [run.job.assembly for run in runs]
    program = SweepProgram(assemblies, fits.width, slots=fits.slots(len(runs)))
    for run in runs:
        loops.append(RunLoop(run.follow(), run.batches))
        run.state_metrics = cast(Any, loops[-1])
        run.stop = cast(Any, stop)
        # Hosts meet at barriers while Orbax writes; barriers of two runs have the same name.
        run.waits_for_writes = jax.process_count() > 1
    log.info("%s", fits.describe(len(runs)))
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
    """Returns the page that compares runs, given their results by folder.

    It has all runs or, if these are too many for one page, the best `_MOST`.
    """

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
