"""Images of packed sequences: their records, image slots per sequence, and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nalora_jax.data.forms import IMAGES
from nalora_jax.data.image_tokens import ImageTokens
from nalora_jax.data.images.chat import opened
from nalora_jax.data.images.files import Limits
from nalora_jax.data.images.processor import ImageProcessor
from nalora_jax.data.packing import Pattern
from nalora_jax.data.source import Source
from nalora_jax.data.store import TokenStore


@dataclass(frozen=True, eq=False)
class RowImages:
    """Images of batches of packed sequences.

    A batch has uint8 ``pixels`` and int32 ``images``, the number of images in each row. The images
    of a row are in the order of its image tokens; slots after the first ``images`` are black and
    unused.
    """

    source: Source  # with images in its records (`nalora_jax.data.images.chat`)
    records: np.ndarray  # int64 [examples], indices into the source
    processor: ImageProcessor
    limits: Limits
    places: int

    def batch(self, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the images of rows, each of which is an array of examples."""
        shape = self.processor.output
        assert shape is not None
        pixels = np.zeros((len(rows), self.places, *shape, 3), np.uint8)
        counts = np.zeros(len(rows), np.int32)
        for row, examples in enumerate(rows):
            for example in examples.tolist():
                record = int(self.records[example])
                for encoded in self.source.read([record])[0][IMAGES]:
                    image = opened(encoded, self.source.where(record), self.limits)
                    pixels[row, counts[row]] = self.processor(image)["pixels"]
                    counts[row] += 1
        return {"pixels": pixels, "images": counts}


def row_images(
    source: Source,
    store: TokenStore,
    pattern: Pattern,
    tokens: ImageTokens,
    processor: ImageProcessor,
    limits: Limits,
) -> RowImages:
    """Returns the images of the rows that ``pattern`` packs from ``store``.

    ``store`` has the tokens of ``source``.
    """
    places = places_of(pattern, store.lengths, images_of(store, tokens))
    return RowImages(source, store.records, processor, limits, places)


def images_of(store: TokenStore, tokens: ImageTokens) -> np.ndarray:
    """Returns the number of images of each example: int ``[examples]``."""
    sums = np.add.reduceat((store.tokens == tokens.token_id).astype(np.int64), store.offsets[:-1])
    return sums // tokens.count


def places_of(pattern: Pattern, lengths: np.ndarray, images: np.ndarray) -> int:
    """Returns the maximum number of images of a row over all epochs, at least 1.

    The slots of a row have fixed lengths; every epoch draws another example of that length for each
    slot.
    """
    most = np.zeros(int(lengths.max()) + 1, np.int64)
    np.maximum.at(most, lengths, images)
    return max(1, int(np.add.reduceat(most[pattern.lengths], pattern.starts[:-1]).max()))
