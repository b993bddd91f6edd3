"""Docstrings of settings: the comment above each field, for ``help`` and the command line."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from textwrap import fill
from typing import TypeVar

T = TypeVar("T", bound=type)


@cache
def field_comments(kind: type) -> Mapping[str, str]:
    """Returns the comment above each field of a dataclass, by name; empty text if there is none."""
    lines = inspect.getsource(kind).splitlines()
    comments = {}
    for field in fields(kind):
        at = next((i for i, line in enumerate(lines) if line.startswith(f"    {field.name}:")), 0)
        start = at
        while start and lines[start - 1].startswith("    #"):
            start -= 1
        comments[field.name] = " ".join(line.strip().removeprefix("#").strip() for line in lines[start:at])
    return comments


def documented(kind: T) -> T:
    """Appends the fields with their comments to a dataclass's docstring, on first access."""
    kind.__doc__ = _Docstring(inspect.cleandoc(kind.__doc__ or ""))  # type: ignore[assignment]
    return kind


@contextmanager
def summaries_only() -> Iterator[None]:
    """Leaves the fields out of docstrings, for a reader that finds their comments itself."""
    _Docstring.brief = True
    try:
        yield
    finally:
        _Docstring.brief = False


class _Docstring:
    """A docstring that reads its class's source only when it is accessed."""

    brief = False

    def __init__(self, summary: str) -> None:
        self.summary, self._text = summary, ""

    def __get__(self, instance: object, owner: type) -> str:
        if _Docstring.brief:
            return self.summary
        if not self._text:
            lines = [
                fill(
                    f"{name}: {text or _summary(owner, name)}",
                    100,
                    initial_indent="  ",
                    subsequent_indent="    ",
                )
                for name, text in field_comments(owner).items()
            ]
            self._text = "\n".join([self.summary, "", "Attributes:", *lines])
        return self._text


def _summary(owner: type, name: str) -> str:
    """Returns the docstring of the settings in a field, without their own fields."""
    kind = next(field.default_factory for field in fields(owner) if field.name == name)
    docstring = vars(kind).get("__doc__")
    if isinstance(docstring, _Docstring):
        return " ".join(docstring.summary.split())
    return ""
