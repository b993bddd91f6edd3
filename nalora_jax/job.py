"""One fine-tuning run from a config: wiring only, in order of execution.

settings -> devices -> base model -> adapters and step -> data -> evaluate -> train -> evaluate -> export -> report
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from nalora_jax import distributed, trees
from nalora_jax.config import RunConfig, check
from nalora_jax.config.vision import DUAL
from nalora_jax.data.given import Data, Format, given_sources
from nalora_jax.data.pipeline import BatchIterator, stream_text
from nalora_jax.data.sources import Source
from nalora_jax.distributed import platform_of
from nalora_jax.errors import Interrupted, NaloraError
from nalora_jax.evaluate.heldout import describe
from nalora_jax.evaluate.statistics import compare
from nalora_jax.files import write_atomically
from nalora_jax.imports import import_files
from nalora_jax.loading.adapted import ADAPTER
from nalora_jax.loading.base import read_config, read_tokenizer_of
from nalora_jax.method.step import TrainState
from nalora_jax.models.remat import check_remat
from nalora_jax.ops.numerics import check_implementation
from nalora_jax.plan.auto import accepted
from nalora_jax.redaction import redacted
from nalora_jax.report.history import read_evaluation
from nalora_jax.seals import seal
from nalora_jax.terminal import outliving_terminal
from nalora_jax.train.assembly import Assembly
from nalora_jax.train.callbacks import Callback, Callbacks, Ended, Started, make_callbacks
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.train.compilation import use_compilation_cache
from nalora_jax.train.export import card
from nalora_jax.train.hooks import RunHooks, say_counts
from nalora_jax.train.inputs import described
from nalora_jax.train.loop import FitResult, Schedule, fit
from nalora_jax.train.machine import describe_device, versions
from nalora_jax.train.mechanisms import make
from nalora_jax.train.metrics import MetricsLog, recorded_settings, to_json
from nalora_jax.train.optimizers import make_schedule
from nalora_jax.train.output import Output, has_checkpoint, last_step, open_output
from nalora_jax.train.pieces import Pieces
from nalora_jax.train.preemption import StopSignals, stop_signals
from nalora_jax.train.profile import Profile
from nalora_jax.train.progress import Progress, Stages
from nalora_jax.train.seeing import seen_sources
from nalora_jax.train.settle import settled
from nalora_jax.train.snapshot import check_settings
from nalora_jax.train.text_pieces import text_pieces
from nalora_jax.weights.card import write_card
from nalora_jax.weights.hub import ResolvedSource, resolve

log = logging.getLogger(__name__)

BEFORE = "before.json"  # in a run's folder: metrics of the base model and digests of the questions


@dataclass(frozen=True)
class RunResult:
    """The outputs of a run."""

    folder: Path
    adapter: Path  # PEFT files of the best checkpoint
    report: Path
    before: Mapping[str, Any]  # held-out metrics of the base model
    after: Mapping[str, Any]  # held-out metrics of the exported adapter
    best_step: int


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
    config = replace(config, imports=import_files(config.imports))
    own, source = given_sources(config.data, data=data, source=source, format=format)
    config = replace(config, data=own)
    for text in config.mechanisms:
        make(text)  # raises for an unknown name before anything is loaded
    told = [*make_callbacks(config.callbacks), *callbacks]
    with outliving_terminal():
        distributed.initialize_distributed()
        with (
            distributed.lost_peers_named(),
            stop_signals() as stop,
            open_output(config.output, config.resume) as output,
        ):
            try:
                return _run(config, output, source, told, stop)
            except Interrupted as stopped:  # outside of training: checkpoints may exist
                if stopped.saved is None and has_checkpoint(output.checkpoints):
                    raise Interrupted(stopped.signal, resume=_way_on(config)) from None
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
    if config.compute.compilation_cache:
        use_compilation_cache()
    files = None if config.vision.task in DUAL else resolve(config.model)
    if files is not None and config.vision.task == "chat":
        source = _seen(config, files, source)
    records = _on_images().image_records(config) if files is None else ()
    config = settled(config, files, source, images=len(records[0].indices) if records else 0)
    recorded = _continued(config, output)
    # ---------------------------------------------------------------- model, adapters, step, training rows, questions
    if files is None:
        pieces = _on_images().dual_pieces(config, *records, _mesh(config))
    else:
        text = partial(text_pieces, files=files, output=output, source=source)
        # `config`, which is recorded, keeps its automatic fields; only `placed` has concrete ones.
        pieces = accepted(config, described(config, files), lambda placed: text(placed, mesh=_mesh(placed)))
    assembly = pieces.assembly
    log.info("%s trained parameters on %s", f"{trees.count(assembly.state.lora):,}", assembly.spec.describe())
    log.info("training data: %s", stream_text(pieces.data.describe()))
    batches = pieces.data.batches()

    with _checkpointer(config, output, pieces) as checkpointer:
        # ------------------------------------------------------------ initial or restored state
        state, start = _start(config, output, recorded, assembly, batches, checkpointer)
        known = _known_before(output, pieces.questions)
        told, progress = _listeners(config, output.folder, start, callbacks)
        beside = _hooks(config, pieces, told, progress, checkpointer, batches, stop)
        with told, progress:
            told.start(_started(config, output, start, pieces))
            spent.end("preparing")
            try:
                # ---------------------------------------------------- evaluate, train, evaluate, export
                before = known or _measure_before(output.folder, beside, pieces, chosen=config.train.eval_every > 0)
                spent.end("evaluating the base")
                result = _fit(config, assembly, state, start, beside, Profile(config.debug.profiled, output.common))
                best = _best(result, checkpointer, assembly)
                spent.end("training")
                after = _measure_after(best, before, pieces.evaluator, beside)
                spent.end("evaluating the result")
                adapter = _export(config, output, pieces, best, before, after)
            except (Exception, KeyboardInterrupt) as error:  # trackers mark every failed run
                told.end(Ended(message=str(error) or "interrupted"))
                raise
            spent.end("exporting")
            told.end(Ended(result.step, after["step"], seconds=spent.seconds))

    return RunResult(output.folder, adapter, _report(output), before, after, after["step"])


# -------------------------------------------------------------------- stages, in order of execution


def _seen(config: RunConfig, files: ResolvedSource, source: Mapping[str, Source] | None) -> Mapping[str, Source] | None:
    """Returns the records with the image tokens of the model."""
    tokens = read_tokenizer_of(files, read_config(files, images=True)).images
    return seen_sources(config.data, config.vision, tokens, source)


def _continued(config: RunConfig, output: Output) -> dict[str, Any]:
    """Returns the last recorded settings of a resumed run.

    Incompatible settings raise an error here, before a model is loaded. The checkpoints are checked
    again later, because they record settings in full precision.
    """
    done = last_step(output.checkpoints) if output.resumes else None
    if done is not None and done > config.steps:
        remedy = "leave --steps out to go on as the run was, or start a new run in another --output"
        expected = f"{done} or more, which the run in {output.folder} has done"
        raise NaloraError("--steps", expected=expected, found=config.steps, remedy=remedy)
    recorded = recorded_settings(output.folder) if output.resumes else {}
    if recorded:
        check_settings(f"--resume {output.folder}", recorded, to_json(redacted(config.to_dict())))
    return recorded


def _mesh(placed: RunConfig) -> Mesh:
    """Returns the mesh, after checking that its devices support the settings."""
    mesh = distributed.make_mesh(placed.mesh)
    check_implementation(placed.compute.implementation, platform_of(mesh).name)
    check_remat(placed.compute.remat, platform_of(mesh).name)
    return mesh


def _checkpointer(config: RunConfig, output: Output, pieces: Pieces) -> Checkpointer:
    """Returns the run's checkpointer, which ranks by the metric of its evaluations."""
    return Checkpointer(
        output.checkpoints,
        fingerprint=pieces.loaded.fingerprint,
        config=redacted(config.to_dict()),
        keep=config.train.keep,
        best_metric=pieces.evaluator.metric,
        best_mode=pieces.evaluator.mode,
    )


def _started(config: RunConfig, output: Output, start: int, pieces: Pieces) -> Started:
    """Returns the facts about the run that callbacks get before its first step."""
    origin = pieces.loaded.origin
    turns = {} if pieces.in_turns is None else {"in_turns": pieces.in_turns}
    more = {"data": pieces.data.describe() | turns} | ({"base": origin.to_dict()} if origin else {})
    return Started(output.folder, redacted(config.to_dict()), start, versions(), describe_device(), more)


def _export(
    config: RunConfig,
    output: Output,
    pieces: Pieces,
    best: TrainState,
    before: dict[str, Any],
    after: dict[str, Any],
) -> Path:
    """Writes the adapter and its card; returns their folder."""
    adapter: Path = pieces.export(output.folder / ADAPTER, best)
    readme = card(config, pieces.loaded, pieces.assembly, best.lora, before, after)
    distributed.on_first_process(lambda: write_card(adapter, readme))
    return adapter


def _report(output: Output) -> Path:
    """Writes the report; returns its path."""
    from nalora_jax.report.html import FILE, write_report  # not earlier: Matplotlib takes memory

    distributed.on_first_process(lambda: log.info("report: %s", write_report(output.folder)))
    return output.folder / FILE


def _on_images() -> Any:
    """Imports the module of runs on images, which needs Pillow, an extra."""
    from nalora_jax.train import dual_pieces

    return dual_pieces


def _start(
    config: RunConfig,
    output: Output,
    recorded: Mapping[str, Any],
    assembly: Assembly,
    batches: BatchIterator,
    checkpointer: Checkpointer,
) -> tuple[TrainState, int]:
    """Returns the state to train from and its step; moves the batches to the same position."""
    if not output.resumes:
        return assembly.state, 0
    state, position = checkpointer.restore("latest", assembly.state)
    batches.set_state(position)
    start = int(state.step)
    log.info("resumed from step %d%s", start, ", the last one: no step is left" if start == config.steps else "")
    steps = recorded.get("steps", config.steps)
    if steps != config.steps:
        was, now = (float(make_schedule(config.optimizer, total)(start)) for total in (steps, config.steps))
        log.warning(
            "--steps %d instead of %d: the learning-rate schedule spans the steps, so it goes on at %.2e where it was "
            "at %.2e; the result is not that of an uninterrupted run",
            *(config.steps, steps, now, was),
        )
    return state, start


def _known_before(output: Output, questions: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the base model's held-out metrics of a resumed run; None if not yet measured.

    Raises:
      NaloraError: they are of other questions than the evaluation data now has.
    """
    saved = output.folder / BEFORE
    if not (output.resumes and saved.exists()):
        return None
    found = read_evaluation(saved)
    asked = found.pop("questions", questions)
    if asked != questions:
        raise NaloraError(
            "--data.eval-split",
            expected="the questions that the run measured its base model on",
            found="other ones: the evaluation data has changed since",
            remedy="restore that data, or start a new run in another --output",
        )
    return found


def _listeners(
    config: RunConfig, folder: Path, start: int, callbacks: Sequence[Callback]
) -> tuple[Callbacks, Progress]:
    """Returns the callbacks and the progress display; both are silent in processes other than 0."""
    if jax.process_index():
        return Callbacks(None), Progress(config.steps, console=Console(quiet=True))
    return Callbacks(MetricsLog(folder, resume=start or None), callbacks), Progress(config.steps, start=start)


def _hooks(
    config: RunConfig,
    pieces: Pieces,
    told: Callbacks,
    progress: Progress,
    checkpointer: Checkpointer,
    batches: BatchIterator,
    stop: StopSignals,
) -> RunHooks:
    """Returns the loop's hooks."""
    return RunHooks(
        told,
        progress,
        pieces.selector,
        pieces.assembly.params,
        checkpointer,
        batches,
        stop,
        pieces.assembly.state_metrics,
        ranked_from=config.adalora.settled_at(config.steps),
    )


def _measure_before(folder: Path, beside: RunHooks, pieces: Pieces, *, chosen: bool) -> dict[str, Any]:
    """Evaluates the base on the reported questions and on those that select the checkpoint."""
    before: dict[str, Any] = pieces.evaluator.measure(pieces.loaded.params, None, samples=True)
    text = json.dumps(seal(before | {"questions": pieces.questions}))
    distributed.on_first_process(lambda: write_atomically(folder / BEFORE, text))
    beside.told.evaluation(0, before, "initial")
    beside.progress.say(f"before: {describe(before)}")
    choosing = beside.select(0, pieces.loaded.params, None)
    say_counts(int(before.get("n", 0)), choosing.n, chosen=chosen)
    return before


def _fit(
    config: RunConfig, assembly: Assembly, state: TrainState, start: int, beside: RunHooks, profile: Profile
) -> FitResult:
    """Runs the training steps.

    Raises:
      Interrupted: a signal requested a stop; the last step is saved.
    """
    train = config.train
    schedule = Schedule(config.steps, train.log_every, train.eval_every, train.save_every, train.patience)
    rate = make_schedule(config.optimizer, config.steps)
    params = assembly.view(assembly.params)
    beside.state_metrics.compile_ahead(state)
    batches = _on_mesh(beside.batches, assembly.mesh)
    with beside.stop.between_steps(), profile:
        result = fit(assembly.step, params, state, batches, beside, schedule, rate, start=start, profile=profile)
    if result.interrupted:
        beside.checkpointer.wait()
        raise Interrupted(beside.stop.signal, result.step, _way_on(config))
    return result


def _way_on(config: RunConfig) -> str:
    """Returns the options that resume a stopped run."""
    return f"continue with --output {config.output} --resume"


def _best(result: FitResult, checkpointer: Checkpointer, assembly: Assembly) -> TrainState:
    """Returns the state with the best evaluation; the last one without evaluations."""
    checkpointer.wait()
    step = checkpointer.best_step()
    if step is None or step == result.step:
        return result.state
    state: TrainState
    state, _ = checkpointer.restore("best", assembly.state)
    log.info("the best evaluation was at step %d: exporting that one", int(state.step))
    return state


def _measure_after(best: TrainState, before: Mapping[str, Any], evaluator: Any, beside: RunHooks) -> dict[str, Any]:
    """Evaluates the best state on the reported examples, which were not used to select it."""
    after: dict[str, Any] = evaluator.measure(beside.params, best.lora, samples=True)
    if "right" in after and len(before.get("right", ())) == len(after["right"]):
        after["paired"] = asdict(compare(before["right"], after["right"]))
    step = int(best.step)
    beside.told.evaluation(step, after, "final")
    beside.progress.say(f"after (step {step}): {describe(after)}")
    return after | {"step": step}


def _on_mesh(batches: BatchIterator, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    for batch in batches:
        yield distributed.make_global_batch(batch, mesh, rows_axis=1)
