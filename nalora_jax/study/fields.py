"""Types of the fields of a study's records, which are checked when a record file is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nalora_jax.errors import NaloraError


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    )  # no NaN either


def _is_row(value: object) -> bool:
    return isinstance(value, Mapping) and all(cell is None or _is_number(cell) for cell in value.values())


def _is_curve(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_row, value))


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_row, value.values()))


def _are_texts(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, value.values()))


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


Test = tuple[Callable[[object], bool], str]
_TEXT: Test = (_is_text, "a text")
_NUMBER: Test = (_is_number, "a finite number")
_ROW: Test = (_is_row, "numbers by name")
_NEEDED: dict[str, Test] = {
    **dict.fromkeys(("stage", "model", "task", "method", "data", "protocol"), _TEXT),
    **dict.fromkeys(("rate", "multiple", "seed", "seconds"), _NUMBER),
    **dict.fromkeys(("curve", "training"), (_is_curve, "rows of numbers by name")),
    "diverged": (_is_flag, "true or false"),
    "validation": _ROW,
    "items": (_are_texts, "texts by name"),
}
_OPTIONAL: dict[str, Test] = {
    "test": _ROW,
    "probes": (_is_table, "numbers by name, by probe"),
    "parameters": _NUMBER,
}


def check_fields(record: Mapping[str, Any], where: str) -> None:
    """Checks that a record has every field that a study reads, each of its type.

    Raises:
      NaloraError: a field has another type, or some fields are missing.
    """
    for name, (holds, expected) in (_NEEDED | _OPTIONAL).items():
        if name in record and not holds(record[name]):
            raise _error(f"{where}: {name}", expected, repr(record[name])[:100])
    missing = [name for name in _NEEDED if name not in record]
    if 0 < len(missing) < len(_NEEDED):
        raise _error(f"{where}: {missing[0]}", _NEEDED[missing[0]][1], "none")


def _error(where: str, expected: str, value: object) -> NaloraError:
    remedy = "the file was edited or damaged: restore that line, or delete it and do the run again"
    return NaloraError(where, expected=expected, found=value, remedy=remedy)
