"""Converts another library's settings; each field is converted, refused or reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nalora_jax.errors import NaloraError

# Settings as nested dicts, by the names of `nalora_jax.config`.
Settings = dict[str, Any]
_RESIZED = (
    "if the tokenizer got new tokens: name them in data.add_tokens or data.add_special_tokens, in their order; the "
    "embedding is resized for them"
)


@dataclass(frozen=True)
class Refused:
    """A value that is not supported, with the reason."""

    reason: str


@dataclass(frozen=True)
class Field:
    """Conversion of a field."""

    ours: str = ""  # the setting, dotted; empty without one
    note: str = ""  # for the table
    value: Callable[[Any], Any] = lambda value: value  # our value of theirs; may be `Refused`
    ignored: bool = False  # no effect on the result
    in_files: bool = False  # read from the files of an adapter, although a run has no setting for it


def only(*accepted: Any, because: str) -> Callable[[Any], Any]:
    """Returns a conversion that accepts only ``accepted``, values without effect here."""
    return lambda value: (
        None if any(value == default for default in (None, *accepted, {}, [])) else Refused(because)
    )


def choice(table: Mapping[Any, Any], because: str) -> Callable[[Any], Any]:
    """Returns a conversion by a table that refuses values that are not in it."""
    return lambda value: table.get(str(value), Refused(because))


def converted(
    values: Mapping[str, Any], table: Mapping[str, Field], kind: str
) -> tuple[Settings, list[str]]:
    """Returns the settings of single fields, and notes; adapter rules, which need several fields, are left out.

    Raises:
      NaloraError: names every field that is refused, with the reason.
    """
    settings: Settings = {}
    notes, refused = [], []
    for name, value in values.items():
        field = table.get(name)
        if field is None:
            notes.append(f"{name} is not known here: left out")
            continue
        if field.ignored or field.ours == "lora.rules":
            if field.ignored and value not in (None, False, {}, []):
                notes.append(f"{name} is left out: {field.note}")
            continue
        try:
            ours = field.value(value)
        except (AttributeError, OverflowError, TypeError, ValueError):
            ours = Refused("its value has another type")
        if isinstance(ours, Refused):
            refused.append(f"{name} = {value!r} ({ours.reason})")
        elif ours is not None and field.ours:
            put(settings, field.ours, ours)
    if refused:
        expected = "settings that are supported here"
        raise NaloraError(kind, expected=expected, found="; ".join(refused), remedy="remove or change them")
    lora = settings.get("lora", {})
    if "embed_tokens" in lora.get("modules_to_save", ()) or "trainable_token_indices" in lora:
        notes.append(_RESIZED)
    return settings, notes


def put(settings: Settings, name: str, value: Any) -> None:
    """Sets a dotted name in nested dicts."""
    *groups, last = name.split(".")
    for group in groups:
        settings = settings.setdefault(group, {})
    settings[last] = value
