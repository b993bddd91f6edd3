"""The model card of a run's adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from nalora_jax.assembly.mechanisms import first_step
from nalora_jax.evaluate.run_log import acting_steps
from nalora_jax.mesh.machine import describe_device, versions
from nalora_jax.train.callbacks import Callback, Exported
from nalora_jax.weights.card import base_card, write_card
from nalora_jax.weights.embedding_files import copier_of


class CardWriter(Callback):
    """Writes README.md into the folder of a run's adapter, with settings and results."""

    required: ClassVar[bool] = True

    def on_export(self, exported: Exported) -> None:
        """Writes the card."""
        job = exported.job
        first = first_step(job.assembly.mechanisms)
        kind: Literal["adapter", "merged"] = "adapter"
        if job.config.tune:
            kind = "merged"
        card = base_card(kind, job.config.model, job.loaded, exported.spec)
        card = replace(
            card,
            run=job.config,
            before=exported.before,
            after=exported.after,
            versions=versions(),
            device=describe_device(),
            acting=acting_steps(first, exported.step),
            vectors=copier_of(exported.folder) is not None,
        )
        write_card(exported.folder, card)
