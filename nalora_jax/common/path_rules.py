"""Ordered (regular expression, value) rules over the paths of a tree: the first match wins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from nalora_jax.errors import NaloraError

T = TypeVar("T")


def first_match(rules: Iterable[tuple[str, T]], path: str) -> tuple[int, T] | None:
    """Index and value of the first (regex, value) rule found in ``path`` by `re.search`, or None."""
    for index, (pattern, value) in enumerate(rules):
        if re.search(pattern, path):
            return index, value
    return None


def match_rules(rules: Sequence[tuple[str, T]], paths: Iterable[str], *, where: str) -> dict[str, T]:
    """The value of each path by the first rule that matches it; paths without a rule are left out.

    Raises:
      NaloraError: a pattern is not a regular expression, or matched no path at all (a rule shadowed
        by earlier ones, but matching, is fine). The message lists what exists.
    """
    names = list(paths)
    matches = []
    for pattern, _ in rules:
        try:
            search = re.compile(pattern).search
        except (re.error, OverflowError, RecursionError) as error:
            raise NaloraError(
                where, expected="a regular expression", found=f"{pattern!r} ({error})"
            ) from error
        matches.append([search(name) for name in names])
    for (pattern, _), row in zip(rules, matches, strict=True):
        if all(match is None for match in row):
            patterns_of_names = sorted({re.sub(r"/\d+/", "/*/", name) for name in names})
            raise NaloraError(
                where,
                expected="every pattern to match something",
                found=f"{pattern!r}, which matches nothing",
                remedy="these exist: " + ", ".join(patterns_of_names),
            )
    matched: dict[str, T] = {}
    for (_, value), row in reversed(
        list(zip(rules, matches, strict=True))
    ):  # the first rule has the last word
        matched |= {name: value for name, match in zip(names, row, strict=True) if match is not None}
    return {name: matched[name] for name in names if name in matched}
