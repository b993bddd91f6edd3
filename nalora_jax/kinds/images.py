"""Runs on conversations about images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nalora_jax.assembly.objectives import NextToken
from nalora_jax.assembly.program import Assembly
from nalora_jax.config import DataConfig, RunConfig, VisionConfig
from nalora_jax.config.checks import Limits, require, trained_tables
from nalora_jax.data.chat_templates import ImageTokens
from nalora_jax.data.images.image_chat import (
    ChatImages,
    decoding_limit,
    open_chats,
    row_images,
)
from nalora_jax.data.images.image_files import ImageProcessor
from nalora_jax.data.source import Source
from nalora_jax.data.sources import AUTO_SPLIT
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.text_evaluation import TextEvaluator
from nalora_jax.evaluate.vision import VisionEvaluator
from nalora_jax.kinds import text
from nalora_jax.kinds.inputs import open_records, resolve_base
from nalora_jax.kinds.record import Arrays, Inputs, register_kind
from nalora_jax.loading.adapted import AdaptedModel
from nalora_jax.mesh import distributed
from nalora_jax.method.step import Batch
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.vision.patch_config import PatchSpec
from nalora_jax.models.vision.patch_decoder import decoder_for
from nalora_jax.weights.base import limit_pixels, vision_files
from nalora_jax.weights.model_files import LoadedModel, open_files


def open_inputs(config: RunConfig, source: Mapping[str, Source] | None) -> Inputs:
    """Opens the model's files and the conversations, tokenizes them and settles the settings.

    Raises:
      NaloraError: a model or data that cannot be read, or settings that do not fit them.
    """
    files = open_files(
        resolve_base(config),
        images=True,
    )
    if files.config.vision is not None:
        files = limit_pixels(vision_files(files), config.vision)
    tokens = files.tokenizer.images
    train, held = open_records(
        config.data, vision_sources(config.data, config.vision, tokens, source)
    )
    inputs = text.tokenize_inputs(config, files, train, held)
    assert tokens is not None
    assert files.processor is not None
    data = inputs.data
    limit = decoding_limit(tokens, config.vision)
    images = row_images(train, data, tokens, files.processor, limit)
    return replace(inputs, data=replace(data, images=images), in_turns=True)


def evaluator(
    inputs: Inputs, loaded: LoadedModel, assembly: Assembly, items: Any
) -> TextEvaluator:
    """Returns the evaluator of some held-out conversations."""
    mesh = distributed.multi_device_mesh(assembly.mesh)
    return _vision_evaluator(loaded, assembly.eval_model, items, mesh)


def _vision_evaluator(
    loaded: LoadedModel, model: Any, items: Any, mesh: Mesh | None
) -> VisionEvaluator:
    """Returns the evaluator of items with images; ``model`` has the adapters' spec."""
    assert loaded.processor is not None
    return VisionEvaluator(model, loaded.tokenizer, items, loaded.processor, mesh=mesh)


def program_parts(config: RunConfig, processor: ImageProcessor) -> dict[str, Any]:
    """Returns the module and the objective of a vision-language model, for
    `nalora_jax.assembly.program.assemble`."""

    def objective(plain: NextToken) -> VisionNextToken:
        """Returns the objective on images, with the fields of the one on text."""
        # All fields of the plain objective, which is a frozen dataclass.
        fields = {
            field.name: getattr(plain, field.name)
            for field in dataclasses.fields(plain)
        }
        return VisionNextToken(**fields, processor=processor)

    return {"module": decoder_for, "objective": objective}


def adapter_evaluator(
    model: AdaptedModel, config: RunConfig, mesh: Mesh | None, named: bool
) -> TextEvaluator:
    """Returns the evaluator of a trained adapter on held-out conversations.

    See `text.adapter_evaluator`.
    """
    data = config.data
    splits = [data.train_split, data.eval_split]
    if named:
        splits = [data.eval_split]
    tokens = model.base.tokenizer.images
    source = vision_sources(data, config.vision, tokens, splits=splits)
    items = text.evaluation_items(data, model.base.tokenizer, named, source)
    return _vision_evaluator(model.base, model.module, items, mesh)


def limits(config: RunConfig) -> Iterator[Limits]:
    """Yields the values that other settings may have in a run on conversations about images."""
    vision = config.vision
    require("--vision.task", vision.reads_chats, '"chat"', repr(vision.task))
    yield Limits("--vision.task", {"tune": ((),)})
    for flag in trained_tables(config):
        yield Limits(flag, {"vision.task": ("",)})


def batch_arrays(config: RunConfig, base: ModelConfig, images: int) -> Arrays:
    """Returns the shapes of the images of a row and of their number."""
    assert base.vision is not None
    if isinstance(base.vision, PatchSpec) or base.vision.tiled:
        raise NaloraError(
            "--images",
            expected="a model whose images have one size",
            found=base.model_type,
            remedy="the plan of images of any shape is not implemented",
        )
    tower = base.vision.tower
    pixels = (images, tower.image_size, tower.image_size, tower.channels)
    return {"pixels": (pixels, "uint8"), "images": ((), "int32")}


@dataclass(frozen=True)
class VisionNextToken(NextToken):
    """`NextToken` of a vision-language model whose packed sequences contain images."""

    # `nalora_jax.data.images.image_files.ImageProcessor`: uint8 pixels to floats
    processor: Any = None

    def hidden(
        self, variables: Mapping[str, Any], batch: Batch, key: jax.Array, **options: Any
    ) -> jax.Array:
        """Returns hidden states, see `NextToken`.

        The batch also has ``pixels [rows, images, height, width, 3]`` and ``images [rows]``.
        """
        features = self.model.apply(
            variables,
            *self.processor.inputs(batch),
            deterministic=False,
            # Dropout of the image tower, independent of the decoder's.
            rngs={"dropout": jax.random.fold_in(key, 1)},
            method="encode_images",
        )
        return super().hidden(variables, batch, key, features=features, **options)


def vision_sources(
    data: DataConfig,
    vision: VisionConfig,
    tokens: ImageTokens | None,
    source: Mapping[str, Source] | None = None,
    *,
    splits: Sequence[str] | None = None,
) -> dict[str, Source]:
    """Returns the records of a run by split, converted by `ChatImages`, without broken images.

    Args:
      data, vision: the run's settings.
      tokens: the model's image tokens.
      source: records by split, which replace the data set of ``data``.
      splits: splits to open; the training and the evaluation split by default.

    Raises:
      NaloraError: bad data, or settings that truncate records, which would cut off images.
    """
    if tokens is None:
        raise NaloraError(
            "--model", expected="a vision-language model", found="a language model"
        )
    if data.too_long in ("truncate", "split"):
        raise NaloraError(
            "--data.too-long",
            expected="drop or error: half an image is none",
            found=data.too_long,
        )
    sources: dict[str, Source] = {}
    for split in dict.fromkeys(splits or (data.train_split, data.eval_split)):
        if split == AUTO_SPLIT:  # drawn from the training split
            continue
        if source is None:
            chats = open_chats(data, vision, split, tokens)
        elif split in source:
            chats = ChatImages(source[split], data, vision, tokens, Path.cwd())
        else:
            raise NaloraError(
                "source",
                expected=f"a split {split!r}",
                found=", ".join(sorted(source)) or "none",
            )
        sources[split] = chats.readable()
    return sources


KIND = register_kind(
    replace(
        text.KIND,
        name="images",
        open_inputs=open_inputs,
        evaluator=evaluator,
        evaluate=adapter_evaluator,
        program_parts=program_parts,
        limits=limits,
        batch_arrays=batch_arrays,
        subject="",
    )
)
