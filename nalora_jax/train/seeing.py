"""Training data of conversations about images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nalora_jax.config import DataConfig, VisionConfig
from nalora_jax.data.image_tokens import ImageTokens
from nalora_jax.data.images.chat import ChatImages, open_chats
from nalora_jax.data.images.files import Limits
from nalora_jax.data.images.rows import row_images
from nalora_jax.data.pipeline import TrainData
from nalora_jax.data.source import Source
from nalora_jax.data.sources import AUTO, open_train
from nalora_jax.errors import NaloraError
from nalora_jax.weights.base import LoadedModel


def seen_sources(
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
        raise NaloraError("--model", expected="a model that sees images", found="a language model")
    if data.too_long in ("truncate", "split"):
        raise NaloraError(
            "--data.too-long", expected="drop or error: half an image is none", found=data.too_long
        )
    sources: dict[str, Source] = {}
    for split in dict.fromkeys(splits or (data.train_split, data.eval_split)):
        if split == AUTO:  # drawn from the training split
            continue
        if source is None:
            chats = open_chats(data, vision, split, tokens)
        elif split in source:
            chats = ChatImages(source[split], data, vision, tokens, Path.cwd())
        else:
            raise NaloraError(
                "source", expected=f"a split {split!r}", found=", ".join(sorted(source)) or "none"
            )
        sources[split] = chats.readable()
    return sources


def with_images(
    data: TrainData,
    config: DataConfig,
    vision: VisionConfig,
    loaded: LoadedModel,
    source: Mapping[str, Source],
) -> TrainData:
    """Adds the images of the records to the training rows."""
    tokens, processor = loaded.tokenizer.images, loaded.processor
    assert tokens is not None
    assert processor is not None
    trained, limits = open_train(config, source=source), Limits(max_pixels=vision.max_pixels)
    return replace(data, images=row_images(trained, data.store, data.pattern, tokens, processor, limits))
