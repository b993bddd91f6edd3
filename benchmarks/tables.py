"""How measured figures are written: rows with what was required, what was measured, and whether that is met."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import machines
from common import values


@dataclass(frozen=True)
class Limit:
    """What a ratio has to be."""

    value: float
    kind: str  # "at least" or "at most"

    def holds(self, ratio: float) -> bool:
        """Whether ``ratio`` keeps to it."""
        return ratio >= self.value if self.kind == "at least" else ratio <= self.value

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


def at_least(value: float) -> Limit:
    return Limit(value, "at least")


def at_most(value: float) -> Limit:
    return Limit(value, "at most")


@dataclass(frozen=True)
class Row:
    """One figure."""

    what: str
    ours: str
    other: str
    ratio: float
    limit: Limit | None = None  # None: nothing was required
    spread: str = ""  # of the ratio, where it was measured in pairs

    @property
    def verdict(self) -> str:
        """Whether the requirement is met, in one word."""
        return "" if self.limit is None else "met" if self.limit.holds(self.ratio) else "**missed**"


def compared(
    what: str, ours: Sequence[float], other: Sequence[float], limit: Limit | None, *, digits: int = 0, unit: str = ""
) -> Row:
    """A row of two sets of repeated measurements; its ratio is that of the medians."""
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
    """`compared` on field ``key`` of this library's runs and of those named ``other``."""
    ours, theirs = (values(runs[name], key) for name in ("nalora_jax", other))
    return compared(what, ours, theirs, limit, digits=digits, unit=unit)


def spread(measured: Sequence[float], digits: int = 0, unit: str = "") -> str:
    """Median with minimum and maximum: "630 (612 to 655)"; one value alone without them."""
    middle, low, high = (f"{f(measured):,.{digits}f}" for f in (statistics.median, min, max))
    unit = f" {unit}" if unit else ""
    return f"{middle}{unit}" if low == high else f"{middle}{unit} ({low} to {high})"


def requirements(rows: Iterable[Row], *, ours: str = "nalora_jax", other: str = "peer") -> str:
    """Markdown of rows with their ratios and requirements."""
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
    """A ratio with the digits that matter."""
    digits = 3 if 0.9 < value < 1.1 or value < 0.1 else 2
    return f"{value:.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def has_amx(case: Mapping[str, Any]) -> bool:
    """Whether a case was measured on a CPU with AMX for bfloat16, for which other figures are required."""
    return machines.instructions(case["machine"]) == "amx"


_WORDS = {"amx": "AMX", "avx512-bf16": "AVX512-BF16", "avx512": "AVX-512", "avx2": "AVX2 only", "": "no AMX"}


def machine(case: Mapping[str, Any]) -> str:
    """The accelerators of a case; or its CPU in words: name, generation if recorded, what it multiplies with."""
    found = case["machine"]
    if found.get("accelerator"):
        return str(found["accelerator"])
    cpu = re.sub(r"\((R|TM)\)", "", found["cpu"]).removesuffix(" Processor")
    design = f" ({found['generation']})" if found.get("generation") else ""
    return f"{cpu}{design}, {_WORDS[machines.instructions(found)]}"


def growth_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost over log size between the last two points: 1 is linear growth, 2 quadratic."""
    return math.log(costs[-1] / costs[-2]) / math.log(sizes[-1] / sizes[-2])
