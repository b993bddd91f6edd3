"""Runs of a study, one after another, each through the training loop of ``nalora train``."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nalora_jax import distributed, trees
from nalora_jax.data.pipeline import BatchIterator
from nalora_jax.distributed.devices import memory_statistics
from nalora_jax.errors import NaloraError, TrainingDivergedError
from nalora_jax.method.step import TrainState
from nalora_jax.ops.dispatch import Platform, hooks_of
from nalora_jax.runs.metrics import to_json
from nalora_jax.study.identity import check_records, code_version, describe_old, record_digest
from nalora_jax.study.plan import Run, pending
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.provenance import check_committed, checked_records
from nalora_jax.study.records import Record, Records, plain
from nalora_jax.study.resources import Resources
from nalora_jax.study.snapshots import read_snapshot, write_snapshot
from nalora_jax.study.subject import Items, on_mesh
from nalora_jax.sweeps.loop import RunLoop, StatesMetrics, fit_all
from nalora_jax.sweeps.program import SweepProgram
from nalora_jax.train.compilation import use_compilation_cache
from nalora_jax.train.loop import Follower, LoopEvaluation, Schedule, fit
from nalora_jax.train.machine import describe_device, versions
from nalora_jax.train.optimizers import make_schedule

log = logging.getLogger(__name__)

_WAIT_SECONDS = 5.0  # until another process may have finished a run that this process waits for


def run_study(protocol: Protocol, *, limit: int = 0, methods: Sequence[str] = (), together: int = 0) -> int:
    """Performs runs until all are done, the budget is spent, or ``limit`` (0: none) were done here.

    Any number of processes may do this at once, on one machine or on several that share the folder's file system.

    Args:
      protocol: the study.
      limit: maximum number of runs.
      methods: methods whose runs are done; by default all. The result of a run does not depend on other runs.
      together: largest number of runs of a method that train in one program; 0: one on a CPU, and as many as
        memory allows elsewhere.

    Returns:
      The number of runs that this process did.

    Raises:
      NaloraError: data or a model is missing, settings do not fit the model, a method is not in the study, the
        protocol is not committed before a test, or records, protocol, base, data or rules changed since earlier runs.
    """
    for name in methods:
        if name not in protocol.methods:
            expected = f"methods of {protocol.path}: {', '.join(protocol.methods)}"
            raise NaloraError("--methods", expected=expected, found=name)
    if not together and distributed.platform_of().name == "cpu":
        together = 1
    store, resources, done = Records(protocol.folder), Resources(protocol, together), 0
    code_version()  # cached now, in case a loaded file is edited later
    if note := describe_old(store.read()):
        log.info("%s", note)
    while not limit or done < limit:
        records = checked_records(protocol, store)
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
        finished = _do_some(protocol, store, resources, left, limit - done if limit else len(left))
        if not finished:
            # Other processes do the remaining runs, whose results may add further runs.
            time.sleep(_WAIT_SECONDS)
        done += finished
    return done


def hours(records: Mapping[str, Record]) -> float:
    """Returns the total time of all runs in hours."""
    return sum(float(record["seconds"]) for record in records.values()) / 3600


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
            if snapshot is not None and run.id not in checked_records(
                protocol, store
            ):  # finished meanwhile
                claimed.append((resources.placed(run), snapshot))
            if len(claimed) == min(most, resources.capacity(run)):
                break
        if not claimed:
            return 0
        records, commit = checked_records(protocol, store), None
        for run, _ in claimed:
            if run.stage == "test":
                commit = check_committed(protocol)
                store.begin_test({"id": run.id, "protocol": protocol.digest})
            log.info("%s", run)
        began = time.perf_counter()
        runs, snapshots = zip(*claimed, strict=True)
        done = perform_all(runs, resources, snapshots, records)
        for record, (_, snapshot) in zip(done, claimed, strict=True):
            finished = plain(record | {"commit": commit})
            store.append(finished | {"digest": record_digest(finished)})
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
        (`nalora_jax.sweeps`).
      resources: models, data and programs of this process.
      snapshots: by run, file with the state at the last evaluation of an interrupted run; it is written at each
        evaluation.
      records: finished runs of the study, which the runs have to agree with in base, data, items and rules.

    Raises:
      NaloraError: they do not agree with them; the runs were not trained.
    """
    if runs[0].config.compute.compilation_cache:
        use_compilation_cache()
    began, compiled = time.perf_counter(), _compilations.count
    started = [_RunInProgress(run, resources, path) for run, path in zip(runs, snapshots, strict=True)]
    described = [
        {"id": run.id, "stage": run.stage, **run.cell._asdict(), "seed": run.seed, **progress.identity}
        for run, progress in zip(runs, started, strict=True)
    ]
    check_records({**(records or {}), **{each["id"]: each for each in described}})
    fits = resources.fitting(runs[0])
    states = [_trained(started[0])] if fits is None else _trained_together(started, fits.slots(len(runs)))
    share = (time.perf_counter() - began) / len(runs)
    performed = []
    for progress, facts, state in zip(started, described, states, strict=True):
        began = time.perf_counter()
        record = _record(progress, facts, state)
        seconds = progress.seconds_before + share + time.perf_counter() - began
        performed.append(record | {"seconds": seconds, "compilations": _compilations.count - compiled})
    return performed


def _trained(progress: _RunInProgress) -> TrainState | None:
    """Returns the trained state of a run; None if it diverged."""
    try:
        return progress.train()
    except TrainingDivergedError:
        return None


def _trained_together(started: Sequence[_RunInProgress], slots: int) -> list[TrainState | None]:
    """Returns the trained state of each run of a program with ``slots``; None for diverged runs."""
    loops, assemblies = [], []
    for progress in started:
        state, start = progress.begin()
        assemblies.append(replace(progress.prepared.assembly, params=progress.prepared.params, state=state))
        follower = Follower(
            progress, progress.schedule, progress.rate, state, start, progress.prepared.params
        )
        loops.append(RunLoop(follower, progress.rows(start), start=start, steps=progress.run.config.steps))
    began = time.perf_counter()
    results = fit_all(SweepProgram(assemblies, slots=slots), loops, StatesMetrics())
    for progress in started:
        progress.training_seconds += (time.perf_counter() - began) / len(started)
    pairs = zip(loops, results, strict=True)
    return [None if loop.error is not None else result.state for loop, result in pairs]


def _record(progress: _RunInProgress, described: Mapping[str, Any], state: TrainState | None) -> Record:
    """Measures the trained state of a run, and returns its record without times."""
    run = progress.run
    measured = {} if state is None else progress.measure(state)
    losses = (
        [measured["validation"]["loss"], measured.get("test", {}).get("loss", 0.0)]
        if measured
        else [math.nan]
    )
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
        **_environment(),
    }


def _environment() -> dict[str, Any]:
    """Returns the versions, the machine and the time of a record."""
    return {
        "versions": versions(),
        "processor": hooks_of(Platform("cpu")).processor_name(),
        "device": describe_device(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class _RunInProgress:
    """A run in progress, and the hooks of its training loop."""

    def __init__(self, run: Run, resources: Resources, snapshot: Path) -> None:
        self.run, self.resources, self.snapshot = run, resources, snapshot
        self.prepared, self.data = resources.prepared(run), resources.data(run)
        self.items = resources.validation_items(run)
        self.tested: dict[str, Items] = {}
        if run.stage == "test":
            self.tested = {"test": resources.test_items(run)} | resources.probe_items(run)
        self.identity = {
            "code": code_version(),
            **resources.identity(run, self.prepared, self.data),
            "items": _item_digests({"validation": self.items} | self.tested),
        }
        self.curve: list[dict[str, float]] = []  # step and measures of the validation items
        self.training: list[dict[str, float]] = []  # the loop's log steps
        self.seconds_before = self.training_seconds = 0.0
        self._began = time.perf_counter()

    @property
    def schedule(self) -> Schedule:
        """The intervals of the loop's actions."""
        config = self.run.config
        return Schedule(
            config.steps, config.train.log_every, self.run.protocol.evaluate_every, save_every=0
        )

    @property
    def rate(self) -> Callable[[int], Any]:
        """The learning rate by step."""
        return make_schedule(self.run.config.optimizer, self.run.config.steps)

    def begin(self) -> tuple[TrainState, int]:
        """Returns the state to train from and its step, from the snapshot if there is one."""
        state = self.resources.start(self.run, self.prepared, self.data)
        self.parameters = trees.count(state.lora)
        state, start = self._resumed(state)
        if not start:
            self.curve.append({"step": 0} | self._base(self.items))
        return state, start

    def rows(self, start: int) -> BatchIterator:
        """Returns the batches after ``start`` steps."""
        batches = self.data.batches()
        batches.set_state({"row": start * self.run.config.train.batch_size, "data": self.data.fingerprint})
        return batches

    def train(self) -> TrainState:
        """Trains all steps, resuming from the snapshot if there is one."""
        assembly, params = self.prepared.assembly, self.prepared.step_params
        state, start = self.begin()
        batches = self.rows(start)
        began = time.perf_counter()
        try:
            rows = on_mesh(batches, assembly)
            result = fit(assembly.step, params, state, rows, self, self.schedule, self.rate, start=start)
        finally:
            batches.close()
            self.training_seconds += time.perf_counter() - began
        return result.state

    def measure(self, state: TrainState) -> dict[str, Any]:
        """Returns the final measures, for a test run including test items and probes."""
        validation = {name: value for name, value in self.curve[-1].items() if name != "step"}
        final: dict[str, Any] = {"validation": validation | {"n": len(self.items)}}
        probes: dict[str, Any] = {}
        for name, items in self.tested.items():
            values: dict[str, Any] = self._measured(state.lora, items, whole=name == "test") | {
                "n": len(items)
            }
            if name == "test":
                final["test"] = values
            else:
                probes[name] = {
                    "loss": values["loss"],
                    "n": len(items),
                    "before": self._base(items)["loss"],
                }
        return final | ({"probes": probes} if probes else {})

    # ------------------------------------------------------------ hooks of the loop

    def advance(self, step: int) -> None:
        """Shows no progress."""

    def asked_to_stop(self, step: int) -> bool:
        """Returns False: an interrupted run resumes from its last snapshot."""
        del step
        return False

    def log(self, step: int, record: Mapping[str, Any], state: TrainState) -> None:
        """Stores whole-model numbers of a log step, and layer means of per-layer numbers."""
        del state
        names = ("loss", "grad_norm", "misalignment", "misalignment_limit")
        row = {"step": step} | {name: record[name] for name in names if record.get(name) is not None}
        layers = record.get("layers", {}).items()
        layers = {
            f"mean_{n}": np.mean(v) for n, v in layers if v.ndim == 1 and n not in ("misalignment", "limit")
        }
        self.training.append(to_json(row | layers))

    def evaluate(self, step: int, state: TrainState) -> LoopEvaluation:
        """Measures the validation items."""
        values = self._measured(state.lora, self.items, whole=False)
        self.curve.append({"step": step} | values)
        return LoopEvaluation(-values["loss"], values)

    def save(self, step: int, state: TrainState, measured: LoopEvaluation | None) -> None:
        """Writes the snapshot."""
        del measured
        seconds = self.seconds_before + time.perf_counter() - self._began
        notes = {"step": step, "curve": self.curve, "training": self.training, "seconds": seconds}
        arrays = {path: np.asarray(distributed.fetch(leaf)) for path, leaf in trees.flatten(state).items()}
        write_snapshot(self.snapshot, arrays, plain(notes | {"identity": self.identity}))

    # ------------------------------------------------------------

    def _resumed(self, state: TrainState) -> tuple[TrainState, int]:
        """Returns the snapshot's state and step if it has this identity, or ``state`` and 0."""
        saved = read_snapshot(self.snapshot)
        if saved is None:
            return state, 0
        notes = saved.notes
        changed = [name for name, digest in self.identity.items() if notes["identity"].get(name) != digest]
        if changed:
            log.info("  its snapshot is of other %s: the run starts from scratch", ", ".join(changed))
            return state, 0
        state = trees.map_named(lambda path, leaf: jax.device_put(saved.arrays[path], leaf.sharding), state)
        self.curve, self.training, self.seconds_before = notes["curve"], notes["training"], notes["seconds"]
        log.info("  resumes at step %d", notes["step"])
        return state, int(notes["step"])

    def _base(self, items: Items) -> dict[str, float]:
        return self.resources.measure_base(self.run, self.prepared, items)

    def _measured(self, lora: Any, items: Items, *, whole: bool) -> dict[str, float]:
        return self.resources.measure(self.run, self.prepared, lora, items, whole=whole)


def _item_digests(items: Mapping[str, Items]) -> dict[str, str]:
    """Returns the digests of all items, e.g. under "test" and "test choices"."""
    return {
        f"{name} {kind}".strip(): digest
        for name, each in items.items()
        for kind, digest in each.digests.items()
    }


class _Compilations:
    """Counts the programs that XLA compiles in this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **more: Any) -> None:
        del duration_secs, more
        self.count += event == "/jax/core/compile/backend_compile_duration"


_compilations = _Compilations()


def peak_bytes() -> int:
    """Returns the peak memory so far: of the first device if it has statistics, else of the process."""
    statistics = memory_statistics(jax.local_devices()[0])
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _outcome(record: Record) -> str:
    if record["diverged"]:
        return "diverged"
    text = f"validation loss {record['validation']['loss']:.4f}"
    return text + (f", test loss {record['test']['loss']:.4f}" if "test" in record else "")
