"""Tables of measured figures: rows with requirement, measurement and verdict."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import machines
from common import values


@dataclass(frozen=True)
class Limit:
    """Required bound of a ratio."""

    value: float
    kind: str  # "at least" or "at most"

    def holds(self, ratio: float) -> bool:
        """Returns True if ``ratio`` is within the limit."""
        return ratio >= self.value if self.kind == "at least" else ratio <= self.value

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


def at_least(value: float) -> Limit:
    return Limit(value, "at least")


def at_most(value: float) -> Limit:
    return Limit(value, "at most")


@dataclass(frozen=True)
class Row:
    """A measured figure with its requirement."""

    what: str
    ours: str
    other: str
    ratio: float
    limit: Limit | None = None  # None: no requirement
    spread: str = ""  # of the ratio, if measured in pairs

    @property
    def verdict(self) -> str:
        """Returns the verdict on the requirement in one word."""
        return "" if self.limit is None else "met" if self.limit.holds(self.ratio) else "**missed**"


def compared(
    what: str,
    ours: Sequence[float],
    other: Sequence[float],
    limit: Limit | None,
    *,
    digits: int = 0,
    unit: str = "",
) -> Row:
    """Returns a row of two sets of repeated measurements, with the ratio of their medians."""
    ratio = statistics.median(ours) / statistics.median(other)
    return Row(what, spread(ours, digits, unit), spread(other, digits, unit), ratio, limit)


def compared_runs(
    what: str,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    other: str,
    key: str,
    limit: Limit | None,
    *,
    digits: int = 0,
    unit: str = "",
) -> Row:
    """Returns `compared` on field ``key`` of the runs of this library and of ``other``."""
    ours, theirs = (values(runs[name], key) for name in ("nalora_jax", other))
    return compared(what, ours, theirs, limit, digits=digits, unit=unit)


def paired_runs(
    what: str, runs: Mapping[str, Sequence[Mapping[str, Any]]], other: str, key: str, limit: Limit | None
) -> Row:
    """Returns `compared_runs` with the median of the rounds' ratios and their range.

    The load of a shared machine changes less within a round than between rounds.
    """
    pairs = zip(runs["nalora_jax"], runs[other], strict=True)
    ratios = [statistics.median(ours[key]) / statistics.median(theirs[key]) for ours, theirs in pairs]
    spread = f"{ratio_text(min(ratios))} to {ratio_text(max(ratios))}"
    row = compared_runs(what, runs, other, key, limit)
    return replace(row, ratio=statistics.median(ratios), spread=spread)


def spread(measured: Sequence[float], digits: int = 0, unit: str = "") -> str:
    """Returns the median with minimum and maximum, "630 (612 to 655)"; a single value alone."""
    middle, low, high = (f"{f(measured):,.{digits}f}" for f in (statistics.median, min, max))
    unit = f" {unit}" if unit else ""
    return f"{middle}{unit}" if low == high else f"{middle}{unit} ({low} to {high})"


def requirements(rows: Iterable[Row], *, ours: str = "nalora_jax", other: str = "peer") -> str:
    """Returns Markdown of rows with their ratios and requirements."""
    return markdown(
        ("what", ours, other, "ratio", "required", ""),
        [
            (
                *(row.what, row.ours, row.other),
                f"{ratio_text(row.ratio)}{f' ({row.spread})' if row.spread else ''}",
                str(row.limit or ""),
                row.verdict,
            )
            for row in rows
        ],
    )


def ratio_text(value: float) -> str:
    """Returns a ratio with its significant digits."""
    digits = 3 if 0.9 < value < 1.1 or value < 0.1 else 2
    return f"{value:.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def has_amx(case: Mapping[str, Any]) -> bool:
    """Returns True if a case ran on a CPU with AMX for bfloat16, which has other requirements."""
    return machines.instructions(case["machine"]) == "amx"


_WORDS = {
    "amx": "AMX",
    "avx512-bf16": "AVX512-BF16",
    "avx512": "AVX-512",
    "avx2": "AVX2 only",
    "": "no AMX",
}


def machine(case: Mapping[str, Any]) -> str:
    """Returns a case's accelerators, or its CPU: name, generation if recorded, instructions."""
    recorded = case["machine"]
    if recorded.get("accelerator"):
        return str(recorded["accelerator"])
    cpu = re.sub(r"\((R|TM)\)", "", recorded["cpu"]).removesuffix(" Processor")
    design = f" ({recorded['generation']})" if recorded.get("generation") else ""
    return f"{cpu}{design}, {_WORDS[machines.instructions(recorded)]}"
