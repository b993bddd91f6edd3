"""Tasks of reasoning-gym as a data source, with its scores.

    --data.dataset reasoning_gym:chain_sum:max_terms=3:size=2000 --rl.rewards reasoning_gym

The library draws the problems from a seed, so nothing is downloaded. Its settings of a task follow
the name. "train" has the seed 0 (or ``seed``), "validation" another one, and no problem of "train".
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from nalora_jax.data.source import RecordsSource, Source, foreign_errors
from nalora_jax.data.sources import register_source
from nalora_jax.errors import NaloraError

_NAME = "reasoning_gym"
_COUNTS = {"train": 1000, "validation": 200}
# Between the seeds of both splits: problem i is drawn from seed + i.
_APART = 10_000_000
_ENTRY = "entry"  # field of a record with reasoning-gym's own record
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@register_source(_NAME)
def open_tasks(argument: str, split: str) -> Source:
    """Returns the problems of a task, ``TASK:setting=value:...``.

    A record has ``prompt``, ``completion`` and ``answer``, besides what `score_completion` needs.

    Raises:
      NaloraError: the library is not installed, an unknown task or setting, or another split than
        "train" and "validation".
    """
    where = f"{_NAME}:{argument}"
    if split not in _COUNTS:
        expected = " or ".join(_COUNTS)
        raise NaloraError(f"{where}[{split}]", expected=expected, found=split)
    entries = _drawn(argument, split)
    if split == "validation":
        trained = {entry["question"] for entry in _drawn(argument, "train")}
        entries = [entry for entry in entries if entry["question"] not in trained]
    records = []
    for entry in entries:
        answer = (
            entry["answer"] or "(any)"
        )  # some tasks have many answers, and name none
        record = {"prompt": entry["question"], "completion": f" {answer}"}
        records.append(record | {"answer": str(answer), _ENTRY: entry})
    return RecordsSource(f"{where}[{split}]", records)


def _drawn(argument: str, split: str) -> list[dict[str, Any]]:
    """Returns reasoning-gym's records of a split."""
    task, *options = argument.split(":")
    settings: dict[str, Any] = {"size": _COUNTS[split], "seed": 0}
    for option in options:
        name, _, value = option.partition("=")
        settings[name] = _value(value)
    if split == "validation":
        settings["seed"] += _APART
        settings["size"] = min(settings["size"], _COUNTS[split])
    remedy = "the names of tasks are in reasoning_gym.factory.DATASETS, settings in their configs"
    with foreign_errors(f"{_NAME}:{argument}", "a task with its settings", remedy):
        return list(_library().create_dataset(task, **settings))


def _value(text: str) -> Any:
    """Returns a setting's value: a whole number, a number, a truth value or a text."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _library() -> Any:
    """Returns the library reasoning-gym.

    Raises:
      NaloraError: it is not installed.
    """
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise NaloraError(
            _NAME,
            expected="the library reasoning-gym",
            found=str(error),
            remedy="pip install reasoning-gym (or nalora_jax with its extra `environments`)",
        ) from error


def score_completion(record: Mapping[str, Any], completion: str) -> float:
    """Returns reasoning-gym's score of a completion, 0 to 1.

    The answer is the text in the last ``<answer>`` tag, or the whole completion without one.

    Raises:
      NaloraError: the record is not of `open_tasks`.
    """
    entry = record.get(_ENTRY)
    if not isinstance(entry, dict):
        raise NaloraError(
            "reward reasoning_gym",
            expected=f"records of --data.dataset {_NAME}:TASK",
            found=f"a record with the fields {', '.join(record)}",
        )
    answers = _ANSWER.findall(completion) or [completion]
    task = entry["metadata"]["source_dataset"]
    return float(_scorer(task)(answers[-1].strip(), entry))


@lru_cache(maxsize=64)
def _scorer(task: str) -> Any:
    """Returns the function (answer, record) -> score of a task."""
    factory = importlib.import_module("reasoning_gym.factory")
    return factory.get_score_answer_fn(task)
