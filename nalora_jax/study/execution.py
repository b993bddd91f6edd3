"""Runs of a study, one after another, each through the training loop of ``nalora train``."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from nalora_jax.assembly.compilation import use_compilation_cache
from nalora_jax.errors import NaloraError
from nalora_jax.mesh import distributed
from nalora_jax.method.step import TrainState
from nalora_jax.study import provenance
from nalora_jax.study.planned_runs import Run, list_pending
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import Records, StudyRecord, exact_values, hours
from nalora_jax.study.resources import Resources
from nalora_jax.study.study_progress import RunInProgress
from nalora_jax.study.sweeps.stacked_program import RunLoop, SweepProgram, fit_all

log = logging.getLogger(__name__)

# Until another process may have finished a run that this process waits for.
_WAIT_SECONDS = 5.0
_compiled: list[float] = []  # seconds of each program that XLA compiles in this process


def _listen(event: str, duration_secs: float, **more: Any) -> None:
    """Notes a program that XLA has compiled; JAX calls it with every event's duration."""
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_listen)


def run_study(
    protocol: Protocol,
    *,
    limit: int = 0,
    methods: Sequence[str] = (),
    together: int = 0,
) -> int:
    """Performs runs until all are done, the budget is spent, or ``limit`` (0: none) were done here.

    Any number of processes may do this at once, on machines that share the folder's file system.

    Args:
      protocol: the study.
      limit: maximum number of runs.
      methods: methods whose runs are done; by default all. A run's result depends on no other run.
      together: largest number of runs of a method that train in one program; 0: one on a CPU, and
        as many as memory allows elsewhere.

    Returns:
      The number of runs that this process did.

    Raises:
      NaloraError: data or a model is missing, settings do not fit the model, a method is unknown, a
        test's protocol is not committed, or protocol, base, data, rules or records changed.
    """
    for name in set(methods) - protocol.methods.keys():
        raise NaloraError(
            "--methods",
            expected=f"methods of {protocol.path}: {', '.join(protocol.methods)}",
            found=name,
        )
    if not together and distributed.platform_of().name == "cpu":
        together = 1
    store = Records(protocol.folder)
    resources = Resources(protocol, together)
    done = 0
    provenance.code_version()  # cached now, in case a loaded file is edited later
    if note := provenance.describe_old(store.read()):
        log.info("%s", note)
    limit = limit or sys.maxsize
    while done < limit:
        records = provenance.checked_records(protocol, store)
        budget = protocol.budget_hours
        spent = hours(records)
        if budget and spent >= budget:
            log.info(
                "the budget of %g hours is spent (%.1f): no further run starts",
                budget,
                spent,
            )
            break
        left = list_pending(protocol, records)
        if methods:
            left = [run for run in left if run.cell.method in methods]
        if not left:
            which = ""
            if methods:
                which = f"of {', '.join(methods)} "
            done_here = "%s: all runs %sare done; the study has %d records"
            log.info(done_here, protocol.folder, which, len(records))
            break
        finished = _do_some(protocol, store, resources, left, limit - done)
        if not finished:
            # Other processes do the remaining runs, whose results may add further runs.
            time.sleep(_WAIT_SECONDS)
        done += finished
    return done


def _do_some(
    protocol: Protocol, store: Records, resources: Resources, left: list[Run], most: int
) -> int:
    """Performs the first runs of ``left`` that no process has claimed; returns their number.

    They are at most ``most`` runs of one cell and stage, which share a program and fit in memory.
    """
    with ExitStack() as claims:  # gives the claims up at the end
        claimed: list[tuple[Run, Path]] = []
        for run in left:
            if claimed:
                first, _ = claimed[0]
                if (run.cell, run.stage) != (first.cell, first.stage):
                    continue
            # None if another process has claimed the run
            snapshot = claims.enter_context(store.claim(run.id))
            if snapshot is not None:
                # Another process may have finished it meanwhile.
                records = provenance.checked_records(protocol, store)
                if run.id not in records:
                    claimed.append((resources.placed(run), snapshot))
            capacity = 1
            if (fits := resources.fitting(run)) is not None:
                capacity = fits.capacity
            if len(claimed) == min(most, capacity):
                break
        if not claimed:
            return 0
        records = provenance.checked_records(protocol, store)
        commit = None
        for run, _ in claimed:
            if run.stage == "test":
                commit = provenance.check_committed(protocol)
                store.list_test({"id": run.id, "protocol": protocol.digest})
            log.info("%s", run)
        began = time.perf_counter()
        runs, snapshots = zip(*claimed, strict=True)
        performed = perform_all(runs, resources, snapshots, records)
        for record, snapshot in zip(performed, snapshots, strict=True):
            finished = exact_values(record | {"commit": commit})
            store.append(finished | {"digest": provenance.record_digest(finished)})
            snapshot.unlink(missing_ok=True)
            seconds = time.perf_counter() - began
            log.info("  %s in %.0f s", _outcome(record), seconds)
        return len(claimed)


def _outcome(record: StudyRecord) -> str:
    """Returns the final losses of a run as text."""
    if record["diverged"]:
        return "diverged"
    losses = []
    for name in ("validation", "test"):
        if name in record:
            losses.append(f"{name} loss {record[name]['loss']:.4f}")
    return ", ".join(losses)


def perform_all(
    runs: Sequence[Run],
    resources: Resources,
    snapshots: Sequence[Path],
    records: Mapping[str, StudyRecord] | None = None,
) -> list[StudyRecord]:
    """Trains and measures runs, and returns their records.

    Args:
      runs: runs of one cell, on the mesh of `Resources.placed`; several are trained by one program
        (`nalora_jax.study.sweeps`).
      resources: models, data and programs of this process.
      snapshots: by run, file with the state at its last evaluation, from which it resumes.
      records: finished runs, which must have the same base, data, items and rules.

    Raises:
      NaloraError: they do not agree with them; the runs were not trained.
    """
    if runs[0].config.compute.compilation_cache:
        use_compilation_cache()
    began = time.perf_counter()
    compiled_before = len(_compiled)
    started = [
        RunInProgress(run, resources, path)
        for run, path in zip(runs, snapshots, strict=True)
    ]
    checked = dict(records or {})
    for each in started:
        checked[each.run.id] = each.described
    provenance.check_records(checked)
    fits = resources.fitting(runs[0])
    if fits is None:
        states = [started[0].train()]
    else:
        states = _train_together(started, fits.slots(len(runs)))
    share = (time.perf_counter() - began) / len(
        runs
    )  # each run's part of the shared time
    performed = []
    for progress, state in zip(started, states, strict=True):
        began = time.perf_counter()
        record = progress.record(state)
        record["seconds"] = (
            progress.seconds_before + share + time.perf_counter() - began
        )
        record["compilations"] = len(_compiled) - compiled_before
        performed.append(record)
    return performed


def _train_together(
    started: Sequence[RunInProgress], slots: int
) -> list[TrainState | None]:
    """Returns the trained state of each run of a program with ``slots``; None for diverged runs."""
    loops = []
    assemblies = []
    for run in started:
        loop = RunLoop(run.begin(), run.rows())
        loops.append(loop)
        state = loop.follower.result.state
        assemblies.append(replace(run.assembly, params=run.params, state=state))
    began = time.perf_counter()
    fit_all(SweepProgram(assemblies, slots=slots), loops)
    for run in started:
        run.training_seconds += (time.perf_counter() - began) / len(started)
    states: list[TrainState | None] = []
    for loop in loops:
        if loop.error is None:
            states.append(loop.follower.result.state)
        else:
            states.append(None)
    return states
