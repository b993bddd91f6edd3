"""Model cards of adapters and merged models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_jax.assembly.mechanisms import first_step
from nalora_jax.assembly.start import exportable_adapter
from nalora_jax.evaluate.run_log import acting_steps
from nalora_jax.kinds.job import Job
from nalora_jax.mesh import processes
from nalora_jax.mesh.machine import describe_device, versions
from nalora_jax.method.step import TrainState
from nalora_jax.weights.card import base_card, write_card

if TYPE_CHECKING:
    pass


def write_run_card(
    folder: Path,
    job: Job,
    state: TrainState,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> None:
    """Writes README.md into the folder of a run's adapter, with settings and results.

    Args:
      folder: the adapter's.
      job: the run.
      state: the exported state.
      before, after: held-out metrics of the base and of the adapter.
    """
    assembly = job.assembly
    spec = assembly.spec
    # The exported adapter has other ranks than the trained one.
    if spec.adalora:
        spec = exportable_adapter(assembly, state.lora)[1]
    card = replace(
        base_card("adapter", job.config.model, job.loaded, spec),
        run=job.config,
        before=before,
        after=after,
        versions=versions(),
        device=describe_device(),
        acting=acting_steps(first_step(assembly.mechanisms), int(state.step)),
    )
    processes.on_first_process(lambda: write_card(folder, card))
