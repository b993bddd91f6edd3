"""Model cards of adapters and merged models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nalora_jax.evaluate.run_log import acting_steps
from nalora_jax.layout import distributed
from nalora_jax.method.step import TrainState
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.train.job import Job, original
from nalora_jax.train.machine import describe_device, versions
from nalora_jax.train.mechanisms import first_step
from nalora_jax.train.start import exportable_adapter
from nalora_jax.weights.card import Card, write_card
from nalora_jax.weights.hub import alias_of
from nalora_jax.weights.model_files import LoadedModel, rope_of

if TYPE_CHECKING:
    from nalora_jax.weights.dual import LoadedDual


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
    distributed.on_first_process(lambda: write_card(folder, card))


def base_card(
    kind: Literal["adapter", "merged"],
    model: str,
    loaded: LoadedModel | LoadedDual,
    spec: AdapterSpec,
) -> Card:
    """Returns a card without settings and results of a run; ``model`` is the name of the base."""
    alias = alias_of(model)
    licence = alias.package.licence if alias else ""
    written = Card(kind, original(loaded), spec, license=licence, origin=loaded.origin)
    if isinstance(loaded, LoadedModel):
        return replace(written, resized=loaded.resized, rope=rope_of(loaded))
    return written
