"""TFDS builders of this library's data sets, read from one pinned package.

`Commonsense` has nine question-answering tasks. The package stores each task as evaluation requests: one
row per choice, with worked examples (shots) before the question. A record here contains only the question.
Every task has two configs: the completions of ``<task>`` are full texts; the prompt of ``<task>_mc`` lists
the choices and its completions are letters. `Needle` hides numbers in paragraphs of Wikipedia; its config
is the largest number of words, ``needle/4000``, and training texts and held-out texts come from different
passages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from nalora_jax.common.downloads import fetch_file
from nalora_jax.data import tasks
from nalora_jax.errors import NaloraError


class Commonsense(tfds.core.GeneratorBasedBuilder):
    """``commonsense/<task>`` and ``commonsense/<task>_mc``; records in the order of the source."""

    VERSION = tfds.core.Version(tasks.VERSION)
    RELEASE_NOTES = {tasks.VERSION: "First release."}  # noqa: RUF012 (TFDS reads this class attribute)
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS reads this class attribute)
        tfds.core.BuilderConfig(
            name=name,
            description=f"{tasks.task_of(name)[0]}, answered by {'letters' if name.endswith('_mc') else 'full texts'}",
        )
        for name in tasks.NAMES
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = {
            "id": text(doc="identifier in the source"),
            "prompt": text(doc="the question; of the right choice where choice_prompts is not empty"),
            "completion": text(doc="the right answer, with its leading space"),
            "choices": tfds.features.Sequence(text(), doc="answers to choose from, without leading space"),
            "choice_prompts": tfds.features.Sequence(
                text(), doc="one prompt per choice, where the prompts differ"
            ),
            "gold": tfds.features.Scalar(np.int32, doc="index of the right choice"),
        }
        config = self.builder_config
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Commonsense question answering. This config: {config.description}.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("prompt", "completion"),
            license=tasks.LICENCES[tasks.task_of(config.name)[0]],
            disable_shuffling=True,  # readers shuffle; train[:100] is the source's
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        # Not dl_manager: downloads.fetch_file downloads, with its checksum.
        name = self.builder_config.name
        return {
            split: self._generate_examples(name, split) for split in tasks.SIZES[tasks.task_of(name)[0]]
        }

    def _generate_examples(self, name: str, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        path = fetch_file(tasks.package_file(name, split))
        count = 0
        for count, row in enumerate(tasks.questions(path), start=1):
            yield count - 1, _record(row)
        size = tasks.SIZES[tasks.task_of(name)[0]][split]
        if count != size:
            raise NaloraError(
                str(path), expected=f"{size} questions", found=count, remedy="delete it and run again"
            )


def _record(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of a question, built from its first request."""
    doc, gold = row["doc"], int(row["label"])
    name = row["doc_id"] if row["native_id"] is None else row["native_id"]
    if "query" not in doc:
        return {
            "id": str(name),
            "gold": gold,
            **_fill_in(doc["sentence"], [doc["option1"], doc["option2"]], gold),
        }
    return {
        "id": str(name),
        "prompt": doc["query"],
        "completion": f" {doc['choices'][gold]}",
        "choices": doc["choices"],
        "choice_prompts": [],
        "gold": gold,
    }


def _fill_in(sentence: str, options: list[str], gold: int) -> dict[str, Any]:
    """Returns the record of a sentence with a blank.

    Each option completes the prompt; the text after the blank is scored.

    Example:
      >>> _fill_in("Ian met Bob because _ was home.", ["Ian", "Bob"], 1)["choice_prompts"]
      ['Ian met Bob because Ian', 'Ian met Bob because Bob']
    """
    before, after = sentence.split("_", 1)
    prompts = [before + option for option in options]
    return {
        "prompt": prompts[gold],
        "completion": f" {after.strip()}",
        "choices": options,
        "choice_prompts": prompts,
    }


class Needle(tfds.core.GeneratorBasedBuilder):
    """``needle/<words>``; records in the order of their numbers."""

    VERSION = tfds.core.Version(tasks.NEEDLE_VERSION)
    RELEASE_NOTES = {tasks.NEEDLE_VERSION: "First release."}  # noqa: RUF012 (TFDS reads this class attribute)
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS reads this class attribute)
        tfds.core.BuilderConfig(name=str(length), description=f"texts of at most {length} words")
        for length in tasks.LENGTHS
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
            description=f"Needle retrieval in paragraphs of Wikipedia. This config: {self.builder_config.description}.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("prompt", "completion"),
            license=tasks.LICENCES["boolq"],
            disable_shuffling=True,  # readers shuffle
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        # Not dl_manager: downloads.fetch_file downloads, with its checksum.
        return {split: self._generate_examples(split) for split in tasks.NEEDLE_SIZES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(tasks.needle_records(split, int(self.builder_config.name)))
