"""Pictures of a study's report, as SVG files that are readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nalora_jax.report.drawing import file_style, to_svg_file
from nalora_jax.study import analysis
from nalora_jax.study.plan import cost
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import Record

# Of methods; a control has its method's colour, lighter.
_COLOURS = (*mpl.color_sequences["tab10"], *mpl.color_sequences["Dark2"])
_MARKERS = "osD^vP*X"
_COLUMNS = 4  # panels in a row of a picture
_ROWS = 12  # comparisons in a picture
_VISIBLE = 0.01  # least spread of the methods' lines, as a share of their values

Line = list[tuple[float, float]]  # of a method


class Panels(NamedTuple):
    """A picture with a panel for each task and model."""

    points: Callable[[analysis.MethodResult], Line]
    xlabel: str
    ylabel: str
    visible: Callable[[list[Line]], bool] = (
        bool  # False: the lines of a panel would not be seen
    )
    style: Mapping[str, Any] = {"linewidth": 1.2}
    scale: Callable[[Any, list[Line]], None] | None = None  # of the axes


def draw(protocol: Protocol, records: Mapping[str, Record]) -> dict[str, str]:
    """Returns SVG text by file name, without the pictures that would be empty."""
    cell_results = analysis.results(protocol, records)
    marks = _marks(protocol)
    with file_style():
        pictures = {
            name: _grid(name, panels, cell_results, marks)
            for name, panels in _PANELS.items()
        }
        primary = [
            c
            for c in analysis.comparisons(protocol, cell_results)
            if c.measure.kind == "primary"
        ]
        ordered = sorted(
            primary,
            key=lambda comparison: list(protocol.tasks).index(comparison.cell.task),
        )
        parts = np.array_split(
            np.array(ordered, object), max(math.ceil(len(ordered) / _ROWS), 1)
        )
        for number, part in enumerate(parts, start=1):
            if len(parts) > 1:
                name = f"differences_{number}.svg"
            else:
                name = "differences.svg"
            pictures[name] = _differences(protocol, list(part))
    return {name: text for name, text in pictures.items() if text}


def _grid(
    name: str,
    panels: Panels,
    cell_results: Sequence[analysis.MethodResult],
    marks: dict[str, Any],
) -> str:
    """Draws a panel per model and task, up to four in a row, with one legend; "" if no line is
    visible."""
    groups = analysis.by_task(cell_results)
    columns = min(len(groups), _COLUMNS)
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(groups) :]:
        axis.remove()
    drawn = False
    legend: dict[str, Any] = {}
    for axis, ((task, model), group) in zip(axes, groups.items(), strict=False):
        lines = {
            result.cell.method: line
            for result in group
            if (line := panels.points(result))
        }
        for method, line in lines.items():
            axis.plot(
                *zip(*line, strict=True), label=method, **panels.style, **marks[method]
            )
        axis.set(
            xlabel=panels.xlabel,
            ylabel=panels.ylabel.format(cost=analysis.named(group[0].metric)),
        )
        axis.set_title(f"{task}, {model}", fontsize=10)
        if lines:
            drawn |= panels.visible(list(lines.values()))
            if panels.scale is not None:
                panels.scale(axis, list(lines.values()))
        else:
            axis.set_axis_off()
            axis.text(
                0.5,
                0.5,
                "no run yet",
                ha="center",
                va="center",
                transform=axis.transAxes,
            )
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    if not drawn:
        return ""
    entries = list(legend.values()), list(legend)
    figure.legend(
        *entries, loc="outside lower center", ncols=min(2 * columns, 4), fontsize=8
    )
    return to_svg_file(figure, name)


def _marks(protocol: Protocol) -> dict[str, dict[str, Any]]:
    """Returns colour and marker of each method: no two methods share both."""
    methods = [
        name for name, method in protocol.methods.items() if not method.placebo_of
    ]
    marks = {}
    for number, (name, method) in enumerate(protocol.methods.items()):
        index = methods.index(method.placebo_of or name)
        colour = np.array(mpl.colors.to_rgb(_COLOURS[index % len(_COLOURS)]))
        if method.placebo_of:
            colour = 0.5 + 0.5 * colour
        marks[name] = {
            "color": tuple(colour),
            "marker": _MARKERS[number % len(_MARKERS)],
            "markersize": 4,
        }
    return marks


def _by_rate(result: analysis.MethodResult) -> Line:
    """Returns the validation cost by learning rate."""
    costs = result.tuning.costs.items()
    return [
        (rate, cost) for rate, cost in costs if cost is not None and math.isfinite(cost)
    ]


def _scale_rates(axis: Any, lines: list[Line]) -> None:
    """Sets a logarithmic axis with a tick at each rate; cuts off losses 0.5 above a method's best
    one."""
    tried = sorted({rate for line in lines for rate, _ in line})
    axis.set(xscale="log")
    axis.minorticks_off()
    axis.set_xticks(tried, [f"{rate:g}" for rate in tried], rotation=30, fontsize=8)
    best = [min(loss for _, loss in line) for line in lines]
    shown = [
        min(loss, least + 0.5)
        for line, least in zip(lines, best, strict=True)
        for _, loss in line
    ]
    low = min(shown)
    high = max(shown)
    spread = max(shown) - min(shown)
    axis.set_ylim(low - 0.05 * spread - 1e-4, high + 0.05 * spread + 1e-4)


def _along(
    result: analysis.MethodResult, values: Callable[[Record], Iterable[tuple[int, Any]]]
) -> Line:
    """Returns the mean over the test runs of values by step, at the steps that all runs have."""
    curves = [dict(values(record)) for record in result.finite().values()]
    steps = sorted(set(curves[0]).intersection(*curves)) if curves else []
    values_at = (
        [curve[step] for curve in curves if curve[step] is not None] for step in steps
    )
    means = map(analysis.mean_of, values_at)
    return [
        (step, mean)
        for step, mean in zip(steps, means, strict=True)
        if math.isfinite(mean)
    ]


def _by_step(result: analysis.MethodResult) -> Line:
    """Returns the mean validation cost along the test runs."""
    metric = result.metric
    return _along(
        result,
        lambda r: ((int(p["step"]), cost(metric, p)) for p in r["curve"] if p["step"]),
    )


def _misalignments(result: analysis.MethodResult) -> Line:
    """Returns the gates' feature movement and the misalignment at the end of each test run."""
    ends = "mean_feature", "misalignment"
    pairs = [
        [analysis.last_of([r], name) for name in ends] for r in result.finite().values()
    ]
    return [(x[0], y[0]) for x, y in pairs if x and y]


def _importances(result: analysis.MethodResult) -> Line:
    """Returns the mean slope E|phi'| of the gates along the test runs."""
    return _along(
        result,
        lambda r: ((row["step"], row.get("mean_importance")) for row in r["training"]),
    )


def _spread(lines: list[Line]) -> bool:
    """Returns True if the lines are not all the same."""
    values = [[y for _, y in line] for line in lines]
    spreads = [max(at_step) - min(at_step) for at_step in zip(*values, strict=False)]
    return max(spreads) > _VISIBLE * max(map(abs, values[0]))


_LOSS = "validation {cost}, lower is better"
_PANELS = {
    "loss_by_rate.svg": Panels(_by_rate, "learning rate", _LOSS, scale=_scale_rates),
    "loss_by_step.svg": Panels(
        _by_step, "step", _LOSS, lambda lines: max(map(len, lines)) > 1
    ),
    "misalignment.svg": Panels(
        _misalignments,
        "feature movement E|F|",
        "misalignment E|S| / E|F|",
        style={"linestyle": "none"},
    ),
    "importance.svg": Panels(_importances, "step", "mean importance E|φ′|", _spread),
}


def _differences(
    protocol: Protocol, compared: Sequence[analysis.MethodComparison]
) -> str:
    """Draws paired differences with intervals, a line per comparison, and the margin."""
    if not compared:
        return ""
    figure = Figure(figsize=(6.4, 0.9 + 0.3 * len(compared)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="#888888", linewidth=0.8)
    margins = np.repeat(
        [max(comparison.paired.margin, 0.0) for comparison in compared], 2
    )
    edges = np.repeat(np.arange(len(compared) + 1) - 0.5, 2)[1:-1]
    axis.fill_betweenx(edges, -margins, margins, color="#eeeeee", linewidth=0, zorder=0)
    labels = []
    for row, comparison in enumerate(compared):
        cell = comparison.cell
        statistics = comparison.paired
        colour = _COLOURS[list(protocol.tasks).index(cell.task) % len(_COLOURS)]
        if statistics.n > 1:
            axis.plot(
                [statistics.low, statistics.high],
                [row, row],
                color=colour,
                linewidth=1.6,
            )
        axis.plot([statistics.mean], [row], "o", color=colour, markersize=4)
        model = f", {cell.model}" if len(protocol.models) > 1 else ""
        labels.append(f"{cell.method} - {comparison.other}, {cell.task}{model}")
    axis.set_yticks(range(len(compared)), labels, fontsize=8)
    axis.set_ylim(len(compared) - 0.5, -0.5)  # the first on top
    axis.xaxis.set_major_locator(MaxNLocator(4))
    text = f"difference of the test {analysis.named(protocol.metric)}, lower is better"
    axis.set_xlabel(
        f"{text}\n95% t interval; grey: the margin of equivalence", fontsize=9
    )
    return to_svg_file(figure, "differences.svg")
