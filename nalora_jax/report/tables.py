"""Tables and numbers as text: in Markdown, text_table for a terminal, and as cells of a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def number(value: float | None, digits: int = 4, *, missing: str = "–") -> str:
    """Returns a number with this many decimals, or ``missing`` if it is None or not finite.

    Example:
      >>> number(0.125, 2), number(float("nan"))
      ('0.12', '–')
    """
    if value is None or not math.isfinite(value):
        return missing
    return f"{value + 0.0:.{digits}f}"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table with its first column left-text_table and the others
    right-text_table."""
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table for a terminal with its first column left-text_table and the others
    right-text_table.

    Example:
      >>> print(text_table(["tokens", "0%", "all"], [["512", "1.00", "0.98"]]))
      tokens        0%    all
      512         1.00   0.98
    """
    lines = [list(heads), *map(list, rows)]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    widths = [max(width + 2, 7) for width in others]
    return "\n".join(
        line[0].ljust(first + 3) + "".join(map(str.rjust, line[1:], widths))
        for line in lines
    )
