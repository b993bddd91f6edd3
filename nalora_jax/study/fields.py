"""Types of the fields of a study's records, which are checked when a record file is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nalora_jax.config.types import has_type
from nalora_jax.errors import NaloraError

_Row = dict[str, float | None]
_NEEDED: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("stage", "model", "task", "method", "data", "protocol"), (str, "a text")),
    **dict.fromkeys(("rate", "multiple", "seed", "seconds"), (float, "a finite number")),
    **dict.fromkeys(("curve", "training"), (list[_Row], "rows of numbers by name")),
    "diverged": (bool, "true or false"),
    "validation": (_Row, "numbers by name"),
    "items": (dict[str, str], "texts by name"),
}
_OPTIONAL: dict[str, tuple[Any, str]] = {
    "test": (_Row, "numbers by name"),
    "probes": (dict[str, _Row], "numbers by name, by probe"),
    "parameters": (float, "a finite number"),
}


def check_fields(record: Mapping[str, Any], where: str) -> None:
    """Checks that a record has every field that a study reads, each of its type.

    Raises:
      NaloraError: a field has another type, or some fields are missing.
    """
    for name, (hint, expected) in (_NEEDED | _OPTIONAL).items():
        if name not in record:
            continue
        if not has_type(record[name], hint) or (hint is not bool and not _is_finite(record[name])):
            raise _error(f"{where}: {name}", expected, repr(record[name])[:100])
    missing = [name for name in _NEEDED if name not in record]
    if 0 < len(missing) < len(_NEEDED):
        raise _error(f"{where}: {missing[0]}", _NEEDED[missing[0]][1], "none")


def _is_finite(value: Any) -> bool:
    """Returns True if parsed JSON has no NaN, no infinity and, in place of a number, no true or false."""
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, bool) and (not isinstance(value, int | float) or abs(value) < 1e300)


def _error(where: str, expected: str, value: object) -> NaloraError:
    remedy = "the file was edited or damaged: restore that line, or delete it and do the run again"
    return NaloraError(where, expected=expected, found=value, remedy=remedy)
