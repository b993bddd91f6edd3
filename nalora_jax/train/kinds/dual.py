"""Runs on dual encoders: images with classes or captions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from nalora_jax.config import RunConfig, VisionConfig
from nalora_jax.data.images.opened import (
    ImageData,
    ImageSource,
    caption_tokens,
    draw_shots,
    open_images,
    readable,
)
from nalora_jax.data.packing import permutation
from nalora_jax.data.source import Source
from nalora_jax.data.sources import AUTO, check_disjoint
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.images import ClassEvaluator, Encoders, Images, RetrievalEvaluator
from nalora_jax.layout import distributed
from nalora_jax.layout.distributed import platform_of
from nalora_jax.method.step import TrainState
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.models.vision.dual import DualEncoder
from nalora_jax.ops.numerics import numerics_for
from nalora_jax.train.assembly import Assembly
from nalora_jax.train.dual import assemble_dual, resolve_dual, trains_text
from nalora_jax.train.dual_objectives import CLASSES
from nalora_jax.train.inputs import settled, stream_shape
from nalora_jax.train.job import Inputs, Job
from nalora_jax.train.output import Output
from nalora_jax.weights.dual import JOIN, LoadedDual, load_dual
from nalora_jax.weights.peft_dual import export_dual_adapter, verify_dual_export

log = logging.getLogger(__name__)

_SEED = 20260101  # seed of the held-out draw, the same for every run


@dataclass(frozen=True)
class ImageRecords:
    """Training records of a run on images, without unreadable images."""

    source: ImageSource
    indices: np.ndarray  # indices of the training records, ascending
    classes: tuple[str, ...]  # empty if the records have captions
    labels: np.ndarray | None  # int32, by the source's index


def image_records(config: RunConfig) -> tuple[ImageRecords, ImageSource]:
    """Returns training records and held-out source of a run with ``vision.task``, without a model.

    Raises:
      NaloraError: bad data, or records that are both trained on and held out.
    """
    data, vision = config.data, config.vision
    source = open_images(data, vision, data.train_split)
    held = open_images(data, vision, "validation" if data.eval_split == AUTO else data.eval_split)
    check_disjoint(source, held)
    classes: tuple[str, ...] = ()
    if vision.task == "classify":
        classes = source.classes()
    return trained_on(config, source, classes), held


def trained_on(config: RunConfig, source: ImageSource, classes: tuple[str, ...]) -> ImageRecords:
    """Returns the training images of ``source``: all, or ``vision.shots`` of each class.

    Each image is opened; unreadable images are left out.
    """
    data, vision = config.data, config.vision
    labels, indices = None, np.arange(len(source))
    if classes:
        labels = source.labels(classes)
        indices = draw_shots(labels, classes, vision.shots, config.seed)
    if data.train_limit:
        indices = np.sort(indices[permutation(len(indices), config.seed)[: data.train_limit]])
    return ImageRecords(source, readable(source, indices, vision), classes, labels)


def open_inputs(config: RunConfig, source: Mapping[str, Source] | None) -> Inputs:
    """Opens the images and settles the settings.

    Raises:
      NaloraError: bad data, or records given from Python.
    """
    del source
    records, held = image_records(config)
    config = settled(config, 0, len(records.indices), "images")
    images = tuple(Images(held, indices) for indices in held_out_indices(config, held))
    questions = {"reported": images[0].digest, "selecting": images[1].digest}
    return Inputs(config, None, None, records, (images[0], images[1]), questions)


def build_step(
    inputs: Inputs, placed: RunConfig, mesh: Mesh, output: Output, like: Job | None
) -> tuple[LoadedDual, Assembly, ImageData]:
    """Loads both towers, and builds adapters, step and this process's rows.

    ``like`` is a job with the same program. Its base is shared, unless the seed draws the projections
    between two separate towers.

    Raises:
      NaloraError: bad settings or files.
    """
    del output
    records, vision, compute = inputs.data, placed.vision, placed.compute
    if like is None or JOIN in placed.model:
        loaded = load_dual(
            placed.model,
            dtype=compute.dtype,
            mesh=mesh,
            d_out=vision.features,
            loss=vision.loss,
            seed=placed.seed,
            image_size=vision.image_size,
        )
        params = with_classes(placed, loaded, records.classes, mesh)
    else:
        loaded, params = cast(LoadedDual, like.loaded), like.assembly.params
    assembly = assemble_dual(placed, loaded.config, params, mesh, loaded.processor)
    return loaded, assembly, image_data(placed, loaded, records, mesh)


def evaluators(
    inputs: Inputs, loaded: LoadedDual, assembly: Assembly, like: Job | None
) -> tuple[ClassEvaluator | RetrievalEvaluator, ClassEvaluator | RetrievalEvaluator]:
    """Returns the evaluators of the held-out images."""
    del like
    encoders = Encoders(assembly.eval_model, loaded.processor, loaded.tokenizer)
    reported, selecting = (
        image_evaluator(encoders, images, inputs.data.classes, inputs.config.vision)
        for images in inputs.held_out
    )
    return reported, selecting


def export_run(job: Job, folder: Path, state: TrainState, share: Callable[[str], None]) -> None:
    """Writes PEFT files of the trained adapter and verifies that a reload is bitwise equal."""
    del share
    loaded, assembly = cast(LoadedDual, job.loaded), job.assembly
    lora = jax.tree.map(distributed.fetch, state.lora)
    distributed.on_first_process(
        lambda: write_dual_adapter(folder, loaded, lora, assembly.spec, overwrite=True)
    )
    log.info("adapter: %s (read back: every number is equal)", folder)


def with_classes(
    config: RunConfig, loaded: LoadedDual, classes: tuple[str, ...], mesh: Mesh
) -> dict[str, Any]:
    """Adds the class prompts to the weights; as features if training does not change them."""
    if not classes:
        return loaded.params
    spec = resolve_dual(config, loaded.config)
    if trains_text(spec, loaded.config):
        prompts = [template.format(name) for name in classes for template in config.vision.templates]
        tokens = loaded.tokenizer(prompts)
        shape = (len(classes), len(config.vision.templates), -1)
        inputs: dict[str, Any] = {name: value.reshape(shape) for name, value in tokens.items()}
    else:
        numerics = numerics_for(config.compute.dtype, platform_of(mesh), config.compute.implementation)
        encoders = Encoders(
            DualEncoder(loaded.config, numerics=numerics), loaded.processor, loaded.tokenizer
        )
        features = encoders.classes({"params": loaded.params}, classes, config.vision.templates)
        inputs = {"features": features}
        log.info("class prompts: %d features made once, since the text tower stays as it is", len(features))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays = {
        name: jax.make_array_from_callback(value.shape, replicated, value.__getitem__)
        for name, value in inputs.items()
    }
    return {**loaded.params, CLASSES: arrays}


def image_data(config: RunConfig, loaded: LoadedDual, records: ImageRecords, mesh: Mesh) -> ImageData:
    """Returns the training rows of a run: images with classes, or with captions."""
    vision = config.vision
    source, indices = records.source, records.indices
    tokens = None
    if not records.classes:
        tokens = caption_tokens(source, indices, loaded.tokenizer, vision)
    image, size = loaded.config.image, loaded.processor.patch_size
    if image.any_shape and size != image.patch_size:
        where = "preprocessor_config.json: patch_size"
        raise NaloraError(where, expected=image.patch_size, found=size)
    return ImageData(
        source,
        indices,
        loaded.processor,
        vision,
        labels=records.labels,
        tokens=tokens,
        workers=config.data.workers,
        **stream_shape(config, mesh),
    )


def held_out_images(
    config: RunConfig, source: ImageSource, encoders: Encoders, classes: tuple[str, ...]
) -> tuple[Any, Any]:
    """Returns the evaluator of the reported results, and the one that selects the checkpoint."""
    reported, selecting = (
        image_evaluator(encoders, Images(source, indices), classes, config.vision)
        for indices in held_out_indices(config, source)
    )
    return reported, selecting


def held_out_indices(config: RunConfig, source: ImageSource) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices of the reported images, and of images that select the checkpoint."""
    data = config.data
    indices = drawn_images(
        source, data.eval_limit + data.select_limit if data.eval_limit else 0, config.vision
    )
    cut = max(1, min(data.select_limit, len(indices) // 3))
    return np.sort(indices[cut:]), np.sort(indices[:cut])


def drawn_images(source: ImageSource, limit: int, vision: VisionConfig) -> np.ndarray:
    """Returns indices of ``limit`` readable held-out images (0: all), drawn by a fixed seed.

    Raises:
      NaloraError: fewer than two are left.
    """
    indices = readable(source, permutation(len(source), _SEED)[: limit or len(source)], vision)
    if len(indices) < 2:
        raise NaloraError("--data.eval-split", expected="at least two images", found=len(indices))
    return indices


def image_evaluator(
    encoders: Encoders, images: Images, classes: tuple[str, ...], vision: VisionConfig
) -> ClassEvaluator | RetrievalEvaluator:
    """Returns the evaluator of ``images``: by classes, or by captions without classes."""
    if not classes:
        return RetrievalEvaluator(encoders, images, images.source.captions(images.indices.tolist()))
    labels = images.source.labels(classes)[images.indices]
    return ClassEvaluator(encoders, images, labels, classes, vision.templates)


def write_dual_adapter(
    folder: Path, loaded: LoadedDual, lora: Mapping[str, Any], spec: AdapterSpec, *, overwrite: bool = False
) -> None:
    """Writes PEFT files of an adapter and verifies that a reload is bitwise equal."""
    config, mark = loaded.config, loaded.fingerprint
    export_dual_adapter(
        lora, spec, config, folder, base_model_name=loaded.source, fingerprint=mark, overwrite=overwrite
    )
    verify_dual_export(folder, lora, spec, config, mark)
