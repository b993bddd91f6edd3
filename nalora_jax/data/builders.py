"""TFDS builders of this library's data sets, read from one pinned package.

`Commonsense` has nine question-answering tasks. The package stores each task as evaluation
requests: one row per choice, with worked examples (shots) before the question. A record here
  contains only the question.
Every task has two configs: the completions of ``<task>`` are full texts; the prompt of
``<task>_mc`` lists the choices and its completions are letters. `Needle` hides numbers in
paragraphs of Wikipedia; its config is the largest number of words, ``needle/4000``, and training
texts and held-out texts come from different passages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from nalora_jax.common.downloads import fetch_file
from nalora_jax.data import tasks
from nalora_jax.errors import NaloraError

Splits = dict[str, Iterator[tuple[int, dict[str, Any]]]]
_ANSWERS = {"mc": "letters", "rc": "full texts"}  # of each completion form


def _description(name: str) -> str:
    """Returns the description of a config such as "boolq_mc"."""
    task, form = tasks.task_of(name)
    return f"{task}, answered by {_ANSWERS[form]}"


class Commonsense(tfds.core.GeneratorBasedBuilder):
    """``commonsense/<task>`` and ``commonsense/<task>_mc``; records in the order of the source."""

    VERSION = tfds.core.Version(tasks.VERSION)
    # TFDS reads these class attributes.
    RELEASE_NOTES = {tasks.VERSION: "First release."}  # noqa: RUF012
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=name, description=_description(name))
        for name in tasks.NAMES
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        """Returns the fields of a record and the license of the task."""
        text = tfds.features.Text
        config = self.builder_config
        features = {
            "id": text(doc="identifier in the source"),
            "prompt": text(
                doc="the question; of the right choice where choice_prompts is not empty"
            ),
            "completion": text(doc="the right answer, with its leading space"),
            "choices": tfds.features.Sequence(
                text(), doc="answers to choose from, without leading space"
            ),
            "choice_prompts": tfds.features.Sequence(
                text(), doc="one prompt per choice, where the prompts differ"
            ),
            "gold": tfds.features.Scalar(np.int32, doc="index of the right choice"),
        }
        about = f"Commonsense question answering. This config: {config.description}."
        return _info(self, features, about, tasks.task_of(config.name)[0])

    def _split_generators(self, dl_manager: Any) -> Splits:
        """Returns the records of every split of the task, by number."""
        # Not dl_manager: downloads.fetch_file downloads, with its checksum.
        name = self.builder_config.name
        task, _ = tasks.task_of(name)
        return {
            split: self._generate_examples(name, split) for split in tasks.SIZES[task]
        }

    def _generate_examples(
        self, name: str, split: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the number and the record of every question of a split."""
        path = fetch_file(tasks.package_file(name, split))
        count = 0
        for count, row in enumerate(tasks.questions(path), start=1):
            yield count - 1, _record(row)
        task, _ = tasks.task_of(name)
        size = tasks.SIZES[task][split]
        if count != size:
            raise NaloraError(
                str(path),
                expected=f"{size} questions",
                found=count,
                remedy="delete it and run again",
            )


def _info(
    builder: Any, features: dict[str, Any], about: str, task: str
) -> tfds.core.DatasetInfo:
    """Returns the TFDS metadata of a builder; the license is the license of ``task``'s data."""
    return tfds.core.DatasetInfo(
        builder=builder,
        description=about,
        features=tfds.features.FeaturesDict(features),
        supervised_keys=("prompt", "completion"),
        license=tasks.LICENCES[task],
        disable_shuffling=True,  # readers shuffle; train[:100] is the source's
    )


def _record(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of a question, built from its first request.

    In a sentence with a blank, each option completes the prompt, and the text after the blank is
    scored: "Ian met Bob because _ was home." has the prompts "Ian met Bob because Ian" and "Ian met
    Bob because Bob".
    """
    doc = row["doc"]
    gold = int(row["label"])
    if "query" in doc:
        choices = doc["choices"]
        prompts = []
        prompt = doc["query"]
        completion = choices[gold]
    else:
        choices = [doc["option1"], doc["option2"]]
        before, completion = doc["sentence"].split("_", 1)
        prompts = [before + option for option in choices]
        prompt = prompts[gold]
        completion = completion.strip()
    identifier = row["native_id"]
    if identifier is None:
        identifier = row["doc_id"]
    return {
        "id": str(identifier),
        "prompt": prompt,
        "completion": f" {completion}",
        "choices": choices,
        "choice_prompts": prompts,
        "gold": gold,
    }


class Needle(tfds.core.GeneratorBasedBuilder):
    """``needle/<words>``; records in the order of their numbers."""

    VERSION = tfds.core.Version(tasks.NEEDLE_VERSION)
    # TFDS reads this class attribute.
    RELEASE_NOTES = {tasks.NEEDLE_VERSION: "First release."}  # noqa: RUF012
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS reads this class attribute)
        tfds.core.BuilderConfig(
            name=str(length), description=f"texts of at most {length} words"
        )
        for length in tasks.LENGTHS
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        """Returns the fields of a record and the license of the text."""
        text = tfds.features.Text
        number = tfds.features.Scalar
        features = {
            "prompt": text(doc="text with the needle, and the question"),
            "completion": text(doc="the number, with its leading space"),
            "depth": number(np.int32, doc="percent of the text before the needle"),
            "length": number(np.int32, doc="largest number of words of the text"),
        }
        config = self.builder_config.description
        about = f"Needle retrieval in paragraphs of Wikipedia. This config: {config}."
        return _info(self, features, about, "boolq")

    def _split_generators(self, dl_manager: Any) -> Splits:
        return {split: self._generate_examples(split) for split in tasks.NEEDLE_SIZES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(tasks.needle_records(split, int(self.builder_config.name)))
