"""Registered classes with settings in a text: ``NAME`` or ``NAME:setting=value,...``."""

from __future__ import annotations

import dataclasses
from typing import Any

from nalora_jax.errors import NaloraError
from nalora_jax.registry import Registry


def from_text(registry: Registry[Any], text: str) -> Any:
    """Returns an instance of a registered class with the settings in a text.

    The settings are the fields of its dataclass, with the types of their defaults. Tuples are
    written with slashes.

    Args:
      registry: of the classes.
      text: ``"soft"``, ``"soft:power=2,high=3"`` or ``"homogeneity:gains=0.5/0.75/1/1"``.

    Raises:
      NaloraError: an unknown name or setting, or a value of another type.
    """
    name, _, options = text.partition(":")
    kind: Any = registry.get(name)
    fields: dict[str, Any] = {}
    if dataclasses.is_dataclass(kind):
        fields = {field.name: field for field in dataclasses.fields(kind)}
    settings: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if key not in fields or not equals:
            expected = f"NAME:setting=value, with a setting of {', '.join(fields) or 'none'}"
            raise NaloraError(f"{registry.flag} {text}", expected=expected, found=option)
        default = fields[key].default
        try:
            settings[key] = _typed(value, default)
        except (KeyError, ValueError):
            expected = f"{key} of type {type(default).__name__}"
            raise NaloraError(f"{registry.flag} {text}", expected=expected, found=repr(value)) from None
    return kind(**settings)


def _typed(text: str, default: Any) -> Any:
    """Returns ``text`` with the type of ``default``."""
    if isinstance(default, bool):
        return {"true": True, "false": False}[text.lower()]
    if isinstance(default, tuple):
        return tuple(type(default[0])(item) for item in text.split("/"))
    return type(default)(text)
