"""Opens sources of images by name, and finds their usable records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.config import DataConfig, VisionConfig
from nalora_jax.data.images.files import Limits, open_image
from nalora_jax.data.images.sources import ImageSource, ListedImages, TfdsImages
from nalora_jax.downloads import cache_dir
from nalora_jax.errors import NaloraError
from nalora_jax.paths import expand_user
from nalora_jax.registry import Registry

# Opens a split of a registered data set: (split, fields, cache) -> source.
ImageOpener = Callable[[str, VisionConfig, Path], ImageSource]
IMAGE_SETS: Registry[ImageOpener] = Registry("image data set", "nalora_jax.image_sources")
_THREADS = 4


def register_images(name: str) -> Callable[[ImageOpener], ImageOpener]:
    """Returns a decorator that makes a function ``(split, fields, cache) -> ImageSource`` selectable."""
    return IMAGE_SETS.decorator(name)


def open_images(
    config: DataConfig, vision: VisionConfig, split: str, *, cache: Path | None = None
) -> ImageSource:
    """Returns the images of ``split`` of ``config.dataset``.

    Args:
      config: its ``dataset`` is the name of a registered data set (`register_images`),
        ``"tfds:<name>"``, a folder, or a CSV or JSONL file.
      vision: names of the fields.
      split: a TFDS split expression; for a folder or a list also the path of another folder or
        list.
      cache: folder in which registered data sets are prepared.

    Raises:
      NaloraError: no such data set, split, folder or field, or no records.
    """
    name = config.dataset
    if name.startswith("tfds:"):
        return TfdsImages(
            name, split, partial(_tfds, name.removeprefix("tfds:"), split, config.data_dir), vision
        )
    if name in IMAGE_SETS:
        return IMAGE_SETS.get(name)(split, vision, cache or cache_dir())
    path = expand_user(name)
    if Path(split).exists():
        path, split = Path(split), "train"
    if not path.exists():
        expected = 'a registered data set, "tfds:<name>", a folder of images, or a CSV or JSONL file'
        remedy = f"--import FILE registers data sets; registered: {', '.join(IMAGE_SETS.names()) or 'none'}"
        raise NaloraError("--data.dataset", expected=expected, found=repr(name), remedy=remedy)
    return ListedImages(path, split, vision)


def usable(
    source: ImageSource, indices: Sequence[int], vision: VisionConfig
) -> tuple[np.ndarray, list[str]]:
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
        complaints = list(pool.map(complaint, map(int, indices)))
    readable = np.array([i for i, text in zip(indices, complaints, strict=True) if not text], np.int64)
    bad = [text for text in complaints if text]
    if not len(readable):
        expected = "at least one readable image"
        raise NaloraError(source.name, expected=expected, found=next(iter(bad), "none"))
    return readable, bad


def _tfds(name: str, split: str, data_dir: str, **options: Any) -> Any:
    import tensorflow_datasets as tfds

    return tfds.data_source(name, split=split, data_dir=data_dir or None, **options)
