"""The parts of a run before its first step, independent of the kind of data."""

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
    """A loaded base model of a run."""

    @property
    def params(self) -> Any:
        """Returns the frozen weights."""

    @property
    def source(self) -> str:
        """Returns the name of the base model that adapters record."""

    @property
    def fingerprint(self) -> str:
        """Returns the digest of its config and weights."""

    @property
    def origin(self) -> Origin | None:
        """Returns the origin of its weights, if they come from a single file or folder."""


class TrainingRows(Protocol):
    """Training data as packed sequences or images."""

    def batches(self) -> BatchIterator:
        """Returns an endless iterator of batches."""

    def describe(self) -> dict[str, Any]:
        """Returns figures for the log."""


@dataclass(frozen=True)
class Pieces:
    """The parts of a run."""

    loaded: RunBase
    assembly: Assembly
    data: TrainingRows
    evaluator: Any  # evaluates the reported examples; see `nalora_jax.evaluate.evaluator.Evaluator`
    selector: Any  # evaluates the examples that select the checkpoint
    questions: Mapping[str, str]  # digests of the examples of both
    # Writes the adapter of a state to a folder, verifies it by reloading, and returns the folder.
    export: Callable[[Path, TrainState], Path]
    in_turns: bool | None = None  # True if the training texts are formatted by a chat template


def assembly_of(pieces: Pieces | None) -> Assembly | None:
    """Returns the assembly of a run; None without pieces."""
    if pieces is None:
        return None
    return pieces.assembly
