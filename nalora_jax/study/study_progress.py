"""A run of a study in progress: its state, its measures and the hooks of its training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nalora_jax.assembly.optimizers import make_schedule
from nalora_jax.assembly.schedule import Schedule
from nalora_jax.common import processor, trees
from nalora_jax.data.pipeline import BatchIterator
from nalora_jax.errors import TrainingDivergedError
from nalora_jax.evaluate.run_log import to_json
from nalora_jax.mesh import distributed, processes
from nalora_jax.mesh.machine import describe_device, peak_memory, versions
from nalora_jax.method import activations, statistics
from nalora_jax.method.step import TrainState
from nalora_jax.study.planned_runs import Run
from nalora_jax.study.provenance import code_version, rule_files
from nalora_jax.study.records import (
    StudyRecord,
    exact_values,
    read_snapshot,
    write_snapshot,
)
from nalora_jax.study.resources import Resources
from nalora_jax.train.loop import Follower, LoopEvaluation, run_steps

log = logging.getLogger(__name__)


# Whole-model numbers of a log step that records have.
_LOGGED = (
    "loss",
    "grad_norm",
    "misalignment",
    "misalignment_limit",
    "reward",
    "entropy",
    "divergence",
)


class RunInProgress:
    """A run in progress, and the hooks of its training loop.

    Args:
      run: on the mesh of `Resources.placed`.
      resources: models, data and programs of this process.
      snapshot: file with the state at its last evaluation.
    """

    def __init__(self, run: Run, resources: Resources, snapshot: Path) -> None:
        """Loads the run's model, data and items, without training."""
        self.run = run
        self.resources = resources
        self.snapshot = snapshot
        self.subject = resources.subject(run.config)
        self.assembly = resources.assembly(run)
        self.params = self.subject.params(run.config, self.assembly)
        self.data = self.subject.data(run.config)
        self.items = {"validation": resources.validation_items(run)}
        if run.stage == "test":
            self.items["test"] = resources.test_items(run)
            self.items |= resources.probe_items(run)
        self.identity = self._identity()
        # step and measures of the validation items
        self.curve: list[dict[str, float]] = []
        self.training: list[dict[str, float]] = []  # the loop's log steps
        self.seconds_before = 0.0
        self.training_seconds = 0.0
        self._began = time.perf_counter()

    @property
    def described(self) -> StudyRecord:
        """Returns what a record has before the run is trained."""
        run = self.run
        return {
            "id": run.id,
            "stage": run.stage,
            **run.cell._asdict(),
            "seed": run.seed,
            **self.identity,
        }

    def begin(self) -> Follower:
        """Returns the actions after each step, with the state to start from.

        It is the snapshot's state and step if there is one, or the initial state, in which case
        the base is measured.
        """
        state = self.resources.start(self.run, self.data)
        self.parameters = trees.count_elements(state.lora)
        state, self._start = self._resumed(state)
        if not self._start:
            measured = self.resources.measure_base(self.run, self.items["validation"])
            self.curve.append({"step": 0} | measured)
        config = self.run.config
        every = config.train.log_every, self.run.protocol.evaluate_every
        schedule = Schedule(config.steps, *every, save_every=0)
        rate = make_schedule(config.optimizer, config.steps)
        return Follower(self, schedule, rate, state, self._start, self.params)

    def rows(self) -> BatchIterator:
        """Returns the batches of the steps after `begin`."""
        batches: BatchIterator = self.data.batches()
        row = self._start * self.run.config.train.batch_size
        batches.set_state({"row": row, "data": self.data.fingerprint})
        return batches

    def train(self) -> TrainState | None:
        """Trains all steps, resuming from the snapshot if there is one.

        Returns:
          The final state, or None if the run diverged.
        """
        assembly = self.assembly
        params = self.assembly.view(self.params)
        step = self.subject.step(self.run.config, assembly, self.data)
        follower = self.begin()
        batches = self.rows()
        began = time.perf_counter()
        try:
            rows = distributed.global_batches(batches, assembly.mesh)
            return run_steps(step, params, follower.result.state, rows, follower).state
        except TrainingDivergedError:
            return None
        finally:
            batches.close()
            self.training_seconds += time.perf_counter() - began

    def record(self, state: TrainState | None) -> StudyRecord:
        """Measures the trained state, and returns the record without times.

        ``state`` is None if the run diverged, which also counts if a final loss is not finite.
        """
        run = self.run
        measured = {}
        diverged = True
        if state is not None:
            measured = self._measure_all(state)
            sets = measured.keys() & {"validation", "test"}
            losses = [measured[name]["loss"] for name in sets]
            diverged = not all(map(math.isfinite, losses))
        peaks = peak_memory()
        return {
            **self.described,
            "rate": run.rate,
            "multiple": run.multiple,
            "diverged": diverged,
            "validation": {"loss": None},
            **measured,
            "curve": self.curve,
            "training": self.training,
            "parameters": self.parameters,
            "training_seconds": self.training_seconds,
            "peak_bytes": peaks.get("peak_device_memory", peaks.get("peak_memory", 0)),
            "config": run.config_hash,
            "protocol": run.protocol.digest,
            "versions": versions(),
            "processor": processor.name(),
            "device": describe_device(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _measure_all(self, state: TrainState) -> dict[str, Any]:
        """Returns the final measures by set of items.

        For a test run they include the test items, and ``probes`` by name with the loss of the base
        (``before``).
        """
        final: dict[str, Any] = {}
        for name, items in self.items.items():
            if name == "validation":  # measured after the last step
                values = dict(self.curve[-1])
                del values["step"]
                final[name] = values | {"n": items.count}
            elif name == "test":
                values = self._measure(state.lora, name, whole=True)
                final[name] = values | {"n": items.count}
            else:
                before = self.resources.measure_base(self.run, items)["loss"]
                loss = self._measure(state.lora, name)["loss"]
                probe = {"loss": loss, "n": items.count, "before": before}
                final.setdefault("probes", {})[name] = probe
        return final

    # ------------------------------------------------------------ hooks of the loop

    def advance(self, step: int) -> None:
        """Shows no progress."""

    def asked_to_stop(self, step: int) -> bool:
        """Returns False: an interrupted run resumes from its last snapshot."""
        return False

    def log(self, step: int, record: Mapping[str, Any], state: TrainState) -> None:
        """Stores whole-model numbers of a log step, and layer means of per-layer numbers."""
        row = {"step": step}
        for name in _LOGGED:
            if record.get(name) is not None:
                row[name] = record[name]
        for name, values in record.get("layers", {}).items():
            if values.ndim == 1 and name not in ("misalignment", "limit"):
                row[f"mean_{name}"] = np.mean(values)
        self.training.append(to_json(row))

    def evaluate(self, step: int, state: TrainState) -> LoopEvaluation:
        """Measures the validation items."""
        values = self._measure(state.lora, "validation")
        self.curve.append({"step": step} | values)
        return LoopEvaluation(-values["loss"], values)

    def save(
        self, step: int, state: TrainState, measured: LoopEvaluation | None
    ) -> None:
        """Writes the snapshot."""
        notes = {
            "step": step,
            "curve": self.curve,
            "training": self.training,
            "seconds": self.seconds_before + time.perf_counter() - self._began,
            "identity": self.identity,
        }
        arrays = {}
        for path, leaf in trees.flatten(state).items():
            arrays[path] = np.asarray(processes.fetch(leaf))
        write_snapshot(self.snapshot, arrays, exact_values(notes))

    # ------------------------------------------------------------

    def _resumed(self, state: TrainState) -> tuple[TrainState, int]:
        """Returns the snapshot's state and step if it has this identity, or ``state`` and 0."""
        saved = read_snapshot(self.snapshot)
        if saved is None:
            return state, 0
        arrays, notes = saved
        changed = []
        for name, digest in self.identity.items():
            if notes["identity"].get(name) != digest:
                changed.append(name)
        if changed:
            message = "  its snapshot is of other %s: the run starts from scratch"
            log.info(message, ", ".join(changed))
            return state, 0

        def restore(path: str, leaf: jax.Array) -> jax.Array:
            return jax.device_put(arrays[path], leaf.sharding)

        state = trees.map_named(restore, state)
        self.curve = notes["curve"]
        self.training = notes["training"]
        self.seconds_before = notes["seconds"]
        log.info("  resumes at step %d", notes["step"])
        return state, int(notes["step"])

    def _measure(self, lora: Any, name: str, *, whole: bool = False) -> Any:
        """Returns the measures of adapters on the items ``name``; see `Language.measure`."""
        items = self.items[name]
        return self.subject.measure(
            items, self.assembly, self.params, lora, whole=whole
        )

    def _identity(self) -> dict[str, Any]:
        """Returns the digests of code, rule files, adapter, base, data and items.

        Records must agree in them (`nalora_jax.study.provenance`). The items have names such as
        "test" and "test choices".
        """
        config = self.run.config
        mechanisms = self.assembly.mechanisms
        gates = (mechanisms.activation, *dict(mechanisms.others).values())
        definitions: list[Any] = [
            type(mechanism) for _, mechanism in mechanisms.entries
        ]
        definitions += [
            statistics.get_statistic(name).values for name in mechanisms.statistics
        ]
        definitions += [activations.get_activation(name).gate for name in gates]
        item_digests = {}
        for name, items in self.items.items():
            for kind, digest in items.digests.items():
                item_digests[f"{name} {kind}".strip()] = digest
        identity = {"code": code_version()}
        if config.adapter:
            identity["adapter"] = config.adapter_sha256
        return identity | {
            "rules": rule_files(definitions),
            "base": self.subject.base_digest(config),
            "source": self.subject.source_digest(self.data),
            "data": self.data.fingerprint,
            "items": item_digests,
        }
