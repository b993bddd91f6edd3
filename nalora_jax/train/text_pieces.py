"""Builds the pieces of a run on text: base model, adapters, step, data and evaluators."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from jax.sharding import Mesh

from nalora_jax.common import trees
from nalora_jax.config import RunConfig
from nalora_jax.data.forms import in_turns
from nalora_jax.data.items import digest
from nalora_jax.data.pipeline import TrainData, train_data
from nalora_jax.data.questions import held_out
from nalora_jax.data.source import Source
from nalora_jax.data.tokenizer import AddedTokens
from nalora_jax.evaluate.seeing import evaluator_of
from nalora_jax.layout import distributed
from nalora_jax.method.step import TrainState
from nalora_jax.train.assembly import assemble
from nalora_jax.train.export import export
from nalora_jax.train.inputs import check_data, check_first, check_layout, check_longest, stream_shape
from nalora_jax.train.output import Output
from nalora_jax.train.pieces import Pieces, assembly_of
from nalora_jax.train.preference_pieces import preference_pieces
from nalora_jax.train.seeing import with_images
from nalora_jax.train.start import GRADIENT, adapter_start, gradient_start
from nalora_jax.weights.base import LoadedModel, load_model
from nalora_jax.weights.hub import ResolvedSource
from nalora_jax.weights.new_tokens import with_added

log = logging.getLogger(__name__)


def text_pieces(
    config: RunConfig,
    files: ResolvedSource,
    output: Output,
    mesh: Mesh,
    source: Mapping[str, Source] | None,
    like: Pieces | None = None,
) -> Pieces:
    """Builds the pieces of a run on text, or on conversations about images.

    Args:
      config: the run's settings, with a concrete mesh.
      files: files of the base model.
      output: the run's folder.
      mesh: its devices.
      source: records by split, if the caller passes them.
      like: pieces of a run with the same program, whose base and programs are shared.

    Raises:
      NaloraError: data or a model that cannot be read, or settings that do not fit them.
    """
    check_layout(config, files, mesh)
    train, _ = check_data(config.data, source)
    check_first(config, train, files)
    turns = config.vision.task == "chat" or in_turns(
        train.read([0])[0], config.data, config.preference.chosen_field
    )
    loaded = _load(config, files, mesh) if like is None else cast(LoadedModel, like.loaded)
    if config.preference.loss != "none":
        return replace(preference_pieces(config, loaded, mesh, source, output.share, like), in_turns=turns)
    assembly = assemble(
        config, loaded.config, loaded.params, mesh, processor=loaded.processor, like=assembly_of(like)
    )
    data = _train_data(config, loaded, mesh, source)
    if config.lora.init in GRADIENT:
        assembly = gradient_start(assembly, loaded.config, data, output)
    if config.adapter:
        assembly = adapter_start(assembly, loaded, output)
    reported, selecting = held_out(config.data, loaded.tokenizer, source=source)
    if like is not None and like.assembly.spec == assembly.spec:
        evaluator, selector = like.evaluator, like.selector
    else:
        evaluator, selector = (
            evaluator_of(loaded, assembly.eval_model, items, distributed.unless_single(mesh))
            for items in (reported, selecting)
        )

    def write(folder: Path, state: TrainState) -> Path:
        return export(config, folder, loaded, assembly, state, data.batches(), output.share)

    questions = {"reported": digest(reported), "selecting": digest(selecting)}
    return Pieces(loaded, assembly, data, evaluator, selector, questions, write, turns)


def _load(config: RunConfig, files: ResolvedSource, mesh: Mesh) -> LoadedModel:
    """Loads the base model onto the mesh."""
    started = time.perf_counter()
    kind = config.compute.quantized
    images = config.vision.task == "chat"
    loaded = load_model(files, dtype=config.compute.dtype, mesh=mesh, quantized=kind, images=images)
    loaded = with_added(loaded, AddedTokens.of(config.data), mesh)
    log.info(
        "%s: %.0f MB of parameters in %s, loaded in %.1f s",
        loaded.source,
        trees.size_bytes(loaded.params) / 1e6,
        f"{kind} and {config.compute.dtype}" if kind else config.compute.dtype,
        time.perf_counter() - started,
    )
    return loaded


def _train_data(
    config: RunConfig, loaded: LoadedModel, mesh: Mesh, source: Mapping[str, Source] | None
) -> TrainData:
    """Returns the packed sequences of this process, selected by the mesh."""
    shape = stream_shape(config, mesh) | {"context": loaded.config.max_positions}
    data = train_data(config.data, loaded.tokenizer, source=source, **shape)
    if loaded.config.sight is not None:
        assert source is not None
        data = with_images(data, config.data, config.vision, loaded, source)
    check_longest(int(data.store.lengths.max()), loaded.config)
    return data
