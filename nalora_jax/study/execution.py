"""Runs of a study, one after another, each through the training loop of ``nalora train``."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from nalora_jax.common import processor
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.method.step import TrainState
from nalora_jax.study import provenance
from nalora_jax.study.plan import Run, pending
from nalora_jax.study.progress import RunInProgress
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import Record, Records, exact_values, hours
from nalora_jax.study.resources import Resources
from nalora_jax.study.sweeps.program import RunLoop, SweepProgram, fit_all
from nalora_jax.train.compilation import use_compilation_cache
from nalora_jax.train.machine import describe_device, peak_memory, versions

log = logging.getLogger(__name__)

_WAIT_SECONDS = 5.0  # until another process may have finished a run that this process waits for


def run_study(protocol: Protocol, *, limit: int = 0, methods: Sequence[str] = (), together: int = 0) -> int:
    """Performs runs until all are done, the budget is spent, or ``limit`` (0: none) were done here.

    Any number of processes may do this at once, on machines that share the folder's file system.

    Args:
      protocol: the study.
      limit: maximum number of runs.
      methods: methods whose runs are done; by default all. A run's result depends on no other run.
      together: largest number of runs of a method that train in one program; 0: one on a CPU, and as many as
        memory allows elsewhere.

    Returns:
      The number of runs that this process did.

    Raises:
      NaloraError: data or a model is missing, settings do not fit the model, a method is unknown, a
        test's protocol is not committed, or protocol, base, data, rules or records changed.
    """
    for name in methods:
        if name not in protocol.methods:
            expected = f"methods of {protocol.path}: {', '.join(protocol.methods)}"
            raise NaloraError("--methods", expected=expected, found=name)
    if not together and distributed.platform_of().name == "cpu":
        together = 1
    store, resources, done = Records(protocol.folder), Resources(protocol, together), 0
    provenance.code_version()  # cached now, in case a loaded file is edited later
    if note := provenance.describe_old(store.read()):
        log.info("%s", note)
    limit = limit or sys.maxsize
    while done < limit:
        records = provenance.checked_records(protocol, store)
        spent = hours(records)
        if protocol.budget_hours and spent >= protocol.budget_hours:
            log.info(
                "the budget of %g hours is spent (%.1f): no further run starts",
                protocol.budget_hours,
                spent,
            )
            break
        left = [run for run in pending(protocol, records) if not methods or run.cell.method in methods]
        if not left:
            which = f"of {', '.join(methods)} " if methods else ""
            log.info(
                "%s: all runs %sare done; the study has %d records", protocol.folder, which, len(records)
            )
            break
        finished = _do_some(protocol, store, resources, left, limit - done)
        if not finished:
            # Other processes do the remaining runs, whose results may add further runs.
            time.sleep(_WAIT_SECONDS)
        done += finished
    return done


def _do_some(protocol: Protocol, store: Records, resources: Resources, left: list[Run], most: int) -> int:
    """Performs the first runs of ``left`` without a claim; returns their number.

    They are at most ``most`` runs of one cell and stage, which share a program and fit in memory.
    """
    with ExitStack() as claims:
        claimed: list[tuple[Run, Path]] = []
        for run in left:
            if claimed and (run.cell, run.stage) != (claimed[0][0].cell, claimed[0][0].stage):
                continue
            snapshot = claims.enter_context(store.claim(run.id))
            # Another process may have finished it meanwhile.
            if snapshot is not None and run.id not in provenance.checked_records(protocol, store):
                claimed.append((resources.placed(run), snapshot))
            if len(claimed) == min(most, resources.capacity(run)):
                break
        if not claimed:
            return 0
        records, commit = provenance.checked_records(protocol, store), None
        for run, _ in claimed:
            if run.stage == "test":
                commit = provenance.check_committed(protocol)
                store.list_test({"id": run.id, "protocol": protocol.digest})
            log.info("%s", run)
        began = time.perf_counter()
        runs, snapshots = zip(*claimed, strict=True)
        done = perform_all(runs, resources, snapshots, records)
        for record, (_, snapshot) in zip(done, claimed, strict=True):
            finished = exact_values(record | {"commit": commit})
            store.append(finished | {"digest": provenance.record_digest(finished)})
            snapshot.unlink(missing_ok=True)
            log.info("  %s in %.0f s", _outcome(finished), time.perf_counter() - began)
        return len(claimed)


def perform(
    run: Run, resources: Resources, snapshot: Path, records: Mapping[str, Record] | None = None
) -> Record:
    """Trains and measures a run, and returns its record; see `perform_all`."""
    (record,) = perform_all([run], resources, [snapshot], records)
    return record


def perform_all(
    runs: Sequence[Run],
    resources: Resources,
    snapshots: Sequence[Path],
    records: Mapping[str, Record] | None = None,
) -> list[Record]:
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
    began, compiled = time.perf_counter(), _compilations.count
    started = [RunInProgress(run, resources, path) for run, path in zip(runs, snapshots, strict=True)]
    described = [
        {"id": run.id, "stage": run.stage, **run.cell._asdict(), "seed": run.seed, **progress.identity}
        for run, progress in zip(runs, started, strict=True)
    ]
    provenance.check_records({**(records or {}), **{each["id"]: each for each in described}})
    fits = resources.fitting(runs[0])
    states = [started[0].train()] if fits is None else _trained_together(started, fits.slots(len(runs)))
    share = (time.perf_counter() - began) / len(runs)
    performed = []
    for progress, facts, state in zip(started, described, states, strict=True):
        began = time.perf_counter()
        record = _record(progress, facts, state)
        seconds = progress.seconds_before + share + time.perf_counter() - began
        performed.append(record | {"seconds": seconds, "compilations": _compilations.count - compiled})
    return performed


def _trained_together(started: Sequence[RunInProgress], slots: int) -> list[TrainState | None]:
    """Returns the trained state of each run of a program with ``slots``; None for diverged runs."""
    loops = [RunLoop(run.begin(), run.rows()) for run in started]
    starts = [loop.follower.result.state for loop in loops]
    assemblies = [
        replace(run.assembly, params=run.params, state=state)
        for run, state in zip(started, starts, strict=True)
    ]
    began = time.perf_counter()
    results = fit_all(SweepProgram(assemblies, slots=slots), loops)
    for progress in started:
        progress.training_seconds += (time.perf_counter() - began) / len(started)
    pairs = zip(loops, results, strict=True)
    return [None if loop.error is not None else result.state for loop, result in pairs]


def _record(progress: RunInProgress, described: Mapping[str, Any], state: TrainState | None) -> Record:
    """Measures the trained state of a run, and returns its record without times."""
    run = progress.run
    measured, losses = {}, [math.nan]
    if state is not None:
        measured = progress.measure(state)
        losses = [measured["validation"]["loss"], measured.get("test", {}).get("loss", 0.0)]
    diverged = not all(map(math.isfinite, losses))
    return {
        **described,
        "rate": run.rate,
        "multiple": run.multiple,
        "diverged": diverged,
        "validation": {"loss": None},
        **measured,
        "curve": progress.curve,
        "training": progress.training,
        "parameters": progress.parameters,
        "training_seconds": progress.training_seconds,
        "peak_bytes": peak_bytes(),
        "config": run.config_hash,
        "protocol": run.protocol.digest,
        "versions": versions(),
        "processor": processor.name(),
        "device": describe_device(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class _Compilations:
    """Counts the programs that XLA compiles in this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **more: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


_compilations = _Compilations()


def peak_bytes() -> int:
    """Returns the peak memory: of the fullest device if it has statistics, else of the process."""
    peaks = peak_memory()
    return peaks.get("peak_device_memory", peaks.get("peak_memory", 0))


def _outcome(record: Record) -> str:
    if record["diverged"]:
        return "diverged"
    text = f"validation loss {record['validation']['loss']:.4f}"
    if "test" in record:
        text += f", test loss {record['test']['loss']:.4f}"
    return text
