"""Running a study: the wanted runs one after another, each through the training loop that ``nalora train`` has."""

from __future__ import annotations

import json
import logging
import math
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nalora_jax import distributed, trees
from nalora_jax.errors import NaloraError, TrainingDivergedError
from nalora_jax.method.step import TrainState
from nalora_jax.ops.dispatch import Platform, hooks_of
from nalora_jax.study.laboratory import Laboratory, code_version
from nalora_jax.study.plan import Run, pending
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import Record, Records
from nalora_jax.study.subject import Items, on_mesh
from nalora_jax.train.compilation import use_compilation_cache
from nalora_jax.train.loop import LoopEvaluation, Schedule, fit
from nalora_jax.train.machine import describe_device, versions
from nalora_jax.train.metrics import to_json
from nalora_jax.train.optimizers import make_schedule

log = logging.getLogger(__name__)

_WAIT_SECONDS = 5.0  # until another process may have finished a run that this one waits for


def run_study(protocol: Protocol, *, limit: int = 0, methods: Sequence[str] = ()) -> int:
    """Does runs until none is left, the budget is spent, or ``limit`` (0: none) were done here; returns their number.

    Any number of processes may do this at once, on one machine or on several that share the folder's file system.

    Args:
      protocol: the study.
      limit: runs at most.
      methods: those whose runs are done, all where there are none. What a run gives does not depend on others.

    Raises:
      NaloraError: the data or a model is not there, settings do not fit the model, a test would be read under a
        protocol that is not committed, or under another one than tests before it, or a method is not the study's.
    """
    for name in methods:
        if name not in protocol.methods:
            raise NaloraError(
                "--methods", expected=f"methods of {protocol.path}: {', '.join(protocol.methods)}", found=name
            )
    records, laboratory, done = Records(protocol.folder), Laboratory(protocol), 0
    code_version()  # before anybody edits a file that is loaded already
    while not limit or done < limit:
        finished = records.read()
        spent = hours(finished)
        if protocol.budget_hours and spent >= protocol.budget_hours:
            log.info("the budget of %g hours is spent (%.1f): no further run is begun", protocol.budget_hours, spent)
            break
        left = [run for run in pending(protocol, finished) if not methods or run.cell.method in methods]
        if not left:
            which = f"of {', '.join(methods)} " if methods else ""
            log.info("%s: all runs %sare done; the study has %d records", protocol.folder, which, len(finished))
            break
        if not _do_one(protocol, records, laboratory, left):
            time.sleep(_WAIT_SECONDS)  # others do what is left, and what follows from it may be for this process
            continue
        done += 1
    return done


def hours(records: Mapping[str, Record]) -> float:
    """What all runs took together."""
    return sum(float(record["seconds"]) for record in records.values()) / 3600


def _do_one(protocol: Protocol, records: Records, laboratory: Laboratory, left: list[Run]) -> bool:
    """Does the first of ``left`` that nobody else is doing; false if there is none."""
    for run in left:
        with records.claim(run.id) as snapshot:
            if snapshot is None or run.id in records.read():  # the second: finished since ``left`` was made
                continue
            commit = None
            if run.stage == "test":
                commit = check_committed(protocol)
                check_same_protocol(protocol, records.read())
            began = time.perf_counter()
            log.info("%s", run)
            record = perform(run, laboratory, snapshot) | {"commit": commit}
            records.append(record)
            snapshot.unlink(missing_ok=True)
            log.info("  %s in %.0f s", _outcome(record), time.perf_counter() - began)
            return True
    return False


def perform(run: Run, laboratory: Laboratory, snapshot: Path) -> Record:
    """Trains and measures; the result is the run's record.

    Args:
      run: what to do.
      laboratory: of this process.
      snapshot: file that holds the state at the last evaluation, where one was interrupted; it is written at each.
    """
    if run.config.compute.compilation_cache:
        use_compilation_cache()
    began, compiled = time.perf_counter(), _compilations.count
    bench = _Bench(run, laboratory, snapshot)
    try:
        state = bench.train()
        measured = bench.measure(state)
        losses = [measured["validation"]["loss"], measured.get("test", {}).get("loss", 0.0)]
        diverged = not all(map(math.isfinite, losses))
    except TrainingDivergedError:
        measured, diverged = {}, True
    seconds = bench.seconds_before + time.perf_counter() - began
    return {
        "id": run.id,
        "stage": run.stage,
        **run.cell._asdict(),
        "rate": run.rate,
        "multiple": run.multiple,
        "seed": run.seed,
        "diverged": diverged,
        "validation": {"loss": None},
        **measured,
        "curve": bench.curve,
        "training": bench.training,
        "parameters": bench.parameters,
        "items": bench.digests,
        "data": bench.data.fingerprint,
        "seconds": seconds,
        "training_seconds": bench.training_seconds,
        "peak_bytes": peak_bytes(),
        "compilations": _compilations.count - compiled,
        "config": run.config_hash,
        "protocol": run.protocol.digest,
        "code": code_version(),
        "versions": versions(),
        "processor": hooks_of(Platform("cpu")).processor_name(),
        "device": describe_device(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class _Bench:
    """One run under way; also the hooks of its loop."""

    def __init__(self, run: Run, laboratory: Laboratory, snapshot: Path) -> None:
        self.run, self.laboratory, self.snapshot = run, laboratory, snapshot
        self.prepared, self.data = laboratory.prepared(run), laboratory.data(run)
        self.items = laboratory.validation_items(run)
        self.tested: dict[str, Items] = {}
        if run.stage == "test":
            self.tested = {"test": laboratory.test_items(run)} | laboratory.probe_items(run)
        self.digests = {"validation": self.items.digest} | {name: one.digest for name, one in self.tested.items()}
        self.curve: list[dict[str, float]] = []  # step and measures of the validation items
        self.training: list[dict[str, float]] = []  # the loop's log steps
        self.seconds_before = self.training_seconds = 0.0
        self._began = time.perf_counter()

    def train(self) -> TrainState:
        """All steps, from the snapshot where there is one."""
        config, assembly = self.run.config, self.prepared.assembly
        state = self.laboratory.start(self.run, self.prepared, self.data)
        self.parameters = trees.count(state.lora)
        state, start = self._resumed(state)
        if not start:
            self.curve.append({"step": 0} | self._base(self.items))
        batches = self.data.batches()
        batches.set_state({"row": start * config.train.batch_size, "data": self.data.fingerprint})
        every = self.run.protocol.evaluate_every
        schedule = Schedule(config.steps, config.train.log_every, every, save_every=0)
        rate = make_schedule(config.optimizer, config.steps)
        began = time.perf_counter()
        try:
            rows = on_mesh(batches, assembly)
            result = fit(assembly.step, self.prepared.step_params, state, rows, self, schedule, rate, start=start)
        finally:
            batches.close()
            self.training_seconds += time.perf_counter() - began
        return result.state

    def measure(self, state: TrainState) -> dict[str, Any]:
        """The final numbers: of a test run also those on the test items and on the probes."""
        validation = {name: value for name, value in self.curve[-1].items() if name != "step"}
        final: dict[str, Any] = {"validation": validation | {"n": len(self.items)}}
        probes: dict[str, Any] = {}
        for name, items in self.tested.items():
            values: dict[str, Any] = self._measured(state.lora, items, whole=name == "test") | {"n": len(items)}
            if name == "test":
                final["test"] = values
            else:
                probes[name] = {"loss": values["loss"], "n": len(items), "before": self._base(items)["loss"]}
        return final | ({"probes": probes} if probes else {})

    # ------------------------------------------------------------ hooks of the loop

    def advance(self, step: int) -> None:
        """Nothing to show."""

    def asked_to_stop(self, step: int) -> bool:
        """Never: an interrupted run is done again from its last snapshot."""
        del step
        return False

    def log(self, step: int, record: Mapping[str, Any], state: TrainState) -> None:
        """Keep the whole-model numbers of a log step, and the mean over layers of what each layer says."""
        del state
        names = ("loss", "grad_norm", "misalignment", "misalignment_limit")
        row = {"step": step} | {name: record[name] for name in names if record.get(name) is not None}
        layers = record.get("layers", {}).items()
        layers = {f"mean_{n}": np.mean(v) for n, v in layers if v.ndim == 1 and n not in ("misalignment", "limit")}
        self.training.append(to_json(row | layers))

    def evaluate(self, step: int, state: TrainState) -> LoopEvaluation:
        """The measures of the validation items."""
        values = self._measured(state.lora, self.items, whole=False)
        self.curve.append({"step": step} | values)
        return LoopEvaluation(-values["loss"], values)

    def save(self, step: int, state: TrainState, measured: LoopEvaluation | None) -> None:
        """Write the snapshot, whole or not at all."""
        del measured
        seconds = self.seconds_before + time.perf_counter() - self._began
        notes = {"step": step, "curve": self.curve, "training": self.training, "seconds": seconds}
        arrays: dict[str, Any] = {path: distributed.fetch(leaf) for path, leaf in trees.flatten(state).items()}
        arrays["notes"] = np.array(json.dumps(to_json(notes) | {"code": code_version()}))
        scratch = self.snapshot.with_suffix(".new")
        with scratch.open("wb") as file:
            np.savez(file, **arrays)
        scratch.replace(self.snapshot)

    # ------------------------------------------------------------

    def _resumed(self, state: TrainState) -> tuple[TrainState, int]:
        """The state of the snapshot and its step, or ``state`` and 0 where there is none of this very code."""
        if not self.snapshot.exists():
            return state, 0
        with np.load(self.snapshot) as saved:
            notes = json.loads(str(saved["notes"]))
            if notes["code"] != code_version():
                log.info("  its snapshot is of other code: begun anew")
                return state, 0
            state = trees.map_named(lambda path, leaf: jax.device_put(saved[path], leaf.sharding), state)
        self.curve, self.training, self.seconds_before = notes["curve"], notes["training"], notes["seconds"]
        log.info("  taken up at step %d", notes["step"])
        return state, int(notes["step"])

    def _base(self, items: Items) -> dict[str, float]:
        return self.laboratory.measure_base(self.run, self.prepared, items)

    def _measured(self, lora: Any, items: Items, *, whole: bool) -> dict[str, float]:
        return self.laboratory.measure(self.run, self.prepared, lora, items, whole=whole)


class _Compilations:
    """Counts the programs that XLA compiled in this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **more: Any) -> None:
        del duration_secs, more
        self.count += event == "/jax/core/compile/backend_compile_duration"


_compilations = _Compilations()


def peak_bytes() -> int:
    """Most memory that the process had so far: of the first device where it says so, else of the process."""
    found = jax.local_devices()[0].memory_stats()
    if found and "peak_bytes_in_use" in found:
        return int(found["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_committed(protocol: Protocol) -> str | None:
    """The commit that holds the protocol as it is; None where its folder is in no git repository.

    Raises:
      NaloraError: it is in a repository, and not committed as it is: nobody could tell whether it was written after the
        result was seen.
    """
    folder, name = protocol.folder.resolve(), protocol.path.name

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)

    try:
        if git("rev-parse", "--is-inside-work-tree").stdout.strip() != "true":
            return None
    except FileNotFoundError:  # no git on this machine
        return None
    known = git("ls-files", "--error-unmatch", name).returncode == 0
    if not known or git("status", "--porcelain", "--", name).stdout.strip():
        raise NaloraError(
            str(protocol.path),
            expected="a committed protocol before test items are read",
            found="changes that are not committed" if known else "a file that git does not know",
            remedy="commit it; the tuning runs are kept",
        )
    return git("log", "-1", "--format=%H", "--", name).stdout.strip()


def check_same_protocol(protocol: Protocol, records: Mapping[str, Record]) -> None:
    """Refuses further tests under another protocol than the tests before.

    Raises:
      NaloraError: the protocol was changed after test items had been read.
    """
    others = {record["protocol"] for record in records.values() if record["stage"] == "test"} - {protocol.digest}
    if others:
        raise NaloraError(
            str(protocol.path),
            expected="the protocol that the tests so far were made under",
            found="another one",
            remedy="restore it, or begin a new study in a folder of its own",
        )


def _outcome(record: Record) -> str:
    if record["diverged"]:
        return "diverged"
    text = f"validation loss {record['validation']['loss']:.4f}"
    return text + (f", test loss {record['test']['loss']:.4f}" if "test" in record else "")
