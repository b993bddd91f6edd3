"""Whether the values of a config's fields have their declared types, which Python itself does not check."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type


class WrongType(NamedTuple):
    """A field with a value of another type."""

    field: str  # with dots, as on the command line
    hint: Any  # its declared type
    value: Any


def first_wrong(config: Any, prefix: str = "") -> WrongType | None:
    """The first field of the nested dataclasses whose value is not of its declared type."""
    hints = get_type_hints(type(config))
    for one in fields(config):
        name, value = f"{prefix}{one.name}", getattr(config, one.name)
        if not has_type(value, hints[one.name]):
            return WrongType(name, hints[one.name], value)
        parts = {f"{name}[{index}].": part for index, part in enumerate(value)} if isinstance(value, tuple) else {}
        for place, part in (parts | {f"{name}.": value}).items():
            if is_dataclass(part) and (found := first_wrong(part, place)) is not None:
                return found
    return None


def has_type(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the type that ``hint`` says, with all its items."""
    try:
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return False
    return True


def type_name(hint: Any) -> str:
    """A type as messages have it."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
