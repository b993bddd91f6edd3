"""Applies settings of a TOML file to a run's config, with checks of names and types."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from nalora_jax.config import LoRARule
from nalora_jax.config.types import has_type, type_name
from nalora_jax.errors import NaloraError

T = TypeVar("T")


def override(config: T, settings: Mapping[str, Any], where: str) -> T:
    """Returns ``config`` with ``settings`` replaced.

    Args:
      config: a frozen dataclass, whose fields may be frozen dataclasses.
      settings: nested; TOML lists become tuples, and tables of adapter rules become `LoRARule`.
      where: the table in the file, for messages.

    Example:
      >>> override(RunConfig(), {"steps": 5, "lora": {"rules": [{"pattern": "gate", "rank": 2}]}}, "[run]").steps
      5

    Raises:
      NaloraError: an unknown name, or a value of another type.
    """
    hints = get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        place = f"{where} {name}"
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(hints)}"
            raise NaloraError(place, expected="a setting of a run", found="no such name", remedy=remedy)
        current = getattr(config, name)
        if dataclasses.is_dataclass(current) and isinstance(value, Mapping):
            changes[name] = override(current, value, place)
        else:
            changes[name] = checked(_as_python(value, name, place), hints[name], place)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def checked(value: Any, hint: Any, where: str) -> Any:
    """Returns ``value`` if it has the type ``hint``; an int for a float is converted.

    Raises:
      NaloraError: it is of another type.
    """
    if hint is float:
        value = whole_as_float(value)
    if not has_type(value, hint):
        raise NaloraError(where, expected=f"a value of type {type_name(hint)}", found=repr(value))
    return value


def whole_as_float(value: Any) -> Any:
    """Returns a whole number as a float if it is small enough, and other values unchanged."""
    if type(value) is int and abs(value) < 2**1000:
        return float(value)
    return value


def _as_python(value: Any, name: str, where: str) -> Any:
    """Converts lists to tuples, and tables of adapter rules to `LoRARule`."""
    if name == "rules" and isinstance(value, list):
        return tuple(_rule(table, f"{where}[{index}]") for index, table in enumerate(value))
    if isinstance(value, list):
        return tuple(_as_python(item, "", where) for item in value)
    return value


def _rule(table: Any, where: str) -> LoRARule:
    if not isinstance(table, Mapping) or "pattern" not in table:
        example = '{pattern = "ffn/gate_proj", rank = 2}'
        raise NaloraError(where, expected=f"a table such as {example}", found=repr(table))
    return override(LoRARule(""), table, where)
