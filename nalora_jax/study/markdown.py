"""Markdown tables and number formats of a study's report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from nalora_jax.study.analysis import MethodResult
from nalora_jax.study.plan import Cell
from nalora_jax.study.statistics import Paired


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table with its first column left-aligned and the others right-aligned."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 4) -> str:
    """Returns a number with this many decimals, or a dash if it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value + 0.0:.{digits}f}"


def signed(value: float) -> str:
    """Returns a difference with its sign.

    Example:
      >>> signed(-0.00001), signed(0.0044)
      ('-0.0000', '+0.0044')
    """
    return f"{value + 0.0:+.4f}"


def interval(statistics: Paired) -> str:
    """Returns the interval of a mean difference, or a dash for a single pair."""
    if statistics.n > 1:
        return f"{signed(statistics.low)} to {signed(statistics.high)}"
    return "-"


def p_value(p: float, corrected: float) -> str:
    """Returns a p-value, with its corrected value in brackets.

    Example:
      >>> p_value(0.0313, 0.5625), p_value(0.00002, 0.0004)
      ('0.031 (0.562)', '<0.001 (<0.001)')
    """
    if math.isfinite(p):
        return f"{_p(p)} ({_p(corrected)})"
    return "-"


def _p(value: float) -> str:
    if value < 0.001:
        return "<0.001"
    return f"{value:.3f}"


def task_of(cell: Cell, *, several_models: bool) -> str:
    """Returns the task's name, with the model's if the study has several."""
    if several_models:
        return f"{cell.task} ({cell.model})"
    return cell.task


def grouped(cell_results: Sequence[MethodResult]) -> list[tuple[str, list[MethodResult]]]:
    """Returns the results by model and task, each with its heading."""
    groups: dict[str, list[MethodResult]] = {}
    for result in cell_results:
        groups.setdefault(f"### {result.cell.task}, {result.cell.model}", []).append(result)
    return list(groups.items())
