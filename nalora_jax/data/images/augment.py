"""Augmentation of training images: pure functions of a random generator, thus of (seed, step)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nalora_jax.config import VisionConfig
from nalora_jax.data.images.files import pillow

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
