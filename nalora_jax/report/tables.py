"""Tables and numbers as text: for Markdown, for a terminal, and for cells of a page."""

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
    # Adding 0.0 turns -0.0 into 0.0.
    return f"{value + 0.0:.{digits}f}"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table with its first column left-aligned and the others right-aligned."""
    alignment = ["---"]
    for _ in heads[1:]:
        alignment.append("--:")
    lines = []
    for row in (heads, alignment, *rows):
        cells = " | ".join(row)
        lines.append(f"| {cells} |")
    return "\n".join(lines)


def text_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table for a terminal with its first column left-aligned, the others right-aligned.

    Example:
      >>> print(text_table(["tokens", "0%", "all"], [["512", "1.00", "0.98"]]))
      tokens        0%    all
      512         1.00   0.98
    """
    lines = [heads, *rows]
    longest = []
    for column in zip(*lines, strict=True):
        longest.append(max(map(len, column)))
    first_width = longest[0] + 3
    widths = [
        max(width + 2, 7) for width in longest[1:]
    ]  # with at least two spaces between
    texts = []
    for line in lines:
        cells = map(str.rjust, line[1:], widths)
        first = line[0].ljust(first_width)
        texts.append(first + "".join(cells))
    return "\n".join(texts)
