"""Opens sources of images by name, and finds their usable records."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from nalora_jax.common.downloads import cache_dir
from nalora_jax.common.files import expand_user
from nalora_jax.common.registry import Registry
from nalora_jax.config import DataConfig, VisionConfig
from nalora_jax.data.images.files import Limits, open_image
from nalora_jax.data.images.sources import ImageSource, ListedImages, TfdsImages
from nalora_jax.data.tfds_source import open_tfds
from nalora_jax.errors import NaloraError

log = logging.getLogger(__name__)

# Opens a split of a registered data set: (split, fields, cache) -> source.
ImageOpener = Callable[[str, VisionConfig, Path], ImageSource]
IMAGE_SETS: Registry[ImageOpener] = Registry("image data set", "nalora_jax.image_sources")
_THREADS, _SHOWN = 4, 20  # threads that check images; maximum of errors in the log


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
        opener = partial(open_tfds, name.removeprefix("tfds:"), split, config.data_dir)
        return TfdsImages(name, split, opener, vision)
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


def readable(source: ImageSource, indices: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """Returns the ``indices`` whose images can be read; see `places_without_error`."""
    limits = Limits(max_pixels=vision.max_pixels)

    def check(place: int) -> None:
        index = int(indices[place])
        (record,) = source.read([index])
        open_image(source.image(record, source.where(index)), source.where(index), limits)

    places = places_without_error(source.name, len(indices), check, vision.broken)
    return np.asarray(indices, np.int64)[places]


def places_without_error(name: str, count: int, check: Callable[[int], None], broken: str) -> np.ndarray:
    """Returns the places of ``count`` records that pass a check; logs the others.

    Args:
      name: of the source.
      count: number of records.
      check: opens the images of the record at a place.
      broken: ``vision.broken``.

    Raises:
      NaloraError: ``check`` raises it and ``broken`` is "error", or no record passes.
    """

    def error_of(place: int) -> str:
        try:
            check(place)
        except NaloraError as error:
            if broken == "error":
                raise
            return str(error)
        return ""

    with ThreadPoolExecutor(_THREADS) as pool:
        errors = list(pool.map(error_of, range(count)))
    bad = [text for text in errors if text]
    for text in bad[:_SHOWN]:
        log.warning("left out: %s", text)
    if len(bad) > _SHOWN:
        log.warning("left out: %d more records", len(bad) - _SHOWN)
    if len(bad) == count:
        found = next(iter(bad), "none")
        raise NaloraError(name, expected="at least one record with readable images", found=found)
    return np.flatnonzero([not text for text in errors])
