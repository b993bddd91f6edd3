"""Builder of needle retrieval: numbers hidden in paragraphs of Wikipedia, from one pinned package.

The config is the largest number of words, ``needle/4000``. Training texts and held-out texts come from
different passages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from nalora_jax.data import needle, tasks


class Builder(tfds.core.GeneratorBasedBuilder):
    """``needle/<words>``; records in the order of their numbers."""

    VERSION = tfds.core.Version(needle.VERSION)
    RELEASE_NOTES = {needle.VERSION: "First release."}  # noqa: RUF012 (TFDS reads this class attribute)
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS reads this class attribute)
        tfds.core.BuilderConfig(name=str(length), description=f"texts of at most {length} words")
        for length in needle.LENGTHS
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        text, number = tfds.features.Text, tfds.features.Scalar
        features = {
            "prompt": text(doc="text with the needle, and the question"),
            "completion": text(doc="the number, with its leading space"),
            "depth": number(np.int32, doc="percent of the text before the needle"),
            "length": number(np.int32, doc="largest number of words of the text"),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{__doc__}\nThis config: {self.builder_config.description}.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("prompt", "completion"),
            license=tasks.LICENCES["boolq"],
            disable_shuffling=True,  # readers shuffle
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # downloads.fetch downloads, with its checksum
        return {split: self._generate_examples(split) for split in needle.SIZES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(needle.needle_records(split, int(self.builder_config.name)))
