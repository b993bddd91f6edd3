"""Builder of Fashion-MNIST (Zalando, MIT), read from Debian's package.

It has 28 x 28 grey pictures of ten kinds of clothing: the data of TFDS's ``fashion_mnist``
("tfds:fashion_mnist"), for machines that can reach a Debian mirror but not the data set's host. The
last 10,000 training pictures are the split "validation" here.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from nalora_jax.data.images import packages
from nalora_jax.data.images.files import pillow
from nalora_jax.errors import NaloraError

_RELEASE = "1.0.0"
CLASSES = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# Split: prefix of the file names, first picture, and the index after the last picture.
SPLITS = {"train": ("train", 0, 50_000), "validation": ("train", 50_000, 60_000), "test": ("t10k", 0, 10_000)}
_MAGIC = {2051: 3, 2049: 1}  # number of the idx format: dimensions


class Builder(tfds.core.GeneratorBasedBuilder):
    """``fashion_mnist``: ``image`` (encoded) and ``label``."""

    VERSION = tfds.core.Version(_RELEASE)
    RELEASE_NOTES = {_RELEASE: "First release."}  # noqa: RUF012 (TFDS reads this class attribute)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(CLASSES)),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            license="MIT",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # packages.fetch downloads, with its checksum
        return {split: self._generate_examples(*part) for split, part in SPLITS.items()}

    def _generate_examples(self, prefix: str, first: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        pixels = _idx(f"{prefix}-images-idx3-ubyte.gz")[first:stop]
        labels = _idx(f"{prefix}-labels-idx1-ubyte.gz")[first:stop]
        for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            buffer = io.BytesIO()
            pillow().fromarray(image).save(buffer, "PNG")
            yield index, {"image": buffer.getvalue(), "label": int(label)}


def _idx(name: str) -> np.ndarray:
    """Returns the uint8 array of an idx file."""
    content = gzip.decompress(packages.member(packages.FASHION_MNIST, name))
    magic = int.from_bytes(content[:4], "big")
    if magic not in _MAGIC:
        raise NaloraError(name, expected="an idx file of bytes", found=f"one that begins with {magic}")
    n = _MAGIC[magic]
    shape = tuple(int(v) for v in np.frombuffer(content, ">i4", n, 4))
    return np.frombuffer(content, np.uint8, offset=4 + 4 * n).reshape(shape)
