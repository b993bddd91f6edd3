"""What a run is made of: its inputs, before weights are read, and the job, ready to start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jax.sharding import Mesh

from nalora_jax.config import RunConfig
from nalora_jax.data.pipeline import BatchIterator
from nalora_jax.data.source import Source

if TYPE_CHECKING:
    from nalora_jax.method.step import TrainState
    from nalora_jax.models.config import ModelConfig
    from nalora_jax.train.output import Output
    from nalora_jax.train.program import Assembly
    from nalora_jax.weights.model_files import ModelFiles
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


def original(loaded: RunBase) -> str:
    """Returns the name under which other tools load the base: of a copy, its original's hub id."""
    return (loaded.origin and loaded.origin.copy_of) or loaded.source


class TrainingRows(Protocol):
    """Training data as packed sequences or images."""

    def batches(self) -> BatchIterator:
        """Returns an endless iterator of batches."""

    def describe(self) -> dict[str, Any]:
        """Returns figures for the log."""


@dataclass(frozen=True)
class Inputs:
    """A run before its weights are read: all that ``--dry-run`` prints, and all that any layout has in common."""

    config: RunConfig  # with concrete learning rate, sequence length, steps and evaluation interval
    base: ModelConfig | None  # architecture, with rows for added tokens; None for image and text encoders
    files: ModelFiles | None  # of the base model, opened once; None for image and text encoders
    data: Any  # training rows of all processes; records of image and text encoders
    held_out: tuple[
        Any, Any
    ]  # examples that results are reported on, and others that select the checkpoint
    questions: Mapping[str, str]  # digests of both
    in_turns: bool | None = None  # True if the training texts are formatted by a chat template
    begin: Begin | None = None  # of the run's `Start`


@dataclass(frozen=True)
class Job:
    """A run on its devices, ready to start: its inputs with weights, compiled step and evaluators."""

    kind: Kind
    inputs: Inputs
    loaded: RunBase
    assembly: Assembly
    data: TrainingRows  # the rows of this process
    evaluator: Any  # evaluates the reported examples; see `nalora_jax.evaluate.evaluator.Evaluator`
    selector: Any  # evaluates the examples that select the checkpoint

    @property
    def config(self) -> RunConfig:
        """Returns the settings that are recorded; automatic fields of the layout stay open."""
        return self.inputs.config


# Returns an assembly with the initial adapters that its settings ask for, given the base, the rows and the folder.
Begin = Callable[["Assembly", Any, TrainingRows, "Output"], "Assembly"]


class Start(Protocol):
    """The adapters that a run starts from: a module with these two functions."""

    @property
    def with_adapter(self) -> Callable[[RunConfig, Mapping[str, Any] | None], RunConfig]:
        """Returns the function that takes settings over from the adapter on disk that a run continues."""

    @property
    def with_start(self) -> Begin:
        """Returns the function that makes the initial adapters, before the first step."""


class Kind(Protocol):
    """A kind of run: a module with these four functions."""

    @property
    def open_inputs(self) -> Callable[[RunConfig, Mapping[str, Source] | None], Inputs]:
        """Returns the function that opens a run's files and data and settles its settings."""

    @property
    def build_step(
        self,
    ) -> Callable[[Inputs, RunConfig, Mesh, Output, Job | None], tuple[Any, Assembly, Any]]:
        """Returns the function that loads the base and builds the step and this process's rows.

        Its arguments are the inputs, the settings with a concrete layout, the mesh, the run's folder,
        and a job with the same program, whose base and programs are shared.
        """

    @property
    def evaluator(self) -> Callable[[Inputs, Any, Assembly, Any], Any]:
        """Returns the function that makes the evaluator of some held-out examples, its last argument."""

    @property
    def export_run(self) -> Callable[[Job, Path, TrainState, Callable[[str], None]], None]:
        """Returns the function that writes the adapter of a state to a folder and verifies it by reloading.

        Its last argument makes a folder of the first process readable in all processes.
        """
