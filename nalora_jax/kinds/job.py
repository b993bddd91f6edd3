"""The parts of a run: its inputs, before weights are read, and the job, ready to start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jax.sharding import Mesh

from nalora_jax.config import RunConfig
from nalora_jax.data.pipeline import TrainingRows
from nalora_jax.data.source import Source
from nalora_jax.evaluate.evaluator import Answering

if TYPE_CHECKING:
    from nalora_jax.assembly.program import Assembly
    from nalora_jax.common.folders import RunFolder
    from nalora_jax.method.step import TrainState
    from nalora_jax.models.config import ModelConfig
    from nalora_jax.models.targets import AdapterSpec
    from nalora_jax.weights.dual import LoadedDual
    from nalora_jax.weights.model_files import LoadedModel, ModelFiles


@dataclass(frozen=True)
class Inputs:
    """A run before its weights are read: what ``--dry-run`` prints, the same in any layout."""

    config: RunConfig  # with concrete learning rate, sequence length, steps and evaluation interval
    # architecture, with rows for added tokens; None for image and text encoders
    base: ModelConfig | None
    # of the base model, opened once; None for image and text encoders
    files: ModelFiles | None
    data: Any  # training rows of all processes; records of image and text encoders
    # examples that results are reported on, and others that select the checkpoint
    held_out: tuple[Any, Any]
    questions: Mapping[str, str]  # digests of both
    # True if the training texts are formatted by a chat template; None without texts
    in_turns: bool | None = None
    start: Start | None = None  # makes the initial adapters
    answering: Answering | None = None  # completes held-out prompts for the report


@dataclass(frozen=True)
class Job:
    """A run on its devices, ready to start: its inputs with weights, compiled step and
    evaluators."""

    kind: Kind
    inputs: Inputs
    loaded: LoadedModel | LoadedDual
    assembly: Assembly
    data: TrainingRows  # the rows of this process
    evaluator: Any  # evaluates the reported examples; see `nalora_jax.evaluate.evaluator.Evaluator`
    selector: Any  # evaluates the examples that select the checkpoint

    @property
    def config(self) -> RunConfig:
        """Returns the settings that are recorded; automatic fields of the layout stay open."""
        return self.inputs.config


class Start(Protocol):
    """Makes the adapters that a run starts from: a module with these three functions."""

    def with_adapter(
        self, config: RunConfig, recorded: Mapping[str, Any] | None, /
    ) -> RunConfig:
        """Returns ``config`` with the settings of the adapter on disk that the run continues."""

    def with_start(
        self, assembly: Assembly, loaded: Any, data: TrainingRows, output: RunFolder, /
    ) -> Assembly:
        """Returns the assembly with the initial adapters that its settings ask for, before the
        first step."""

    def exportable_adapter(
        self, assembly: Assembly, lora: Any, /
    ) -> tuple[Any, AdapterSpec]:
        """Returns trained adapters as plain LoRA of the original base, in host memory."""


class Kind(Protocol):
    """A kind of run: a module with these four functions."""

    def open_inputs(
        self, config: RunConfig, source: Mapping[str, Source] | None, /
    ) -> Inputs:
        """Opens a run's files and data and settles its settings."""

    def build_step(
        self,
        inputs: Inputs,
        placed: RunConfig,
        mesh: Mesh,
        output: RunFolder,
        like: Job | None,
        /,
    ) -> tuple[Any, Assembly, Any]:
        """Loads the base and builds the step and this process's rows.

        Args:
          inputs: of the run.
          placed: its settings with a concrete layout.
          mesh: its devices.
          output: its folder.
          like: a job with the same program, whose base and programs are shared.
        """

    def evaluator(
        self, inputs: Inputs, loaded: Any, assembly: Assembly, items: Any, /
    ) -> Any:
        """Makes the evaluator of some held-out examples."""

    def export_run(
        self, job: Job, folder: Path, state: TrainState, share: Callable[[str], None], /
    ) -> None:
        """Writes the adapter of a state to a folder and verifies it by reloading.

        ``share`` makes a folder of the first process readable in all processes.
        """
