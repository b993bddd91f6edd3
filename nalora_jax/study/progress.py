"""A run of a study in progress: its state, its measures and the hooks of its training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nalora_jax.common import trees
from nalora_jax.data.pipeline import BatchIterator
from nalora_jax.errors import TrainingDivergedError
from nalora_jax.evaluate.run_log import to_json
from nalora_jax.layout import distributed
from nalora_jax.method import activations, statistics
from nalora_jax.method.step import TrainState
from nalora_jax.study.plan import Run
from nalora_jax.study.provenance import code_version, rule_files
from nalora_jax.study.records import exact_values, read_snapshot, write_snapshot
from nalora_jax.study.resources import Resources
from nalora_jax.study.subject import Items, StudyRows
from nalora_jax.train.loop import Follower, LoopEvaluation, Schedule, run_steps
from nalora_jax.train.optimizers import make_schedule

log = logging.getLogger(__name__)


class RunInProgress:
    """A run in progress, and the hooks of its training loop."""

    def __init__(self, run: Run, resources: Resources, snapshot: Path) -> None:
        self.run, self.resources, self.snapshot = run, resources, snapshot
        self.subject, self.assembly = resources.subject(run.config), resources.assembly(run)
        self.params = self.subject.params(run.config, self.assembly)
        self.data: StudyRows = self.subject.data(run.config)
        self.items = resources.validation_items(run)
        self.tested: dict[str, Items] = {}
        if run.stage == "test":
            self.tested = {"test": resources.test_items(run)} | resources.probe_items(run)
        self.identity = self._identity()
        self.curve: list[dict[str, float]] = []  # step and measures of the validation items
        self.training: list[dict[str, float]] = []  # the loop's log steps
        self.seconds_before = self.training_seconds = 0.0
        self._began = time.perf_counter()

    def begin(self) -> Follower:
        """Returns the actions after each step, from the snapshot's state and step if there is one."""
        state = self.resources.start(self.run, self.data)
        self.parameters = trees.count_elements(state.lora)
        state, start = self._resumed(state)
        if not start:
            self.curve.append({"step": 0} | self.resources.measure_base(self.run, self.items))
        config = self.run.config
        every = config.train.log_every, self.run.protocol.evaluate_every
        schedule = Schedule(config.steps, *every, save_every=0)
        rate = make_schedule(config.optimizer, config.steps)
        self._start = start
        return Follower(self, schedule, rate, state, start, self.params)

    def rows(self) -> BatchIterator:
        """Returns the batches of the steps after `begin`."""
        batches, row = self.data.batches(), self._start * self.run.config.train.batch_size
        batches.set_state({"row": row, "data": self.data.fingerprint})
        return batches

    def train(self) -> TrainState | None:
        """Trains all steps, resuming from the snapshot if there is one; returns None if the run diverged."""
        assembly, params = self.assembly, self.assembly.view(self.params)
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

    def measure(self, state: TrainState) -> dict[str, Any]:
        """Returns the final measures, for a test run including test items and probes."""
        validation = {name: value for name, value in self.curve[-1].items() if name != "step"}
        final: dict[str, Any] = {"validation": validation | {"n": self.items.count}}
        for name, items in self.tested.items():
            values = self._measured(state.lora, items, whole=name == "test") | {"n": items.count}
            if name == "test":
                final["test"] = values
            else:
                before = self.resources.measure_base(self.run, items)["loss"]
                probe = {"loss": values["loss"], "n": values["n"], "before": before}
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
        names = (
            "loss",
            "grad_norm",
            "misalignment",
            "misalignment_limit",
            "reward",
            "entropy",
            "divergence",
        )
        row = {"step": step} | {name: record[name] for name in names if record.get(name) is not None}
        layers = record.get("layers", {}).items()
        layers = {
            f"mean_{n}": np.mean(v) for n, v in layers if v.ndim == 1 and n not in ("misalignment", "limit")
        }
        self.training.append(to_json(row | layers))

    def evaluate(self, step: int, state: TrainState) -> LoopEvaluation:
        """Measures the validation items."""
        values = self._measured(state.lora, self.items)
        self.curve.append({"step": step} | values)
        return LoopEvaluation(-values["loss"], values)

    def save(self, step: int, state: TrainState, measured: LoopEvaluation | None) -> None:
        """Writes the snapshot."""
        seconds = self.seconds_before + time.perf_counter() - self._began
        notes = {"step": step, "curve": self.curve, "training": self.training, "seconds": seconds}
        leaves = trees.flatten(state).items()
        arrays = {path: np.asarray(distributed.fetch(leaf)) for path, leaf in leaves}
        write_snapshot(self.snapshot, arrays, exact_values(notes | {"identity": self.identity}))

    # ------------------------------------------------------------

    def _resumed(self, state: TrainState) -> tuple[TrainState, int]:
        """Returns the snapshot's state and step if it has this identity, or ``state`` and 0."""
        saved = read_snapshot(self.snapshot)
        if saved is None:
            return state, 0
        notes = saved.notes
        before = notes["identity"]
        changed = [name for name, digest in self.identity.items() if before.get(name) != digest]
        if changed:
            names = ", ".join(changed)
            log.info("  its snapshot is of other %s: the run starts from scratch", names)
            return state, 0
        state = trees.map_named(lambda path, leaf: jax.device_put(saved.arrays[path], leaf.sharding), state)
        self.curve, self.training, self.seconds_before = notes["curve"], notes["training"], notes["seconds"]
        log.info("  resumes at step %d", notes["step"])
        return state, int(notes["step"])

    def _measured(self, lora: Any, items: Items, *, whole: bool = False) -> dict[str, float]:
        return self.subject.measure(items, self.assembly, self.params, lora, whole=whole)

    def _identity(self) -> dict[str, Any]:
        """Returns the digests of code, rule files, adapter, base, data and items; see `study.provenance`.

        The items have names such as "test" and "test choices".
        """
        config, mechanisms = self.run.config, self.assembly.mechanisms
        definitions = [
            *(type(mechanism) for _, mechanism in mechanisms.entries),
            *(statistics.get(name).values for name in mechanisms.statistics),
            *(
                activations.get(name).gate
                for name in (mechanisms.activation, *dict(mechanisms.others).values())
            ),
        ]
        measured = {"validation": self.items} | self.tested
        return {
            "code": code_version(),
            **({"adapter": config.adapter_sha256} if config.adapter else {}),
            "rules": rule_files(definitions),
            "base": self.subject.base_digest(config),
            "source": self.subject.source_digest(self.data),
            "data": self.data.fingerprint,
            "items": {
                f"{name} {kind}".strip(): digest
                for name, items in measured.items()
                for kind, digest in items.digests.items()
            },
        }
