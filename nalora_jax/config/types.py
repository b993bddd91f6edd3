"""Checks that the values of a config's fields have their declared types, which Python itself does not check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any, NamedTuple, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type


class WrongType(NamedTuple):
    """A field whose value has the wrong type."""

    field: str  # with dots, as on the command line
    hint: Any  # its declared type
    value: Any


def first_wrong_part(config: Any) -> WrongType | None:
    """Returns the first field of a dataclass that should hold a dataclass and does not."""
    kinds = {
        group.name: group.default_factory for group in fields(config) if is_dataclass(group.default_factory)
    }
    wrong = (name for name, kind in kinds.items() if not isinstance(getattr(config, name), kind))  # type: ignore[arg-type]
    return next((WrongType(name, kinds[name], getattr(config, name)) for name in wrong), None)


def first_wrong(config: Any, prefix: str = "", *, lenient: bool = False) -> WrongType | None:
    """Returns the first field of the nested dataclasses whose value is not of its declared type.

    Args:
      config: the outermost dataclass.
      prefix: of the fields' names.
      lenient: accept lists for tuples, paths for texts, and NumPy's numbers.
    """
    hints = get_type_hints(type(config))
    for entry in fields(config):
        name, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        if not has_type(value, hints[entry.name]) and not (
            lenient and has_type(_plain(value), hints[entry.name])
        ):
            return WrongType(name, hints[entry.name], value)
        parts = {}
        if isinstance(value, tuple):
            parts = {f"{name}[{index}].": item for index, item in enumerate(value)}
        for place, item in (parts | {f"{name}.": value}).items():
            if is_dataclass(item) and (wrong := first_wrong(item, place, lenient=lenient)) is not None:
                return wrong
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, PurePath):
        return str(value)
    if getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def dotted(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted name and value of every setting in nested dicts."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def has_type(value: Any, hint: Any) -> bool:
    """Returns True if ``value`` and all its items are of the type that ``hint`` declares."""
    try:
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return False
    return True


def type_name(hint: Any) -> str:
    """Returns the name of a type for messages."""
    if isinstance(hint, type):
        return hint.__name__
    return str(hint).replace("typing.", "")
