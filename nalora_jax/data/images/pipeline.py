"""Batches of images, classes and captions."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from nalora_jax.config import VisionConfig
from nalora_jax.data.images.files import Limits, open_image, pillow
from nalora_jax.data.images.opened import ImageSource
from nalora_jax.data.images.processor import ImageProcessor, TextTokenizer
from nalora_jax.data.packing import permutation
from nalora_jax.data.pipeline import HostBatch, Stream
from nalora_jax.errors import NaloraError

log = logging.getLogger(__name__)


def draw_shots(labels: np.ndarray, classes: Sequence[str], shots: int, seed: int) -> np.ndarray:
    """Returns the ascending indices of ``shots`` records of every class; with 0, of all records.

    Draws are nested: fewer shots are a subset of more shots. A class with fewer records
    contributes all of them.

    Raises:
      NaloraError: a class has no records.
    """
    if not shots:
        return np.arange(len(labels))
    chosen: list[np.ndarray] = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if not len(members):
            raise NaloraError(f"class {name!r}", expected="at least one training image", found="none")
        if len(members) < shots:
            log.warning(
                "class %r has %d training images, fewer than --vision.shots %d",
                name,
                len(members),
                shots,
            )
        chosen.append(members[permutation(len(members), seed, label)[:shots]])
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True, eq=False)
class ImageData(Stream):
    """Training records of a run as an endless stream of rows.

    A batch has ``pixels``
    (and ``shapes``, ``mask``) of `ImageProcessor`, ``labels`` int32 if there are classes, and
    ``tokens``, ``token_weights`` if there are captions; each ``[accumulate, rows, ...]``.
    """

    source: ImageSource
    indices: np.ndarray  # training records, as indices into the source
    processor: ImageProcessor
    vision: VisionConfig
    seed: int
    labels: np.ndarray | None = None  # int32, by the source's index
    tokens: dict[str, np.ndarray] | None = None  # of captions, by the position in ``indices``

    @cached_property
    def _order(self) -> Callable[[int], np.ndarray]:
        count = len(self.indices)
        return lru_cache(maxsize=2)(lambda epoch: permutation(count, self.seed, epoch))

    @property
    def rows_per_epoch(self) -> int:
        """Returns the number of rows of an epoch, in which every record appears once."""
        return len(self.indices)

    @property
    def fingerprint(self) -> str:
        """Returns the identity of the stream: the same on any number of hosts and at any batch size."""
        v = self.vision
        chosen = hashlib.sha256(self.indices.tobytes()).hexdigest()[:16]
        return f"{self.source.fingerprint}:{chosen}:{v.augment}:{v.crop_area}:{self.seed}"

    def describe(self) -> dict[str, Any]:
        """Returns figures for the log."""
        return {
            "images": len(self.indices),
            "of": len(self.source),
            "steps_per_epoch": round(len(self.indices) / self.batch_size, 2),
        }

    def arrays(self, rows: list[int]) -> HostBatch:
        """Returns the arrays of these rows; images are opened and augmented."""
        epochs, positions = np.divmod(rows, len(self.indices))
        places = np.array([self._order(int(e))[p] for e, p in zip(epochs, positions, strict=True)])
        indices = self.indices[places]
        prepared = []
        for row, index, record in zip(
            rows, indices.tolist(), self.source.read(indices.tolist()), strict=True
        ):
            where = self.source.where(index)
            image = open_image(
                self.source.image(record, where), where, Limits(max_pixels=self.vision.max_pixels)
            )
            prepared.append(self.processor(augmented(image, self.vision, generator(self.seed, row))))
        batch = {name: np.stack([arrays[name] for arrays in prepared]) for name in prepared[0]}
        if self.labels is not None:
            batch["labels"] = self.labels[indices]
        if self.tokens is not None:
            batch |= {name: value[places] for name, value in self.tokens.items()}
        return batch


def caption_tokens(
    source: ImageSource, indices: np.ndarray, tokenizer: TextTokenizer, vision: VisionConfig
) -> dict[str, np.ndarray]:
    """Returns ``tokens`` and ``token_weights`` of the captions of ``indices``, ``[records, seq]``."""
    limit = vision.caption_length
    if limit > tokenizer.max_length:
        length = limit
        raise NaloraError(
            "--vision.caption-length", expected=f"at most {tokenizer.max_length}", found=length
        )
    captions = source.captions(indices.tolist())
    tokens = tokenizer(captions)
    if limit and tokens["tokens"].shape[1] > limit and not tokenizer.fixed:
        tokens = tokenizer(captions, length=limit)
    return tokens


# ---------------------------------------------------------------- augmentation
#
# Pure functions of a random generator, thus of (seed, step).


_RATIO = (3 / 4, 4 / 3)  # aspect ratios of a crop, width over height
_TRIES = 10


def generator(*key: int) -> np.random.Generator:
    """Returns a random generator that depends on ``key`` alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def augmented(image: Any, vision: VisionConfig, rng: np.random.Generator) -> Any:
    """Returns ``image`` (RGB), cropped and mirrored at random as ``vision.augment`` allows.

    A crop has at least ``vision.crop_area`` of the image's area and an aspect ratio between 3/4 and
    4/3, as in torchvision's RandomResizedCrop; the processor resizes it later.
    """
    if vision.augment == "none":
        return image
    if vision.augment == "crop":
        image = image.crop(crop_box(image.width, image.height, vision.crop_area, rng))
    if rng.random() < 0.5:
        image = image.transpose(pillow().Transpose.FLIP_LEFT_RIGHT)
    return image


def crop_box(
    width: int, height: int, smallest: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Returns the left, upper, right and lower border of a random crop."""
    for _ in range(_TRIES):
        area = rng.uniform(smallest, 1.0) * width * height
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height
