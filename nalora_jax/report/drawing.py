"""The style of all figures: inline SVG of a page, or a separate file.

A page's figures follow its colours, light or dark, by CSS variables: they are drawn in placeholder
colours, and each placeholder is replaced by ``var(--name)`` in the SVG. Text stays text, in the
page's font. A figure is about as wide as a phone, so that its text stays readable.

This module imports Matplotlib, which takes a fifth of a run's import time; a run imports it at its
end.
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# CSS variables of the page, each with a placeholder colour that figures use for nothing else.
_VARIABLES = ("fg", "muted", "grid", "paper", "c1", "c2", "c3", "r0", "r1", "r2", "r3")
COLOURS = {name: f"#0102{index:02x}" for index, name in enumerate(_VARIABLES, start=1)}
REGION_COLOURS = tuple(COLOURS[f"r{index}"] for index in range(4))
WIDTH = 5.0  # inches at 72 points: 360 CSS pixels
POINTS = 400  # maximum points drawn of a line

_COMMON = {
    "svg.fonttype": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_PAGE = {
    **_COMMON,
    "text.parse_math": False,  # names come from the log, and a $ in a name is literal
    "font.size": 11,
    "axes.titlesize": 11,
    **dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"),
        COLOURS["muted"],
    ),
    **dict.fromkeys(("axes.titlecolor", "text.color"), COLOURS["fg"]),
    **dict.fromkeys(
        ("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"
    ),
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
}
_FILE = {
    **_COMMON,
    "font.size": 10,
    "grid.color": "#dddddd",
    "legend.fontsize": 8,
}


def style() -> Any:
    """Returns the context in which figures of a page are made: ``with style(): ...``."""
    return mpl.rc_context(_PAGE)


def file_style() -> Any:
    """Returns the context in which figures for files are made.

    They are on white, readable on light and dark pages.
    """
    return mpl.rc_context(_FILE)


def new_figure(
    height: float = 2.9, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """Returns a phone-wide figure and its axes; call it inside `style`."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for axis in np.ravel(axes):
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    return figure, axes


def legend(axis: Any) -> None:
    """Draws the legend above the axes, so that no line runs through it."""
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        columnspacing=1,
        handlelength=1.4,
    )


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Returns a figure of `style` as an ``<svg>`` element.

    Args:
      figure: drawn in `COLOURS`.
      name: unique in the page; keeps the ids of two figures apart.
      label: text for screen readers.
    """
    for axis in figure.axes:
        for line in axis.lines:
            if np.size(line.get_xdata()) == 1 and line.get_marker() == "None":
                line.set_marker("o")  # a line through a single point is invisible
                line.set_markersize(4)
    text = _save(figure, name, dpi=144)
    text = text[text.index("<svg") :]
    # Shorter, in the page's colours and fonts, and as wide as the page allows.
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # unused ids; the other ids are salted
    text = re.sub(r' id="image[0-9a-f]*"', "", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    text = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", text, count=1)
    text = text.replace(
        "<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1
    )
    return re.sub(r"\n\s*", "\n", text)


def to_svg_file(figure: Figure, name: str) -> str:
    """Returns a figure of `file_style` as the text of an SVG file.

    Equal figures give equal texts. ``name`` keeps the ids of different figures apart.
    """
    return _save(figure, name, facecolor="white")


def _save(figure: Figure, name: str, **options: Any) -> str:
    """Returns the figure as SVG text; equal figures give equal bytes (fixed ids, no date)."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.id": None}):
        figure.savefig(
            buffer,
            format="svg",
            metadata={"Date": None, "Creator": None},
            **options,
        )
    return buffer.getvalue()


def thin(*columns: np.ndarray, most: int = POINTS) -> tuple[np.ndarray, ...]:
    """Returns the same rows of every column, at most about ``most``, including the last."""
    count = len(columns[0])
    spaced = np.linspace(0, count - 1, min(count, most))
    rows = np.unique(spaced.round().astype(int))
    return tuple(column[rows] for column in columns)


def evenly(
    steps: np.ndarray, values: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``most`` or fewer evenly spaced steps, and the values there.

    Each value is taken from the nearest log step, because log steps need not be evenly spaced.

    Args:
      steps: log steps ``[T]``, rising.
      values: ``[T, ...]``.
      most: maximum number of steps.
    """
    first = steps[0]
    last = steps[-1]
    count = int(min(most, last - first + 1))
    spaced = np.linspace(first, last, count)
    distances = np.abs(steps[None, :] - spaced[:, None])  # [spaced, T]
    return spaced, values[distances.argmin(1)]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the running mean of values ``[T]``: of each and the ``window - 1`` before it.

    NaN are left out.
    """
    finite = np.isfinite(values)
    total = np.cumsum(np.where(finite, values, 0.0))
    count = np.cumsum(finite)
    # The sum of a window is the difference of two sums from the start.
    total[window:] -= total[:-window].copy()
    count[window:] -= count[:-window].copy()
    mean = total / np.maximum(count, 1)
    return np.where(count > 0, mean, np.nan)
