"""One fine-tuning run from a config: wiring only, in order of execution.

settings -> devices -> base model -> adapters and step -> data -> evaluate -> train -> evaluate -> export -> report
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import Mesh

from nalora_jax.cli.planning.auto import accepted
from nalora_jax.common.imports import import_files
from nalora_jax.common.redaction import redacted
from nalora_jax.common.terminal import outliving_terminal
from nalora_jax.config import RunConfig, check
from nalora_jax.config.vision import DUAL
from nalora_jax.data.given import Data, Format, given_sources
from nalora_jax.data.source import Source
from nalora_jax.errors import Interrupted, NaloraError
from nalora_jax.evaluate.run_log import recorded_settings, to_json
from nalora_jax.layout import distributed
from nalora_jax.layout.distributed import platform_of
from nalora_jax.method.rules import make
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.remat import check_remat
from nalora_jax.ops.numerics import check_implementation
from nalora_jax.train.callbacks import Callback, make_callbacks
from nalora_jax.train.compilation import use_compilation_cache
from nalora_jax.train.initial_adapter import with_adapter
from nalora_jax.train.inputs import described
from nalora_jax.train.output import Output, has_checkpoint, last_step, open_output
from nalora_jax.train.pieces import Pieces
from nalora_jax.train.preemption import StopSignals, stop_signals
from nalora_jax.train.profile import Profile
from nalora_jax.train.progress import Stages
from nalora_jax.train.running import Running, RunResult, way_on
from nalora_jax.train.seeing import seen_sources
from nalora_jax.train.settle import settled
from nalora_jax.train.snapshot import check_settings
from nalora_jax.train.text_pieces import text_pieces
from nalora_jax.weights.base import read_config, read_tokenizer_of
from nalora_jax.weights.hub import ResolvedSource, resolve

log = logging.getLogger(__name__)


def run(
    config: RunConfig,
    *,
    data: Data | None = None,
    format: Format | None = None,
    callbacks: Sequence[Callback] = (),
    source: Mapping[str, Source] | None = None,
) -> RunResult:
    """Fine-tunes a model, see the module's docstring.

    All processes of a multi-host run call it; the first one logs and writes.

    Args:
      config: the run's settings.
      data: records, or records by split, which replace ``config.data.dataset``; see
        `data.given.given_sources`.
      format: converts each record to an example, or to None to leave it out.
      callbacks: callbacks for log steps, evaluations and checkpoints, in addition to the
        config's.
      source: sources by split (``{"train": ..., "validation": ...}``), which replace
        ``config.data.dataset``.

    Raises:
      NaloraError: bad settings, files or data; files of an earlier run are not changed.
      TrainingDivergedError: the loss or the state is no longer finite; the last good checkpoint is
        kept.
      Interrupted: Ctrl-C or SIGTERM; the last completed step, if any, is saved.
    """
    check(config)
    _refuse_runs(config)
    config = replace(config, imports=import_files(config.imports))
    data_config, source = given_sources(config.data, data=data, source=source, format=format)
    config = replace(config, data=data_config)
    for text in config.mechanisms:
        make(text)  # raises for an unknown name before anything is loaded
    listeners = [*make_callbacks(config.callbacks), *callbacks]
    with outliving_terminal():
        distributed.initialize_distributed()
        with (
            distributed.lost_peers_named(),
            stop_signals() as stop,
            open_output(config.output, config.resume) as output,
        ):
            try:
                return _run(config, output, source, listeners, stop)
            except Interrupted as stopped:  # outside of training: checkpoints may exist
                if stopped.saved is None and has_checkpoint(output.checkpoints):
                    raise Interrupted(stopped.signal, resume=way_on(config)) from None
                raise


def _run(
    config: RunConfig,
    output: Output,
    source: Mapping[str, Source] | None,
    callbacks: Sequence[Callback],
    stop: StopSignals,
) -> RunResult:
    spent = Stages()
    # ---------------------------------------------------------------- devices, files and settings
    inputs = inputs_of(of_adapter(config, output), source)
    config = inputs.config
    recorded = continued(config, output)
    # ---------------------------------------------------------------- model, adapters, step, training rows, questions
    if inputs.files is None:
        pieces = inputs.pieces(config, output, mesh_of(config))
    else:
        # `config`, which is recorded, keeps its automatic fields; only `placed` has concrete ones.
        build: Callable[[RunConfig], Pieces] = lambda placed: inputs.pieces(placed, output, mesh_of(placed))  # noqa: E731
        pieces = accepted(config, described(config, inputs.files), build)
    with ExitStack() as stack:
        running = Running(config, output, recorded, pieces, callbacks, stop, stack)
        spent.end("preparing")
        with running.reporting_errors():
            # ---------------------------------------------------- evaluate, train, evaluate, export
            running.measure_before()
            spent.end("evaluating the base")
            result = running.fit(Profile(config.debug.profiled, output.common))
            running.restore_best(result)
            spent.end("training")
            return running.finish(result.step, spent)


@dataclass(frozen=True)
class Inputs:
    """A run's settings, files and data before its weights are read."""

    config: RunConfig  # with concrete learning rate, sequence length, steps and evaluation interval
    files: ResolvedSource | None  # None for image and text encoders
    source: Mapping[str, Source] | None
    records: tuple[Any, ...]  # of image and text encoders

    @property
    def base(self) -> ModelConfig | None:
        """The architecture of the base model; None for image and text encoders."""
        if self.files is None:
            return None
        return described(self.config, self.files)

    def pieces(self, placed: RunConfig, output: Output, mesh: Mesh, like: Pieces | None = None) -> Pieces:
        """Returns the parts of the run with the settings ``placed``, whose mesh is concrete.

        ``like`` are pieces of a run with the same program, whose base and programs are shared.
        """
        built: Pieces
        if self.files is None:
            built = _on_images().dual_pieces(placed, *self.records, mesh, like=like)
        else:
            built = text_pieces(placed, self.files, output, mesh, self.source, like)
        return built


def inputs_of(config: RunConfig, source: Mapping[str, Source] | None) -> Inputs:
    """Reads the settings of the model's files and the data of a run."""
    if config.compute.compilation_cache:
        use_compilation_cache()
    if config.vision.task in DUAL:
        records = _on_images().image_records(config)
        settings = settled(config, None, source, images=len(records[0].indices))
        return Inputs(settings, None, source, records)
    files = replace(resolve(config.model), rope_scaling=config.rope_scaling)
    if config.vision.task == "chat":
        source = _seen(config, files, source)
    return Inputs(settled(config, files, source), files, source, ())


def of_adapter(config: RunConfig, output: Output) -> RunConfig:
    """Returns the settings with those of ``config.adapter``; of a resumed run, as it recorded them."""
    return with_adapter(config, recorded_settings(output.folder) if output.resumes else None)


def _refuse_runs(config: RunConfig) -> None:
    """Raises a NaloraError for axes of a sweep, which a single run does not have."""
    for flag, size in (("run", config.mesh.run), ("runs-per-device", config.mesh.runs_per_device)):
        if size > 1:
            raise NaloraError(f"--mesh.{flag}", expected="0 or 1 without --sweep", found=size)


def _seen(
    config: RunConfig, files: ResolvedSource, source: Mapping[str, Source] | None
) -> Mapping[str, Source] | None:
    """Returns the records with the image tokens of the model."""
    tokens = read_tokenizer_of(files, read_config(files, images=True)).images
    return seen_sources(config.data, config.vision, tokens, source)


def continued(config: RunConfig, output: Output) -> dict[str, Any]:
    """Returns the last recorded settings of a resumed run.

    Incompatible settings raise an error here, before a model is loaded. The checkpoints are checked
    again later, because they record settings in full precision.
    """
    if not output.resumes:
        return {}
    done = last_step(output.checkpoints)
    if done is not None and done > config.steps:
        remedy = "leave --steps out to go on as the run was, or start a new run in another --output"
        expected = f"{done} or more, which the run in {output.folder} has done"
        raise NaloraError("--steps", expected=expected, found=config.steps, remedy=remedy)
    recorded = recorded_settings(output.folder)
    if recorded:
        check_settings(f"--resume {output.folder}", recorded, to_json(redacted(config.to_dict())))
    return recorded


def mesh_of(placed: RunConfig) -> Mesh:
    """Returns the mesh, after checking that its devices support the settings."""
    mesh = distributed.make_mesh(placed.mesh)
    check_implementation(placed.compute.implementation, platform_of(mesh).name)
    check_remat(placed.compute.remat, platform_of(mesh).name)
    return mesh


def _on_images() -> Any:
    """Imports the module of runs on images, which needs Pillow, an extra."""
    from nalora_jax.train import dual_pieces

    return dual_pieces
