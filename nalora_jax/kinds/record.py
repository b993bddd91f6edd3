"""A kind of run is one record, `Kind`: its data, program, evaluation, export and limits.

The settings ask for a kind: rewards for one, a preference loss for another, ``--kind NAME`` for one
of yours. No other module asks which kind a run is of; it reads the record.

    @dataclass(frozen=True)
    class ZLoss(NextToken): ...

    register_kind(replace(text.KIND, name="z_loss", program_parts=...))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jax.sharding import Mesh

from nalora_jax.common.folders import RunFolder
from nalora_jax.common.registry import Registry, settings_from
from nalora_jax.config import RunConfig, check
from nalora_jax.config.checks import Limits, check_limits, require
from nalora_jax.models.adapters import adapter_spec

if TYPE_CHECKING:
    from nalora_jax.assembly.program import Assembly, Teacher
    from nalora_jax.data.pipeline import TrainingRows
    from nalora_jax.data.source import Source
    from nalora_jax.method.step import TrainState
    from nalora_jax.models.config import ModelConfig
    from nalora_jax.models.targets import AdapterSpec
    from nalora_jax.weights.dual_base import LoadedDual
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
    adapters: AdapterSpec | None = None  # of a decoder, by the rules of the settings
    teacher: Any = None  # `nalora_jax.kinds.teachers.OpenedTeacher` of a distillation


class Built(NamedTuple):
    """What a kind builds of its inputs on the devices of a run."""

    loaded: LoadedModel | LoadedDual  # the base model
    assembly: Assembly
    data: Any  # the rows of this process, see `TrainingRows`


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


class Described(NamedTuple):
    """Facts about a run that ``--dry-run`` prints."""

    parameters: int  # of the base
    trained: int  # parameters
    spec: AdapterSpec
    where: str  # the place of the adapted projections: "of both towers"
    activation: str  # of the gates
    data: str  # the training data in a line
    examples: int  # in an epoch
    noun: str  # their name


# Name of an array of a batch -> its shape without the axes of micro-batches and rows, and its
# dtype.
Arrays = dict[str, tuple[tuple[int, ...], str]]


# Returns an architecture by the name of a model.
ReadModel = Callable[[str], "ModelConfig"]


@dataclass(frozen=True)
class NoSettings:
    """The settings of a kind without settings."""


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
      name: its name, for ``--kind``.
      open_inputs: opens a run's files and data and settles its settings. Its arguments are the
        settings and the records by split that were given from Python, if any.
      build_step: loads the base and builds the step and this process's rows. Its arguments are the
        inputs, the settings with a concrete layout, the mesh, the run's folder, and a job with the
        same program whose base and programs are shared, if any.
      evaluator: makes the evaluator of some held-out examples, of inputs, base, assembly and
        examples.
      export_run: writes the adapter of a state to a folder, verifies it by reloading, and returns
        the exported adapters. The last argument makes a folder of the first process readable in
        all processes.
      evaluate: makes the evaluator of a trained adapter for ``nalora eval``: of the adapter's
        model, the settings, the mesh, and True if the user names other data than the run's.
      program_parts: returns the arguments of `nalora_jax.assembly.program.assemble` that differ
        between kinds on a decoder, of the settings and the processor of images of a vision-language
        model. None: the kind trains no decoder.
      settings: dataclass of the settings in ``--kind NAME:setting=value``.
      limits: yields the values that other settings may have in such a run, or raises NaloraError.
      rate: factor of the automatic learning rate.
      outputs: returns the number of outputs of a trained head on one vector of each text; 0: the
        kind has no such head.
      batch_arrays: returns the arrays that a batch has besides those of text, for plans, of the
        settings, the base and the number of images of a row.
      draws_samples: returns True if each step draws samples of the model first.
      compares_with_base: True if its evaluation compares the adapter with the base, which is then
        measured without adapters, not with adapters at zero.
      teacher: returns the second, frozen decoder of a step, of the settings, the base and the
        function that reads an architecture by its name; None: there is none.
      describe: returns facts about the inputs for ``--dry-run``; None: those of a decoder.
      subject: ``module:class`` of its subject in a study; "" if there are no studies of it.
    """

    name: str
    open_inputs: Callable[[RunConfig, Mapping[str, Source] | None], Inputs]
    build_step: Callable[[Inputs, RunConfig, Mesh, RunFolder, Job | None], Built]
    evaluator: Callable[[Inputs, Any, Assembly, Any], Any]
    export_run: Callable[[Job, Path, TrainState, Callable[[str], None]], AdapterSpec]
    evaluate: Callable[[Any, RunConfig, Mesh | None, bool], Any]
    program_parts: Callable[[RunConfig, Any], dict[str, Any]] | None = None
    settings: type = NoSettings
    limits: Callable[[RunConfig], Iterable[Limits]] = lambda config: ()
    rate: float = 1.0
    outputs: Callable[[RunConfig], int] = lambda config: 0
    batch_arrays: Callable[[RunConfig, ModelConfig, int], Arrays] = (
        lambda config, base, images: {}
    )
    draws_samples: Callable[[RunConfig], bool] = lambda config: False
    compares_with_base: bool = False
    teacher: Callable[[RunConfig, ModelConfig, ReadModel], Teacher] | None = None
    describe: Callable[[Inputs], Described] | None = None
    subject: str = "nalora_jax.study.language:Language"

    def adapters(self, config: RunConfig, base: ModelConfig) -> AdapterSpec:
        """Returns the adapters that a run's rules select on a decoder, with the kind's head.

        Raises:
          NaloraError: as `nalora_jax.models.adapters.adapter_spec`.
        """
        return replace(adapter_spec(config, base), score=self.outputs(config))

    def parts(
        self, config: RunConfig, processor: Any = None, teacher: Teacher | None = None
    ) -> dict[str, Any]:
        """Returns the result of `program_parts`, which a kind on a decoder has, and the teacher if
        there is one."""
        assert self.program_parts is not None
        parts = self.program_parts(config, processor)
        if teacher is not None:
            parts["teacher"] = teacher
        return parts


# The kinds of this library; their modules are imported when a run asks for them.
KINDS: Registry[Kind] = Registry(
    "kind",
    "nalora_jax.kinds",
    "--kind",
    modules={
        "text": "nalora_jax.kinds.text",
        "preference": "nalora_jax.kinds.preference",
        "images": "nalora_jax.kinds.images",
        "dual": "nalora_jax.kinds.dual",
        "rl": "nalora_jax.kinds.rl.kind",
        "classify": "nalora_jax.kinds.classify",
        "distill": "nalora_jax.kinds.distill",
        "reward": "nalora_jax.kinds.reward",
        "embed": "nalora_jax.kinds.embed",
    },
)


def register_kind(kind: Kind) -> Kind:
    """Registers a kind of run and returns it.

    Raises:
      NaloraError: the name is taken.
    """
    return KINDS.add(kind.name, kind)


def run_kind(config: RunConfig) -> Kind:
    """Returns the kind of run that the settings ask for.

    Raises:
      NaloraError: ``--kind`` is an unknown name.
    """
    return KINDS.get(config.kind_name)


def kind_settings(config: RunConfig) -> Any:
    """Returns the settings of the run's kind, an instance of `Kind.settings`.

    Raises:
      NaloraError: an unknown setting, or a value of another type.
    """
    _, _, options = config.kind.partition(":")
    return settings_from(run_kind(config).settings, options, f"--kind {config.kind}")


def check_run_config(config: RunConfig) -> RunConfig:
    """Returns ``config`` after checking every field that can be checked without data.

    Raises:
      NaloraError: names the flag, the expected value and the actual one.
    """
    return check_kind(check(config))


def check_kind(config: RunConfig) -> RunConfig:
    """Returns a config that `nalora_jax.config.check` accepted, after checking the settings and the
    limits of its kind; raises as `check_run_config` does."""
    kind_settings(config)
    distill = config.distill
    require(
        "--distill.teacher, --distill.system",
        run_kind(config).teacher is not None or not distill.kind,
        f"none in a run of kind {run_kind(config).name}, which has no teacher",
        distill.teacher or distill.system,
    )
    check_limits(config, run_kind(config).limits(config))
    return config
