"""What a run puts together before its first step, whatever its model reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nalora_jax.data.pipeline import BatchIterator
from nalora_jax.method.step import TrainState
from nalora_jax.train.assembly import Assembly
from nalora_jax.weights.origin import Origin


class RunBase(Protocol):
    """A loaded model, as a run needs it."""

    @property
    def params(self) -> Any:
        """The frozen weights."""

    @property
    def source(self) -> str:
        """What its adapters call their base."""

    @property
    def fingerprint(self) -> str:
        """Digest of its description and weights."""

    @property
    def origin(self) -> Origin | None:
        """Where its weights come from, where they come from one file or folder."""


class TrainingRows(Protocol):
    """Training rows."""

    def batches(self) -> BatchIterator:
        """Batches without end."""

    def describe(self) -> dict[str, Any]:
        """Figures for the log."""


@dataclass(frozen=True)
class Pieces:
    """The parts of a run."""

    loaded: RunBase
    assembly: Assembly
    data: TrainingRows
    evaluator: Any  # of the examples that results are reported on; see `nalora_jax.evaluate.heldout.Evaluator`
    selector: Any  # of those that choose the checkpoint
    questions: Mapping[str, str]  # digests of the examples behind both
    # Writes the adapter of a state to a folder, compares what it wrote, and returns the folder.
    export: Callable[[Path, TrainState], Path]
    in_turns: bool | None = None  # whether a chat template writes the training texts
