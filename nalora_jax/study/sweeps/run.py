"""Trains many runs in few programs; each leaves the folder that a solo run leaves.

settings -> groups of one program -> base model, read once -> programs of fitting runs -> comparison
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import jax
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from nalora_jax.common import buckets
from nalora_jax.common.digests import seal
from nalora_jax.common.redaction import redacted
from nalora_jax.config import RunConfig, check
from nalora_jax.data.given import Data, Format
from nalora_jax.errors import Interrupted, NaloraError, TrainingDivergedError
from nalora_jax.evaluate.evaluator import describe
from nalora_jax.evaluate.run_log import to_json
from nalora_jax.layout import distributed
from nalora_jax.method.step import TrainState
from nalora_jax.models.adapters import adapter_spec
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.report.compare import render_comparison
from nalora_jax.report.history import read_history
from nalora_jax.report.html import write_report
from nalora_jax.study.sweeps.fit import Fitting
from nalora_jax.study.sweeps.grid import FILE, axes_of, check_names, grid
from nalora_jax.study.sweeps.program import RunLoop, StopOfAll, SweepProgram, fit_all
from nalora_jax.study.sweeps.values import grouped, program_key
from nalora_jax.train import start
from nalora_jax.train.callbacks import make_callbacks
from nalora_jax.train.cards import write_run_card
from nalora_jax.train.job import Inputs, Job
from nalora_jax.train.kinds import run_kind
from nalora_jax.train.output import write_text
from nalora_jax.train.preemption import StopSignals
from nalora_jax.train.progress import Stages
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


@dataclass(frozen=True)
class _Run:
    """A run before its weights are read."""

    inputs: Inputs
    session: Session

    @property
    def config(self) -> RunConfig:
        """The settled settings."""
        return self.inputs.config

    @property
    def spec(self) -> AdapterSpec | None:
        """The adapters of a language model."""
        if self.inputs.base is None:
            return None
        return adapter_spec(self.config, self.inputs.base)


def sweep_grid(config: RunConfig, options: Sequence[str]) -> SweepResult:
    """Trains all combinations of ``--sweep`` options, which are recorded for ``--resume``.

    Raises:
      NaloraError: an option that cannot vary, and the errors of `sweep`.
    """
    configs = grid(config, axes_of(options))
    settings = to_json(redacted(replace(config, resume=False).to_dict()))
    text = json.dumps(seal({"sweep": list(options), "run": settings}), indent=1) + "\n"
    return _sweep(configs, lambda: write_text(config.output, FILE, text))


def sweep(
    configs: Sequence[RunConfig], *, data: Data | None = None, format: Format | None = None
) -> SweepResult:
    """Fine-tunes a model once for each config; runs that share a program train together.

    Every run gets the folder, the log, the checkpoints, the adapter and the report of
    `nalora_jax.run`. All processes of a multi-host sweep call it.

    Args:
      configs: settings with different ``output``; ``mesh`` and ``resume`` come from the first.
      data, format: see `nalora_jax.run`.

    Raises:
      NaloraError: bad settings, files or data, before weights are read.
      TrainingDivergedError: all runs diverged.
      Interrupted: Ctrl-C or SIGTERM; the last completed step of every run is saved.
    """
    return _sweep(configs, lambda: None, data, format)


def _sweep(
    configs: Sequence[RunConfig],
    record: Callable[[], None],
    data: Data | None = None,
    format: Format | None = None,
) -> SweepResult:
    """Trains all runs; ``record`` is called once their folders are locked."""
    check_names(configs)
    configs = [replace(check(config), mesh=configs[0].mesh, resume=configs[0].resume) for config in configs]
    first = configs[0].output
    folder = str(epath.Path(buckets.url(first) or first).parent)
    with attended() as stop, ExitStack() as stack:
        runs = [_opened(config, data, format, stop, stack) for config in configs]
        distributed.on_first_process(record)
        groups = grouped(runs, lambda run: program_key(run.config, run.spec))
        log.info("%d runs in %d group(s), each of one program", len(runs), len(groups))
        fitting = [Fitting.of(g[0].config, g[0].inputs.base, len(g)) for g in groups]
        results: dict[str, RunResult | TrainingDivergedError] = {}
        try:
            for group, fits in zip(groups, fitting, strict=True):
                results |= _Group(group, fits, stop).train()
        except Interrupted as stopped:
            way = way_on(replace(configs[0], output=folder))
            raise Interrupted(stopped.signal, stopped.saved, way) from None
    return _concluded(folder, results)


def _opened(
    config: RunConfig, data: Data | None, format: Format | None, stop: StopSignals, stack: ExitStack
) -> _Run:
    """Locks the folder of a run and reads its settings, files and data."""
    config, source = checked_settings(config, data, format, None)
    resume: bool | Literal["auto"] = "auto" if config.resume else False
    console, callbacks = _Named(Path(config.output).name), make_callbacks(config.callbacks)
    session = stack.enter_context(open_session(replace(config, resume=resume), stop, callbacks, console))
    return _Run(read_inputs(config, run_kind(config), start, session, source), session)


def _concluded(folder: str, results: Mapping[str, RunResult | TrainingDivergedError]) -> SweepResult:
    """Reports the runs that diverged, and writes the comparison of the others."""
    diverged = {
        name: result for name, result in results.items() if isinstance(result, TrainingDivergedError)
    }
    finished = {name: result for name, result in results.items() if isinstance(result, RunResult)}
    for name, error in diverged.items():
        log.warning("%s diverged and was frozen: %s", Path(name).name, error)
    if not finished:
        raise next(iter(diverged.values()))
    distributed.on_first_process(lambda: write_text(folder, PAGE, render_page(finished)))
    page = f"{folder}/{PAGE}"
    log.info("comparison: %s", page)
    return SweepResult(finished, diverged, page)


class _Group:
    """Runs that share a program: one base, as many programs after each other as memory requires."""

    def __init__(self, runs: Sequence[_Run], fits: Fitting, stop: StopSignals) -> None:
        self._runs, self._fits, self._stop = list(runs), fits, stop
        self._first: Job | None = None

    def train(self) -> dict[str, RunResult | TrainingDivergedError]:
        """Trains all runs of the group; returns results or errors by folder."""
        mesh = checked_mesh(self._fits.layout.into(self._runs[0].config))
        results: dict[str, RunResult | TrainingDivergedError] = {}
        left = self._runs
        while left:
            count = self._fits.next(len(left))
            results |= self._train_together(left[:count], mesh)
            left = left[count:]
        return results

    def _train_together(
        self, runs: Sequence[_Run], mesh: Mesh
    ) -> dict[str, RunResult | TrainingDivergedError]:
        spent = Stages()
        results: dict[str, RunResult | TrainingDivergedError] = {}
        with ExitStack() as stack:
            jobs, states = [], []
            for run in runs:
                stack.enter_context(run.session.closing)
                placed = self._fits.layout.into(run.config)
                job = built(run.inputs, run_kind(placed), placed, mesh, run.session.output, self._first)
                self._first = self._first or job
                jobs.append(job)
                states.append(restore(job, run.session))
            measured: dict[str, BaseMetrics | None] = {}  # runs that ask the same questions share them
            for run, job in zip(runs, jobs, strict=True):
                stack.enter_context(run.session.reporting_errors())
                questions = json.dumps(job.inputs.questions, sort_keys=True)
                measured[questions] = evaluate_base(job, run.session, measured.get(questions))
            spent.end("preparing")
            loops = self._fit(runs, jobs, states)
            spent.end("training")
            trained = list(zip(runs, jobs, loops, strict=True))
            for run, _, loop in trained:
                if loop.interrupted:
                    raise run.session.stopped(loop.follower.result)
            for run, job, loop in trained:
                if loop.error is not None:
                    run.session.fail(loop.error)
                    results[run.config.output] = loop.error
                    continue
                result = loop.follower.result
                best = best_state(job, result, run.session)
                results[run.config.output] = finish(
                    job, best, result.step, run.session, spent, write_run_card, write_report
                )
        return results

    def _fit(
        self, runs: Sequence[_Run], jobs: Sequence[Job], states: Sequence[TrainState]
    ) -> list[RunLoop]:
        """Runs the steps of several runs in one program."""
        stop, loops = StopOfAll(self._stop), []
        assemblies = [job.assembly for job in jobs]
        program = SweepProgram(assemblies, self._fits.width, slots=self._fits.slots(len(jobs)))
        for run, state in zip(runs, states, strict=True):
            session = run.session
            loops.append(RunLoop(session.follower(state), session.batches))
            session.state_metrics, session.stop = cast(Any, loops[-1]), stop
            # Hosts meet at barriers while Orbax writes; barriers of two runs have the same name.
            session.waits_for_writes = jax.process_count() > 1
        log.info("%s", self._fits.describe(len(jobs)))
        with self._stop.between_steps():
            fit_all(program, loops, stop)
        return loops


class _Named(Console):
    """A console that prints a run's name before each line."""

    def __init__(self, name: str) -> None:
        super().__init__(highlight=False, force_terminal=False)
        self._name = name

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints the objects after the name."""
        super().print(f"{self._name}:", *objects, **options)


# ---------------------------------------------------------------- comparison of the runs


def render_page(results: Mapping[str, RunResult]) -> str:
    """Returns the comparison of runs, by their output; with too many settings for one page, of the best runs."""
    ranked = sorted(results.items(), key=lambda named: _score(named[1]), reverse=True)
    for output, result in ranked:
        log.info("%s: %s", Path(output).name, describe(result.after))
    histories = {output: read_history(result.folder) for output, result in results.items()}
    try:
        return render_comparison(list(histories.values()))
    except NaloraError:
        log.info("the comparison shows the best %d of %d runs", _MOST, len(results))
        return render_comparison([histories[output] for output, _ in ranked[:_MOST]])


def _score(result: RunResult) -> float:
    """Returns the metric of the exported adapter, higher for better."""
    after = result.after
    if "accuracy" in after:
        return float(after["accuracy"])
    return -float(after.get("loss", 0.0))
