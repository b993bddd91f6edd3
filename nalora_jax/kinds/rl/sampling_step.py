"""A training step on samples of the model, for rewards and for distillation.

A step has two programs: samples of the current adapter, by this library's generator or by servers,
and the update. Samples are a pure function of seed, step, weights and adapter, so that a resumed
run draws the same ones.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nalora_jax.assembly.program import Assembly
from nalora_jax.common.files import write_atomically
from nalora_jax.config import RunConfig
from nalora_jax.data.prompts import PromptData, PromptRecord
from nalora_jax.evaluate.run_log import ROLLOUTS
from nalora_jax.kinds.rl.environments import Arena
from nalora_jax.kinds.rl.rollout import Sampler, Samples
from nalora_jax.kinds.rl.servers.pool import ServerPool
from nalora_jax.mesh import distributed, processes
from nalora_jax.method.step import Batch, TrainState
from nalora_jax.weights.model_files import LoadedModel

log = logging.getLogger(__name__)

_SHOWN = 4  # prompts of a step in the run's file of samples


class SamplingStep:
    """The common part of training steps ``(params, state, batch of prompts) -> (state, metrics)``
    that draw samples first.

    Args:
      config: the run's settings.
      loaded: the base model.
      assembly: with the compiled update.
      data: the prompts of a batch.
      folder: receives complete groups and some samples; None: they are not stored.
      servers: that draw the samples; None: the generator of this library does.
    """

    _data: PromptData

    def __init__(
        self,
        config: RunConfig,
        loaded: LoadedModel,
        assembly: Assembly,
        data: PromptData,
        folder: Path | None,
        servers: ServerPool | None = None,
    ) -> None:
        rl = config.rl
        self._update = assembly.step
        self._mesh = assembly.mesh
        self._config = config
        self._data = data
        self._file = folder and folder / ROLLOUTS
        self._sampler = Sampler(
            rl,
            assembly.eval_model,
            assembly.params,
            loaded.tokenizer,
            assembly.mesh,
            prompts=data.batch_size // rl.samples,
            seed=config.seed,
            longest=data.longest,
            folder=folder and folder / "rollouts",
            servers=servers,
            arena=Arena.of(rl, loaded.tokenizer) if rl.environment else None,
        )
        self._servers = servers
        self._checkpoints = folder and folder / "checkpoints"
        self._begun = False

    def _resume(self, number: int) -> None:
        """Drops shown samples after the restored checkpoint, which are drawn again, at the first
        step of a process; ``number`` is the count of steps done."""
        if self._begun:
            return
        self._begun = True
        if self._file is not None:
            forget_samples(self._file, number)

    def _prompts(self, batch: Batch) -> tuple[np.ndarray, list[PromptRecord]]:
        """Returns the indices and the records of a batch's prompts, one for each group."""
        # [accumulate, rows] prompt indices, each repeated for its samples -> one index per prompt.
        every = self._config.rl.samples
        places = np.asarray(processes.fetch(batch["prompt"])).ravel()[::every]
        return places, self._data.prompts(places.tolist())

    def _updated(
        self, params: Any, state: TrainState, rows: Mapping[str, np.ndarray]
    ) -> tuple[TrainState, dict[str, Any], float]:
        """Returns the state and the metrics of an update, and its seconds.

        ``rows`` are the arrays ``[accumulate, rows of this process, ...]``.
        """
        started = time.perf_counter()
        arrays = distributed.make_global_batch(rows, self._mesh, rows_axis=1)
        state, metrics = self._update(params, state, arrays)
        # So that the update's time is measured, not its dispatch.
        jax.block_until_ready(metrics["loss"])
        return state, metrics, time.perf_counter() - started

    def _forget_served(self, servers: ServerPool, ahead: int) -> None:
        """Drops stored samples that no checkpoint needs; ``ahead`` is the number of steps by which
        samples may be older than their update."""
        if self._checkpoints is not None and self._checkpoints.is_dir():
            saved = [path.name for path in self._checkpoints.iterdir()]
            steps = [int(name) for name in saved if name.isdecimal()]
            servers.forget_before(min(steps, default=0) - ahead)

    def _rows(self, whole: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns this process's rows ``[accumulate, rows, ...]``."""
        accumulate = self._data.accumulate
        rows = list(self._data.rows)
        return {
            # [rows of all processes, ...] -> [accumulate, rows of all, ...] -> rows of this process
            n: v.reshape(accumulate, -1, *v.shape[1:])[:, rows]
            for n, v in whole.items()
        }

    def _write(
        self,
        step: int,
        prompts: Sequence[PromptRecord],
        show: Callable[[int], dict[str, Any]],
    ) -> None:
        """Appends some groups to the run's file, a line each.

        Args:
          step: that the samples train.
          prompts: one of each group.
          show: returns a sample for JSON, of its row.
        """
        if jax.process_index() or self._file is None:
            return
        size = self._config.rl.samples
        with self._file.open("a", encoding="utf-8") as file:
            for place, prompt in enumerate(prompts[:_SHOWN]):
                group = [show(row) for row in range(place * size, (place + 1) * size)]
                line = {"step": step, "prompt": prompt.text, "samples": group}
                file.write(json.dumps(line) + "\n")

    def _ids(self, samples: Samples, row: int) -> list[int]:
        """Returns the token ids of a sample; after its end they are negative (`NO_TOKEN`)."""
        tokens = samples.tokens[row]
        ids: list[int] = tokens[tokens >= 0].tolist()
        return ids


def forget_samples(file: Path, step: int) -> None:
    """Removes the samples of later steps, which a resumed run repeats, and unreadable lines.

    The samples are only displayed, so damage does not end the run.
    """
    if jax.process_index() or not file.exists():
        return
    lines = file.read_bytes().split(b"\n")
    # After the last line's end: empty, unless a kill cut a line off.
    cut_off = lines.pop()
    remaining = []
    damaged = 0
    for line in lines:
        try:
            record = json.loads(line)
            is_restored = int(record["step"]) <= step
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            damaged += 1
            continue
        if is_restored:
            remaining.append(line + b"\n")
    if damaged:
        log.warning("%s: dropped %d lines that cannot be read", file, damaged)
    if cut_off or len(remaining) < len(lines):
        write_atomically(file, b"".join(remaining))
