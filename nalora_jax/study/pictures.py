"""Pictures of a study's report, as SVG files that are readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nalora_jax.report.drawing import file_style, to_svg_file
from nalora_jax.study import analysis
from nalora_jax.study.planned_runs import cost
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import StudyRecord

# Of methods; a control has its method's colour, lighter.
_COLOURS = (*mpl.color_sequences["tab10"], *mpl.color_sequences["Dark2"])
_MARKERS = "osD^vP*X"
_COLUMNS = 4  # panels in a row of a picture
_ROWS = 12  # comparisons in a picture
_LOSS_RANGE = 0.5  # nats above a method's best loss that a picture of the rates shows
_VISIBLE = 0.01  # least spread of the methods' lines, as a share of their values

Line = list[tuple[float, float]]  # of a method


class Panels(NamedTuple):
    """A picture with a panel for each task and model."""

    points: Callable[[analysis.MethodResult], Line]  # of a method
    xlabel: str
    ylabel: str  # "{cost}" stands for the metric's label
    visible: Callable[[list[Line]], bool] = bool  # False: no line could be seen
    style: Mapping[str, Any] = {"linewidth": 1.2}
    scale: Callable[[Any, list[Line]], None] | None = None  # of the axes


def draw(protocol: Protocol, records: Mapping[str, StudyRecord]) -> dict[str, str]:
    """Returns SVG text by file name, without the pictures that would be empty."""
    cell_results = analysis.results(protocol, records)
    marks = _marks(protocol)
    with file_style():
        pictures = {
            name: _grid(name, panels, cell_results, marks)
            for name, panels in _PANELS.items()
        }
        primary = _primary_by_task(protocol, cell_results)
        count = max(math.ceil(len(primary) / _ROWS), 1)
        parts = np.array_split(np.array(primary, object), count)
        for number, part in enumerate(parts, start=1):
            if len(parts) > 1:
                name = f"differences_{number}.svg"
            else:
                name = "differences.svg"
            pictures[name] = _differences(protocol, list(part))
    return {name: text for name, text in pictures.items() if text}


def _primary_by_task(
    protocol: Protocol, cell_results: Sequence[analysis.MethodResult]
) -> list[analysis.MethodComparison]:
    """Returns the comparisons by the primary metric, in the order of the tasks."""
    compared = analysis.comparisons(protocol, cell_results)
    primary = [pair for pair in compared if pair.measure.kind == "primary"]
    tasks = list(protocol.tasks)
    return sorted(primary, key=lambda pair: tasks.index(pair.cell.task))


def _grid(
    name: str,
    panels: Panels,
    cell_results: Sequence[analysis.MethodResult],
    marks: dict[str, Any],
) -> str:
    """Returns the SVG text of a picture with a panel per task and model, and one legend.

    Args:
      name: file name of the picture.
      panels: what it shows.
      cell_results: results of all methods.
      marks: from `_marks`.

    Returns:
      SVG text, or "" if no line is visible.
    """
    groups = analysis.group_by_task(cell_results)
    columns = min(len(groups), _COLUMNS)
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(groups) :]:
        axis.remove()
    drawn = False
    legend: dict[str, Any] = {}
    for axis, ((task, model), group) in zip(axes, groups.items(), strict=False):
        lines = []
        for result in group:
            if line := panels.points(result):
                lines.append(line)
                method = result.cell.method
                xs, ys = zip(*line, strict=True)
                axis.plot(xs, ys, label=method, **panels.style, **marks[method])
        cost_label = analysis.cost_label(group[0].metric)
        axis.set(xlabel=panels.xlabel, ylabel=panels.ylabel.format(cost=cost_label))
        axis.set_title(f"{task}, {model}", fontsize=10)
        if lines:
            drawn |= panels.visible(lines)
            if panels.scale is not None:
                panels.scale(axis, lines)
        else:
            axis.set_axis_off()
            centre = {"ha": "center", "va": "center", "transform": axis.transAxes}
            axis.text(0.5, 0.5, "no run yet", **centre)
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    if not drawn:
        return ""
    figure.legend(
        list(legend.values()),
        list(legend),
        loc="outside lower center",
        ncols=min(2 * columns, 4),
        fontsize=8,
    )
    return to_svg_file(figure, name)


def _marks(protocol: Protocol) -> dict[str, dict[str, Any]]:
    """Returns Matplotlib's options for colour and marker of each method.

    No two methods share both. A permutation control has the colour of its method, lighter.
    """
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
    points = []
    for rate, value in result.tuning.costs.items():
        if value is not None and math.isfinite(value):
            points.append((rate, value))
    return points


def _scale_rates(axis: Any, lines: list[Line]) -> None:
    """Sets a logarithmic axis with a tick at each learning rate, and the range of losses.

    The range leaves out losses more than `_LOSS_RANGE` above a method's best one.
    """
    rates = set()
    shown = []
    for line in lines:
        limit = min(loss for _, loss in line) + _LOSS_RANGE
        for rate, loss in line:
            rates.add(rate)
            shown.append(min(loss, limit))
    ticks = sorted(rates)
    axis.set(xscale="log")
    axis.minorticks_off()
    axis.set_xticks(ticks, [f"{rate:g}" for rate in ticks], rotation=30, fontsize=8)
    low = min(shown)
    high = max(shown)
    space = 0.05 * (high - low) + 1e-4  # above 0, also for equal losses
    axis.set_ylim(low - space, high + space)


def _mean_curve(curves: Sequence[Mapping[int, float | None]]) -> Line:
    """Returns the mean over runs of values by step, at the steps that all runs have."""
    if not curves:
        return []
    line: Line = []
    for step in sorted(set(curves[0]).intersection(*curves)):
        values = [curve[step] for curve in curves]
        mean = analysis.mean_of([value for value in values if value is not None])
        if math.isfinite(mean):
            line.append((step, mean))
    return line


def _by_step(result: analysis.MethodResult) -> Line:
    """Returns the mean validation cost along the test runs, after the first step and later.

    Step 0 is the base, whose cost would hide the differences of the runs.
    """
    curves = []
    for record in result.finite().values():
        curve = {}
        for point in record["curve"]:
            if point["step"] > 0:
                curve[int(point["step"])] = cost(result.metric, point)
        curves.append(curve)
    return _mean_curve(curves)


def _misalignments(result: analysis.MethodResult) -> Line:
    """Returns the gates' feature movement and the misalignment at the end of each test run."""
    points = []
    for record in result.finite().values():
        movement = analysis.last_of([record], "mean_feature")
        misalignment = analysis.last_of([record], "misalignment")
        if movement and misalignment:
            points.append((movement[0], misalignment[0]))
    return points


def _importances(result: analysis.MethodResult) -> Line:
    """Returns the mean slope E|phi'| of the gates along the test runs."""
    curves = []
    for record in result.finite().values():
        rows = record["training"]
        curves.append({row["step"]: row.get("mean_importance") for row in rows})
    return _mean_curve(curves)


def _is_spread(lines: list[Line]) -> bool:
    """Returns True if the lines differ visibly at some step."""
    widest = 0.0  # largest difference between two methods at one step
    for points in zip(*lines, strict=False):
        values = [value for _, value in points]
        widest = max(widest, max(values) - min(values))
    largest = max(abs(value) for _, value in lines[0])
    return widest > _VISIBLE * largest


def _has_curve(lines: list[Line]) -> bool:
    """Returns True if a line has several points."""
    return any(len(line) > 1 for line in lines)


_LOSS = "validation {cost}, lower is better"
_PANELS = {
    "loss_by_rate.svg": Panels(_by_rate, "learning rate", _LOSS, scale=_scale_rates),
    "loss_by_step.svg": Panels(_by_step, "step", _LOSS, _has_curve),
    "misalignment.svg": Panels(
        _misalignments,
        "feature movement E|F|",
        "misalignment E|S| / E|F|",
        style={"linestyle": "none"},
    ),
    "importance.svg": Panels(_importances, "step", "mean importance E|φ′|", _is_spread),
}


def _differences(
    protocol: Protocol, compared: Sequence[analysis.MethodComparison]
) -> str:
    """Returns the SVG text of paired differences, "" without any.

    It has a row per comparison with the mean difference, its interval, and the margin in grey.
    """
    if not compared:
        return ""
    figure = Figure(figsize=(6.4, 0.9 + 0.3 * len(compared)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="#888888", linewidth=0.8)
    margins = [max(comparison.paired.margin, 0.0) for comparison in compared]
    # The grey area has steps: each margin at the upper and the lower edge of its row.
    right = np.repeat(margins, 2)
    borders = np.arange(len(compared) + 1) - 0.5  # between rows
    edges = np.repeat(borders, 2)[1:-1]
    axis.fill_betweenx(edges, -right, right, color="#eeeeee", linewidth=0, zorder=0)
    tasks = list(protocol.tasks)
    labels = []
    for row, comparison in enumerate(compared):
        cell = comparison.cell
        statistics = comparison.paired
        colour = _COLOURS[tasks.index(cell.task) % len(_COLOURS)]
        if statistics.n > 1:
            interval = [statistics.low, statistics.high]
            axis.plot(interval, [row, row], color=colour, linewidth=1.6)
        axis.plot([statistics.mean], [row], "o", color=colour, markersize=4)
        label = f"{cell.method} - {comparison.other}, {cell.task}"
        if len(protocol.models) > 1:
            label += f", {cell.model}"
        labels.append(label)
    axis.set_yticks(range(len(compared)), labels, fontsize=8)
    axis.set_ylim(len(compared) - 0.5, -0.5)  # the first on top
    axis.xaxis.set_major_locator(MaxNLocator(4))
    metric = analysis.cost_label(protocol.metric)
    difference = f"difference of the test {metric}, lower is better"
    legend = "95% t interval; grey: the margin of equivalence"
    axis.set_xlabel(f"{difference}\n{legend}", fontsize=9)
    return to_svg_file(figure, "differences.svg")
