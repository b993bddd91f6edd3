"""Opens sources of images by name, and finds their usable records."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.config import DataConfig, VisionConfig
from nalora_jax.data.images.files import Limits, open_image
from nalora_jax.data.images.sources import ImageSource, ListedImages, TfdsImages
from nalora_jax.data.tfds_source import prepared
from nalora_jax.downloads import cache_dir
from nalora_jax.errors import NaloraError
from nalora_jax.paths import expand_user

# Data sets of this library, with their default class field.
OWN = {"emoji": "category", "fashion_mnist": "label"}
_THREADS = 4


def open_images(config: DataConfig, vision: VisionConfig, split: str, *, cache: Path | None = None) -> ImageSource:
    """Returns the images of ``split`` of ``config.dataset``.

    Args:
      config: its ``dataset`` is one of this library's (`OWN`), ``"tfds:<name>"``, a folder, or a
        CSV or JSONL file.
      vision: names of the fields.
      split: a TFDS split expression; for a folder or a list also the path of another folder or
        list.
      cache: folder in which this library's data sets are prepared.

    Raises:
      NaloraError: no such data set, split, folder or field, or no records.
    """
    name = config.dataset
    if name.startswith("tfds:"):
        return TfdsImages(name, split, partial(_tfds, name.removeprefix("tfds:"), split, config.data_dir), vision)
    if name in OWN:
        return TfdsImages(name, split, partial(_own, name, split, cache or cache_dir()), _own_fields(name, vision))
    path = Path(split) if Path(split).exists() else expand_user(name)
    if not path.exists():
        raise NaloraError(
            "--data.dataset",
            expected='a data set of this library, "tfds:<name>", a folder of images, or a CSV or JSONL file',
            found=repr(name),
            remedy="the data sets are " + ", ".join(OWN),
        )
    return ListedImages(path, "train" if path == Path(split) else split, vision)


def usable(source: ImageSource, indices: Sequence[int], vision: VisionConfig) -> tuple[np.ndarray, list[str]]:
    """Returns the ``indices`` whose images can be read, and the errors of the others.

    Raises:
      NaloraError: an image cannot be read and ``vision.broken`` is "error", or none can be read.
    """
    limits = Limits(max_pixels=vision.max_pixels)

    def complaint(index: int) -> str:
        (record,) = source.read([index])
        try:
            where = source.where(index)
            open_image(source.image(record, where), where, limits)
        except NaloraError as error:
            if vision.broken == "error":
                raise
            return str(error)
        return ""

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(complaint, map(int, indices)))
    kept = np.array([i for i, text in zip(indices, found, strict=True) if not text], np.int64)
    bad = [text for text in found if text]
    if not len(kept):
        raise NaloraError(source.name, expected="at least one readable image", found=bad[0] if bad else "none")
    return kept, bad


def _own_fields(name: str, vision: VisionConfig) -> VisionConfig:
    if vision.label_field == "label":
        return replace(vision, label_field=OWN[name])
    return vision


def _own(name: str, split: str, cache: Path, **options: Any) -> Any:
    from tensorflow_datasets.core import registered

    with registered.skip_registration():  # TFDS has e.g. "fashion_mnist" too
        if name == "emoji":
            from nalora_jax.data.builders.emoji import Builder
        else:
            from nalora_jax.data.builders.fashion_mnist import Builder
    return prepared(lambda: Builder(data_dir=cache / "tfds", file_format="array_record")).as_data_source(
        split=split, **options
    )


def _tfds(name: str, split: str, data_dir: str, **options: Any) -> Any:
    import tensorflow_datasets as tfds

    return tfds.data_source(name, split=split, data_dir=data_dir or None, **options)
