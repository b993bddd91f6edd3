"""The pictures of a study's report, as SVG files that read on a light and on a dark page."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from nalora_jax.study.analysis import MethodComparison, MethodResult, comparisons, last, mean, results
from nalora_jax.study.plan import cost
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import Record
from nalora_jax.study.tables import named

_STYLE = {"svg.fonttype": "none", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
_STYLE |= {"axes.grid": True, "grid.color": "#dddddd", "legend.frameon": False, "legend.fontsize": 8}
_COLOURS = mpl.color_sequences["tab10"]
_MARKERS = "osD^vP*X"
_COLUMNS = 4  # panels in a row of a picture


def draw(protocol: Protocol, records: Mapping[str, Record]) -> dict[str, str]:
    """SVG text by file name; a picture for which there is nothing to draw is left out."""
    found = results(protocol, records)
    marks = {name: _mark(index) for index, name in enumerate(protocol.methods)}
    panels: dict[str, Callable[[Any, Sequence[MethodResult], dict[str, Any]], bool]] = {
        "loss_by_rate.svg": _loss_by_rate,
        "loss_by_step.svg": _loss_by_step,
        "misalignment.svg": _misalignment,
        "importance.svg": _importance,
    }
    made = {}
    with mpl.rc_context(_STYLE):
        for name, panel in panels.items():
            made[name] = _grid(name, found, marks, panel)
        made["differences.svg"] = _differences(protocol, comparisons(protocol, found))
    return {name: text for name, text in made.items() if text}


def _grid(name: str, found: Sequence[MethodResult], marks: dict[str, Any], panel: Callable[..., bool]) -> str:
    """One panel per model and task, up to four side by side, with one legend."""
    groups: dict[tuple[str, str], list[MethodResult]] = {}
    for result in found:
        groups.setdefault((result.cell.model, result.cell.task), []).append(result)
    columns = min(len(groups), _COLUMNS)
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(groups) :]:
        axis.remove()
    drawn = False
    for axis, ((model, task), group) in zip(axes[: len(groups)], groups.items(), strict=True):
        drawn |= panel(axis, group, marks)
        axis.set_title(f"{task}, {model}", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(2 * columns, 4), fontsize=8)
    return _svg(figure, name) if drawn else ""


def _mark(index: int) -> dict[str, Any]:
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)], "markersize": 4}


def _loss_by_rate(axis: Any, group: Sequence[MethodResult], marks: dict[str, Any]) -> bool:
    """Validation loss (or what else is compared) over learning rates."""
    top, tried = [], set[float]()
    for result in group:
        pairs = [(rate, loss) for rate, loss in zip(result.tuning.rates, result.tuning.losses, strict=True) if loss]
        pairs = [(rate, loss) for rate, loss in pairs if math.isfinite(loss)]
        if not pairs:
            continue
        rates, losses = zip(*pairs, strict=True)
        axis.plot(rates, losses, label=result.cell.method, linewidth=1.2, **marks[result.cell.method])
        tried.update(rates)
        best = min(losses)
        top += [min(loss, best + 0.5) for loss in losses]
    if not top:
        return False
    axis.set(xlabel="learning rate", ylabel=f"validation {named(group[0].metric)}", xscale="log")
    axis.minorticks_off()
    axis.set_xticks(sorted(tried), [f"{rate:g}" for rate in sorted(tried)], rotation=30, fontsize=8)
    spread = max(top) - min(top)
    axis.set_ylim(min(top) - 0.05 * spread - 1e-4, max(top) + 0.05 * spread + 1e-4)
    return True


def _loss_by_step(axis: Any, group: Sequence[MethodResult], marks: dict[str, Any]) -> bool:
    """Validation loss along the test runs, mean over seeds, without the loss before training; of one step nothing."""
    drawn = False
    for result in group:
        curves = [{int(p["step"]): cost(result.metric, p) for p in one["curve"]} for one in result.held().values()]
        steps = sorted(set(curves[0]).intersection(*curves) - {0}) if curves else []
        if steps:
            values = [mean([curve[step] for curve in curves]) for step in steps]
            axis.plot(steps, values, label=result.cell.method, linewidth=1.2, **marks[result.cell.method])
            drawn |= len(steps) > 1
    axis.set(xlabel="step", ylabel=f"validation {named(group[0].metric)}")
    return drawn


def _misalignment(axis: Any, group: Sequence[MethodResult], marks: dict[str, Any]) -> bool:
    """Misalignment at the end of each test run over how far its gates moved."""
    drawn = False
    for result in group:
        held = list(result.held().values())
        points = [(last(one, "mean_feature"), last(one, "misalignment")) for one in held]
        points = [(x, y) for x, y in points if x is not None and y is not None]
        if points:
            mark = marks[result.cell.method]
            axis.plot(*zip(*points, strict=True), linestyle="none", label=result.cell.method, **mark)
            drawn = True
    axis.set(xlabel="feature movement E|F|", ylabel="misalignment E|S| / E|F|")
    return drawn


def _importance(axis: Any, group: Sequence[MethodResult], marks: dict[str, Any]) -> bool:
    """Mean slope E|phi'| of the gates along the test runs."""
    drawn = False
    for result in group:
        rows = [{r["step"]: r.get("mean_importance") for r in one["training"]} for one in result.held().values()]
        steps = sorted(set(rows[0]).intersection(*rows)) if rows else []
        values = [mean([float(row[step]) for row in rows if row[step] is not None]) for step in steps]
        if any(map(math.isfinite, values)):
            axis.plot(steps, values, label=result.cell.method, linewidth=1.2, **marks[result.cell.method])
            drawn = True
    axis.set(xlabel="step", ylabel="mean importance E|φ′|")
    return drawn


def _differences(protocol: Protocol, made: Sequence[MethodComparison]) -> str:
    """Paired differences with their intervals, one line per comparison, and the margin of equivalence."""
    if not made:
        return ""
    figure = Figure(figsize=(6.4, 0.9 + 0.3 * len(made)), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(-protocol.margin, protocol.margin, color="#eeeeee", zorder=0)
    axis.axvline(0, color="#888888", linewidth=0.8)
    labels = []
    for row, one in enumerate(made):
        colour = _COLOURS[list(protocol.tasks).index(one.cell.task) % len(_COLOURS)]
        axis.plot([one.paired.low, one.paired.high], [row, row], color=colour, linewidth=1.6)
        axis.plot([one.paired.mean], [row], "o", color=colour, markersize=4)
        several = len(protocol.models) > 1
        labels.append(f"{one.cell.method} - {one.other}, {one.cell.task}" + (f", {one.cell.model}" if several else ""))
    axis.set_yticks(range(len(made)), labels, fontsize=8)
    axis.set_ylim(len(made) - 0.5, -0.5)  # the first on top
    what = f"difference of the test {named(protocol.metric)}"
    axis.set_xlabel(f"{what}\n95% interval; grey: the margin of {protocol.margin:g}", fontsize=9)
    return _svg(figure, "differences.svg")


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.id": None}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    return buffer.getvalue()
