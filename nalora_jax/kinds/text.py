"""Runs on text: completions, conversations and plain text."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from nalora_jax.assembly.program import Assembly, assemble
from nalora_jax.assembly.start import exportable_adapter, prepare_start
from nalora_jax.common import trees
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.data.forms import uses_chat_template
from nalora_jax.data.items import Item, digest
from nalora_jax.data.pipeline import BatchIterator, packed_data
from nalora_jax.data.questions import eval_examples, held_out
from nalora_jax.data.source import Source
from nalora_jax.data.sources import open_pair
from nalora_jax.data.tokenizer import AddedTokens, Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate.generator import make_completer
from nalora_jax.evaluate.text_evaluation import TextEvaluator
from nalora_jax.kinds.inputs import (
    check_layout,
    check_longest,
    describe_base,
    open_records,
    resolve_base,
    settle_schedule,
    stream_shape,
)
from nalora_jax.kinds.model_export import export_model
from nalora_jax.kinds.record import Built, Inputs, Job, Kind, register_kind, run_kind
from nalora_jax.mesh import distributed, processes
from nalora_jax.method.step import TrainState
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.weights.model_files import (
    LoadedModel,
    ModelFiles,
    load_weights,
    open_files,
)
from nalora_jax.weights.new_tokens import add_tokens, tokenizer_writer
from nalora_jax.weights.origin import original
from nalora_jax.weights.peft_export import (
    export_adapter,
    max_logit_difference,
    verify_export,
)
from nalora_jax.weights.peft_import import import_adapter

if TYPE_CHECKING:
    from nalora_jax.common.folders import RunFolder
    from nalora_jax.loading.adapted import AdaptedModel

log = logging.getLogger(__name__)


def open_inputs(config: RunConfig, source: Mapping[str, Source] | None) -> Inputs:
    """Opens the model's files and the data, tokenizes the data and settles the settings.

    Raises:
      NaloraError: a model or data that cannot be read, or settings that do not fit them.
    """
    files = open_files(resolve_base(config))
    return tokenize_inputs(config, files, *open_records(config.data, source))


def tokenize_inputs(
    config: RunConfig, files: ModelFiles, train: Source, held: Source
) -> Inputs:
    """Returns the inputs of a run on text, given opened files and records.

    Raises:
      NaloraError: rules that match nothing, or an example that is longer than the context.
    """
    # raises for rules that match nothing, before data is tokenized
    base, tokenizer, adapters = describe_base(config, files)
    turns = uses_chat_template(
        train.read([0])[0], config.data, config.preference.chosen_field
    )
    shape = stream_shape(config) | {"context": base.max_positions}
    data = packed_data(train, config.data, tokenizer, **shape)
    check_longest(int(data.store.lengths().max()), base)
    config = replace(
        config, data=replace(config.data, max_length=data.pattern.capacity)
    )
    config = settle_schedule(config, base.d_model, data.rows_per_epoch, "rows")
    items = held_out(held, config.data, tokenizer)
    questions = {"reported": digest(items[0]), "selecting": digest(items[1])}
    return Inputs(config, base, files, data, items, questions, turns, adapters)


def build_step(
    inputs: Inputs, placed: RunConfig, mesh: Mesh, output: RunFolder, like: Job | None
) -> Built:
    """Loads the base, and builds adapters, step and this process's rows.

    Args:
      inputs: the run's inputs.
      placed: its settings with a concrete layout.
      mesh: its devices.
      output: its folder.
      like: a job with the same program, whose base and programs are shared.

    Raises:
      NaloraError: the model does not fit the mesh or the rules, or its weights are damaged.
    """
    assert inputs.base is not None
    assert inputs.files is not None
    check_layout(placed, inputs, mesh)
    if like is None:
        loaded = _loaded(inputs.files, placed, mesh)
    else:
        loaded = cast(LoadedModel, like.loaded)
    shared = None if like is None else like.assembly
    teacher = None
    if inputs.teacher is not None:
        teacher = inputs.teacher.program
    of_kind = run_kind(placed).parts(placed, inputs.files.processor, teacher)
    assembly = assemble(
        placed,
        loaded.config,
        loaded.params,
        mesh,
        spec=inputs.adapters,
        like=shared,
        **of_kind,
    )
    data = replace(inputs.data, **stream_shape(placed, mesh))
    if placed.tune:
        # Without the first values of trained weights, which would take memory.
        loaded = replace(loaded, params=assembly.params)
    return Built(loaded, prepare_start(assembly, loaded, data, output), data)


def _loaded(files: ModelFiles, config: RunConfig, mesh: Mesh) -> LoadedModel:
    """Loads the base model onto the mesh.

    Raises:
      NaloraError: the initial adapters are part of kernels that stay quantized, or quantized
        weights would be trained.
    """
    started = time.perf_counter()
    kind = config.compute.quantized
    held: str = config.compute.dtype
    if kind:
        held = f"{kind} and {held}"
    elif files.quantization is not None:
        stored = files.quantization.describe()
        if config.tune:
            raise NaloraError(
                "--tune",
                expected="a base in floats, whose weights can be trained",
                found=f"{files.resolved.path}, in {stored}",
                remedy="take the model in bfloat16, or train adapters",
            )
        if config.lora.init in ("pissa", "lora_ga"):
            raise NaloraError(
                f'--lora.init "{config.lora.init}"',
                expected="a base in floats, from whose kernels the initial update is subtracted",
                found=f"{files.resolved.path}, in {stored}",
                remedy="use another --lora.init",
            )
        held = f"{stored} and {held}"
    loaded = load_weights(files, dtype=config.compute.dtype, mesh=mesh, quantized=kind)
    loaded = add_tokens(loaded, AddedTokens.of(config.data), mesh)
    log.info(
        "%s: %.0f MB of parameters in %s, loaded in %.1f s",
        loaded.source,
        trees.size_bytes(loaded.params) / 1e6,
        held,
        time.perf_counter() - started,
    )
    return loaded


def evaluator(
    inputs: Inputs, loaded: LoadedModel, assembly: Assembly, items: Any
) -> TextEvaluator:
    """Returns the evaluator of some held-out examples.

    Its programs have the length that fits all held-out examples, so that both evaluators share
    them.
    """
    model = assembly.eval_model
    mesh = distributed.multi_device_mesh(assembly.mesh)
    every = [*inputs.held_out[0], *inputs.held_out[1]]
    answers = make_completer(model, loaded.tokenizer, mesh)
    return TextEvaluator(model, answers, items, mesh=mesh, fitting=every)


def adapter_evaluator(
    model: AdaptedModel, config: RunConfig, mesh: Mesh | None, named: bool
) -> TextEvaluator:
    """Returns the evaluator of a trained adapter on held-out examples.

    Args:
      model: with the adapter.
      config: settings of the run, with the data to evaluate on.
      mesh: its devices; None for one.
      named: True if the user named other data than the run's reported examples.
    """
    tokenizer = model.base.tokenizer
    items = evaluation_items(config.data, tokenizer, named)
    answers = make_completer(model.module, tokenizer, mesh)
    return TextEvaluator(model.module, answers, items, mesh=mesh)


def evaluation_items(
    data: DataConfig,
    tokenizer: Tokenizer,
    named: bool,
    source: Mapping[str, Source] | None = None,
) -> Sequence[Item]:
    """Returns the examples of ``data.eval_split``: those that a run reports, or with ``named`` all.

    ``source`` has records by split, which replace the data set.
    """
    if named:
        return eval_examples(data, tokenizer, split=data.eval_split, source=source)
    items, _ = held_out(open_pair(data, source=source)[1], data, tokenizer)
    return items


def export_run(
    job: Job,
    folder: Path,
    state: TrainState,
    share: Callable[[str], None],
    *,
    write_extra: Callable[[Path], object] | None = None,
    target: Literal["peft", "embedding"] = "peft",
) -> AdapterSpec:
    """Writes PEFT files of the adapter, verifies them by reloading, and returns their adapters.

    A run that trains weights of the base writes the whole model instead.

    Args:
      job: the run.
      folder: new, or an earlier export, which is replaced.
      state: the state to export.
      share: makes a folder of the first process readable in all processes.
      write_extra: writes further files into the folder.
      target: see `export_adapter`.

    Raises:
      NaloraError: the files cannot be written, or differ from the trained adapter.
    """
    loaded = cast(LoadedModel, job.loaded)
    assembly = job.assembly
    if job.config.tune:
        return export_model(job, folder, state.lora)
    lora, spec = exportable_adapter(assembly, state.lora)
    processes.run_on_first_process(
        lambda: write_adapter(
            folder,
            loaded,
            lora,
            spec,
            write_extra=write_extra,
            target=target,
            overwrite=True,
        )
    )
    # All processes read the export in `_difference`.
    share(folder.name)
    difference = _difference(loaded, assembly, state.lora, folder, job.data.batches())
    # Lowered kernels were rounded to the base's dtype once. All other differences come from the
    # order of summation.
    rounded = assembly.initial is not None and job.config.compute.dtype == "bfloat16"
    # Also True for NaN.
    if not difference < (0.05 if rounded else 1e-3):
        raise NaloraError(
            str(folder),
            expected="the trained adapter's logits",
            found=f"a difference of {difference:.1e}",
        )
    log.info(
        "adapter: %s (read back: logits differ by at most %.1e)", folder, difference
    )
    return spec


# Names of arrays of images in a batch, see ``inputs`` of a model's image processor.
IMAGE_ARRAYS = ("pixels", "images", "features", "shares", "patches", "grids")


def _difference(
    loaded: LoadedModel,
    assembly: Assembly,
    lora: Any,
    folder: Path,
    batches: BatchIterator,
) -> float:
    """Returns the largest logit difference of trained and exported adapter on one training row.

    The trained adapter runs on the run's kernels, which may be lowered; the exported one, read from
    ``folder``, on the original base. All processes use the first one's row.
    """
    batch = next(iter(batches))
    names = ("tokens", "positions", "segment_ids", *IMAGE_ARRAYS)
    # [accumulate, rows, ...] -> [1, ...], the first row of the first micro-batch.
    row = {name: batch[name][0, :1] for name in names if name in batch}
    row = multihost_utils.broadcast_one_to_all(row)
    files, spec = import_adapter(folder, loaded.config, fingerprint=loaded.fingerprint)

    def logits(model: Decoder, params: Any, lora: Any) -> Any:
        """Returns the logits of every eighth token, ``[1, seq / 8, vocab]``, on the host."""

        @jax.jit
        def apply(variables: Any) -> jax.Array:
            """Returns the logits; every eighth token suffices and saves memory."""
            images = {}
            if loaded.processor is not None:
                inputs = loaded.processor.inputs(row)
                images["features"] = model.apply(
                    variables, *inputs, method="encode_images"
                )
            layout = {"positions": row["positions"], "segment_ids": row["segment_ids"]}
            hidden = model.apply(variables, row["tokens"], **layout, **images)
            return model.apply(variables, hidden[:, ::8], method="unembed")

        return processes.fetch(apply({"params": params, "lora": lora}))

    model = assembly.eval_model
    return max_logit_difference(
        lambda _: logits(model, assembly.params, lora),
        lambda _: logits(model.clone(adapters=spec), loaded.params, files),
        row["tokens"],
    )


def write_adapter(
    folder: Path,
    loaded: LoadedModel,
    lora: Mapping[str, Any],
    spec: AdapterSpec,
    *,
    write_extra: Callable[[Path], object] | None = None,
    **options: Any,
) -> float:
    """Writes PEFT files of an adapter and verifies them; returns the difference (`verify_export`).

    ``write_extra`` writes further files into the folder, and ``options`` are passed to
    `export_adapter`.
    """
    writers: list[Callable[[Path], object]] = []
    if loaded.added or loaded.resized:
        writers.append(tokenizer_writer(loaded))
    if write_extra is not None:
        writers.append(write_extra)

    def write_others(path: Path) -> None:
        """Writes the files that are no adapter's."""
        for write in writers:
            write(path)

    export_adapter(
        lora,
        spec,
        loaded.config,
        folder,
        base_model_name=original(loaded),
        base_weights=loaded.source if original(loaded) != loaded.source else "",
        fingerprint=loaded.fingerprint,
        rope_scaling=loaded.rope_scaling,
        write_extra=write_others,
        **options,
    )
    return verify_export(
        folder, lora, spec, loaded.config, fingerprint=loaded.fingerprint
    )


KIND = register_kind(
    Kind(
        name="text",
        open_inputs=open_inputs,
        build_step=build_step,
        evaluator=evaluator,
        export_run=export_run,
        evaluate=adapter_evaluator,
        program_parts=lambda config, processor: {},
    )
)
