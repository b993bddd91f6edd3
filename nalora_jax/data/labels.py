"""LabelSet of texts: one of several names, any number of them, or scores.

{"text": "...", "label": "spam"}        one label: a name, a number from 0, or true or false
{"text": "...", "label": ["a", "c"]}    several labels: names or numbers, none for []
{"text": "...", "label": [0.0, 1.0]}    several labels: a 1.0 for each one that applies
{"text": "...", "label": 3.5}           a score
{"text": "...", "label": 1}             with form=binary: whether a document answers a query, 0 to 1
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nalora_jax.common.folders import write_json
from nalora_jax.data.questions import gold_of
from nalora_jax.data.source import Record, Source
from nalora_jax.data.tokenize import convert_batches
from nalora_jax.errors import NaloraError

LABELS_FILE = "labels.json"
FORMS = ("one", "several", "score", "binary")


@dataclass(frozen=True)
class LabelSet:
    """The outputs of a head: their form, one of `FORMS`, and their names."""

    form: str
    names: tuple[str, ...]

    def encode(self, value: Any, where: str) -> list[float]:
        """Returns the target of each output: 1 for labels that apply, or scores.

        Raises:
          NaloraError: a label that the head does not have, or a value of another form.
        """
        if self.form == "binary":
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise NaloraError(
                    where, expected="a number from 0 to 1", found=repr(value)[:80]
                )
            return [float(value)]
        if form_of_label(value, where) != self.form and not self._is_score(value):
            raise NaloraError(
                where,
                expected=f"a value of the form {self.form!r}, as in the first record",
                found=repr(value)[:80],
                remedy="see --kind classify:form=...",
            )
        numbers = _as_list(value)
        if self.form == "score" or _is_indicator(value):
            if len(numbers) != len(self.names):
                raise NaloraError(
                    where,
                    expected=f"{len(self.names)} values, one for each output",
                    found=len(numbers),
                )
            return [float(number) for number in numbers]
        targets = [0.0] * len(self.names)
        for label in numbers:
            name = label_name(label)
            if name not in self.names:
                raise NaloraError(
                    where,
                    expected=f"one of the labels {', '.join(self.names[:20])}",
                    found=repr(name),
                    remedy="correct the label, or train on records with all labels "
                    "(--kind classify:labels=N for numbers up to N - 1)",
                )
            targets[self.names.index(name)] = 1.0
        return targets

    def _is_score(self, value: Any) -> bool:
        """Returns True for a whole number among scores."""
        return self.form == "score" and form_of_label(value, "label") == "one"

    def write(self, folder: Path) -> None:
        """Writes `LABELS_FILE` to an adapter's folder."""
        write_json(folder / LABELS_FILE, {"form": self.form, "names": list(self.names)})

    @staticmethod
    def read(folder: Path) -> LabelSet:
        """Reads the labels of an adapter with a head.

        Raises:
          NaloraError: the file is missing or damaged.
        """
        path = folder / LABELS_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return LabelSet(str(values["form"]), tuple(map(str, values["names"])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NaloraError(
                str(path),
                expected="the names of the head's outputs",
                found=f"{type(error).__name__}: {error}",
                remedy="restore the file that the run wrote beside its adapter",
            ) from error


def raw_label(record: Record, field: str, where: str) -> Any:
    """Returns the label of a record; of a question with choices, the right choice.

    Raises:
      NaloraError: the record has none.
    """
    if field not in record and record.get("choices"):
        return record["choices"][gold_of(record, where)]
    if record.get(field) is None:
        raise NaloraError(
            where,
            expected=f"a field {field!r}",
            found=f"the fields {', '.join(record)}",
            remedy="name the field of the label: --kind classify:field=NAME",
        )
    return record[field]


def form_of_label(value: Any, where: str) -> str:
    """Returns the form of a label, one of `FORMS`.

    Raises:
      NaloraError: the value is no label.
    """
    if isinstance(value, float) and math.isfinite(value):
        return "score"
    if isinstance(value, str | int):
        return "one"
    if isinstance(value, list) and all(isinstance(x, str | int | float) for x in value):
        return "several"
    raise NaloraError(
        where,
        expected="a name, a number, or a list of them",
        found=repr(value)[:80],
    )


def label_name(label: Any) -> str:
    """Returns the name of a label: of a number its digits, "0" for False and "1" for True."""
    if isinstance(label, bool):
        label = int(label)
    return str(label)


def _as_list(value: Any) -> list[Any]:
    """Returns the values of a list, or a single value as a list."""
    if isinstance(value, list):
        return value
    return [value]


def _is_indicator(value: Any) -> bool:
    """Returns True for a list with a 0.0 or 1.0 for each output."""
    return isinstance(value, list) and any(isinstance(x, float) for x in value)


def find_labels(
    source: Source, indices: Sequence[int], field: str, form: str, count: int
) -> LabelSet:
    """Returns the labels of a data set's records, in the order of their names or numbers.

    Args:
      source: the records.
      indices: of the records that are read.
      field: that has the label.
      form: one of `FORMS`, or "auto": that of the first record.
      count: the number of outputs; 0: as many as there are labels.

    Raises:
      NaloraError: records without a label, of different forms, with one label only, or with more
        than ``count``.
    """

    def read(record: Record, where: str) -> tuple[str, Any]:
        """Returns the form of a record's label, and the label."""
        value = raw_label(record, field, where)
        return form_of_label(value, f"{where}: {field}"), value

    if form == "binary":
        return LabelSet(form, _numbers(1))
    names: set[str] = set()
    numbered = True  # all labels are whole numbers
    width = 0
    for _, labels in convert_batches(source, indices, read):
        for of_record, value in labels:
            if form == "auto":
                form = of_record
            if form == "score" or _is_indicator(value):
                width = max(width, len(_as_list(value)))
                continue
            for label in _as_list(value):
                numbered = numbered and isinstance(label, int)
                names.add(label_name(label))
    where = f"{source.name}: {field}"
    if width:
        return LabelSet(form, _numbers(width))
    if numbered:
        negative = [name for name in names if name.startswith("-")]
        if negative:
            raise NaloraError(
                where, expected="labels from 0", found=", ".join(negative[:5])
            )
        largest = max(map(int, names), default=0)
        known = _numbers(max(largest + 1, count))
    else:
        known = tuple(sorted(names))
    if count and len(known) != count:
        raise NaloraError(
            where,
            expected=f"{count} labels, as --kind classify:labels={count} says",
            found=f"{len(known)}: {', '.join(known[:20])}",
        )
    if len(known) < 2:
        raise NaloraError(
            where,
            expected="two labels or more",
            found=f"{', '.join(known) or 'none'} in all of {len(indices)} records",
        )
    return LabelSet(form, known)


def _numbers(count: int) -> tuple[str, ...]:
    """Returns the names of numbered outputs."""
    return tuple(str(number) for number in range(count))
