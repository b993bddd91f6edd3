"""Plots of the report: each takes a `History` and returns an ``<svg>``, or None without data.

They are drawn within `nalora_jax.report.drawing.style`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from nalora_jax.report import drawing
from nalora_jax.report.drawing import (
    COLOURS,
    evenly,
    legend,
    new_figure,
    smooth,
    thin,
    to_svg,
)
from nalora_jax.report.history import REGIONS, Histograms, History

Plot = Callable[[History], str | None]
MAP_COLUMNS = 160  # maximum steps drawn in a heat map
_LINES = ("c1", "c2", "c3", "r0", "r3", "r1", "r2")  # colours of lines, in this order
_MOST_TICKS = 7


def _plot(
    name: str, title: str, ylabel: str, *, xlabel: str = "step", zero: bool = False
) -> Callable[[Callable[[History, Any], str | None]], Plot]:
    """Returns a decorator that makes a plot of a function that draws on one pair of axes.

    The function may return another y label. There is no plot if it draws nothing, and no legend if
    no line has a label.

    Args:
      name: of the figure in the page.
      title: text for screen readers.
      ylabel, xlabel: of the axes.
      zero: True if the y axis starts at 0.
    """

    def decorate(draw: Callable[[History, Any], str | None]) -> Plot:
        """Returns the plot of a function that draws on a pair of axes."""

        @wraps(draw)
        def plot(history: History) -> str | None:
            """Returns the figure as SVG, or None if ``draw`` added no data to the axes."""
            figure, axis = new_figure()
            label = draw(history, axis) or ylabel
            if not axis.has_data():
                return None
            axis.set(xlabel=xlabel, ylabel=label)
            if zero:
                axis.set_ylim(bottom=0)
            if axis.get_legend_handles_labels()[1]:
                legend(axis)
            return to_svg(figure, name, title.format(label=label))

        return plot

    return decorate


LOSS_NAMES = {
    "loss": "training loss",
    "policy_loss": "policy loss",
    "preference_loss": "preference loss",
    "divergence": "divergence from the teacher",
}


def loss(history: History) -> str | None:
    """Plots the loss of the log steps, which a run's objective defines."""
    return _line("loss", LOSS_NAMES[history.loss_kind], "c1", noisy=True)(history)


@_plot("held-out-loss", "Held-out loss over the steps", "loss per completion token")
def held_out_loss(history: History, axis: Any) -> None:
    """Plots the held-out loss by evaluation."""
    steps, values = history.eval_column("loss")
    if np.isfinite(values).any():
        axis.plot(steps, values, "o-", color=COLOURS["c2"], markersize=4.5)


@_plot("metric", "Held-out {label} over the steps", "")
def metric(history: History, axis: Any) -> str | None:
    """Plots the headline metric with its 95% interval by evaluation, and the initial value."""
    scores = history.scores
    if history.metric is None or len(scores) < 2:
        return None
    name = history.metric[1]
    before = "before training, same examples"  # others than the headline's
    axis.axhline(
        scores[0].value,
        color=COLOURS["muted"],
        linewidth=1.2,
        linestyle="--",
        label=before,
    )
    bounded = [s for s in scores if s.low is not None and s.high is not None]
    if bounded:
        axis.vlines(
            [score.step for score in bounded],
            [score.low for score in bounded],
            [score.high for score in bounded],
            color=COLOURS["c2"],
            linewidth=1.4,
            label="95% interval",
        )
    steps = [score.step for score in scores]
    values = [score.value for score in scores]
    axis.plot(
        steps,
        values,
        "o-",
        color=COLOURS["c2"],
        markersize=5,
        label=name,
    )
    return name


@_plot("tokens-per-second", "tokens per second over the steps", "", zero=True)
def speed(history: History, axis: Any) -> str:
    """Plots tokens per second of the compiled program."""
    _draw_noisy(axis, *history.program_rate(), "c3")
    return "tokens per second"


@_plot("rewards", "Rewards of chosen and rejected responses over the steps", "reward")
def rewards(history: History, axis: Any) -> None:
    """Plots preference tuning: rewards of chosen and rejected completions, and held-out margin."""
    steps, margin = history.column("rewards_margin")
    eval_steps, held_out = history.eval_column("rewards_margin")
    if not margin.size and not held_out.size:
        return
    colours = {"chosen": COLOURS["c1"], "rejected": COLOURS["c3"]}
    for name, colour in colours.items():
        line = history.column(f"rewards_{name}")
        axis.plot(
            *line,
            color=colour,
            linewidth=1.4,
            label=name,
        )
    axis.plot(
        steps,
        margin,
        color=COLOURS["muted"],
        linewidth=1.2,
        linestyle="--",
        label="margin",
    )
    if held_out.size:
        axis.plot(
            eval_steps,
            held_out,
            "o-",
            color=COLOURS["c2"],
            markersize=4.5,
            label="held-out margin",
        )


@_plot("sampled-rewards", "Rewards of samples over the steps", "reward")
def sampled_rewards(history: History, axis: Any) -> None:
    """Plots a run with rewards: mean and standard deviation of the sum of its rewards.

    If there are several rewards, the mean of each is a line.
    """
    steps, total = history.column("reward")
    deviation = history.column("reward_std")[1]
    if not np.isfinite(total).any() or len(deviation) != len(total):
        return
    logged = set[str]().union(*history.steps)
    rewards = []
    for name in sorted(logged):
        if name.startswith("reward_") and f"{name}_std" in logged:
            rewards.append(name)
    lower = total - deviation
    upper = total + deviation
    at, low, high, mean = thin(steps, lower, upper, total)
    axis.fill_between(
        at,
        low,
        high,
        color=COLOURS["c1"],
        alpha=0.2,
        linewidth=0,
    )
    axis.plot(at, mean, color=COLOURS["c1"], label="reward")
    if len(rewards) < 2:
        return
    for name, colour in zip(rewards, _LINES[1:], strict=False):
        line = thin(*history.column(name))
        label = name.removeprefix("reward_").replace("_", " ")
        axis.plot(
            *line,
            color=COLOURS[colour],
            linewidth=1.2,
            label=label,
        )


@_plot(
    "misalignment", "Misalignment and its linear limit over the steps", "whole model"
)
def misalignment(history: History, axis: Any) -> None:
    """Plots the model's misalignment and its linear limit, with their difference shaded."""
    steps, values = history.column("misalignment")
    limit_steps, limit = history.column("misalignment_limit")
    if not np.isfinite(values).any():
        return
    if np.array_equal(limit_steps, steps) and np.isfinite(limit).any():
        axis.fill_between(
            steps,
            limit,
            values,
            color=COLOURS["c1"],
            alpha=0.2,
            linewidth=0,
            label="excess",
        )
        axis.plot(
            *thin(steps, limit),
            "--",
            color=COLOURS["c3"],
            label="linear limit (dz → 0)",
        )
    axis.plot(
        *thin(steps, values), color=COLOURS["c1"], label="misalignment E|S| / E|F|"
    )


def misalignment_map(history: History) -> str | None:
    """Plots misalignment and its linear limit by layer and step on one colour scale."""
    panels = {"misalignment": "misalignment", "its linear limit": "limit"}
    maps = []
    for title, name in panels.items():
        steps, values = history.layers(name)
        if values.ndim == 2 and np.isfinite(values).any():
            maps.append((title, steps, values))
    if not maps:
        return None
    label = "Misalignment of every layer over the steps, with its linear limit"
    return _heat_maps(maps, "map", label)


def excess_map(history: History) -> str | None:
    """Plots misalignment minus its linear limit, by layer and step."""
    steps, values = history.layers("misalignment")
    _, limit = history.layers("limit")
    if values.ndim != 2 or values.shape != limit.shape:
        return None
    excess = values - limit
    if not np.isfinite(excess).any():
        return None
    label = "Misalignment above its linear limit, of every layer"
    return _heat_maps([("", steps, excess)], "excess", label)


@_plot("feature", "Feature movement over the steps", "feature movement E|F|", zero=True)
def feature(history: History, axis: Any) -> None:
    """Plots the adapters' change of the gate, E|F|, over the steps: mean and range over layers."""
    steps, values = history.layers("feature")
    if values.ndim != 2 or not np.isfinite(values).any():
        return
    finite = np.isfinite(values).any(axis=1)
    steps, values = thin(steps[finite], values[finite])
    low = np.nanmin(values, axis=1)
    high = np.nanmax(values, axis=1)
    label = "lowest to highest layer"
    axis.fill_between(
        steps,
        low,
        high,
        color=COLOURS["c3"],
        alpha=0.2,
        linewidth=0,
        label=label,
    )
    axis.plot(
        steps, np.nanmean(values, axis=1), color=COLOURS["c3"], label="mean over layers"
    )


def importance(history: History) -> str | None:
    """Plots importance by layer at the first and last log step, and the mask.

    The mask is shown below by its mean and its share of favoured channels.
    """
    steps, slope = history.layers("importance")
    _, mask = history.layers("mask_mean")
    if slope.ndim != 2 or mask.ndim != 2:
        return None
    if not np.isfinite(slope).any():
        return None
    figure, (upper, lower) = new_figure(4.6, rows=2, sharex=True)
    layers = np.arange(slope.shape[1])
    upper.plot(
        layers,
        slope[0],
        ":",
        color=COLOURS["muted"],
        label=f"step {steps[0]:.0f}",
    )
    upper.plot(
        layers,
        slope[-1],
        "o-",
        markersize=3,
        color=COLOURS["c1"],
        label=f"step {steps[-1]:.0f}",
    )
    upper.set(ylabel="mean slope E|φ′|")
    legend(upper)
    shares = (
        ("mask_mean", "mean mask", "c2"),
        ("favoured", "share of channels with a factor ≥ 1", "c3"),
    )
    for name, label, colour in shares:
        _, values = history.layers(name)
        if values.ndim == 2:
            lower.plot(
                layers,
                values[-1],
                "o-",
                markersize=3,
                color=COLOURS[colour],
                label=label,
            )
    lower.set(xlabel="layer", ylabel="at the last step")
    lower.set_ylim(bottom=0)
    if lower.lines:
        legend(lower)
    return to_svg(figure, "importance", "Importance and mask of every layer")


def occupancy(history: History) -> str | None:
    """Plots every layer's region occupancy at the first and last log step as stacked bars."""
    steps, values = history.layers("occupancy")
    if values.ndim != 3 or not np.isfinite(values).any():
        return None
    indices = [0]
    if len(steps) > 1:
        indices = [0, -1]
    height = 2.3 * len(indices) + 0.5
    figure, axes = new_figure(
        height,
        rows=len(indices),
        sharex=True,
        squeeze=False,
    )
    for axis, index in zip(axes[:, 0], indices, strict=True):
        stacked_bars(axis, values[index])
        axis.set(title=f"step {steps[index]:.0f}", ylabel="share of tokens")
    axes[-1, 0].set_xlabel("layer")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=4,
        columnspacing=1,
        handlelength=1,
    )
    return to_svg(
        figure,
        "occupancy",
        "Region occupancy of every layer at the first and the last step",
    )


@_plot("scale", "Range of the step scale of every layer", "step scale", xlabel="layer")
def step_scale(history: History, axis: Any) -> None:
    """Plots the range of the step scale over each layer's channels at the last log step."""
    steps, low = history.layers("step_scale_min")
    _, high = history.layers("step_scale_max")
    if low.ndim != 2 or low.shape != high.shape:
        return
    if not np.isfinite(low).any():
        return
    axis.axhline(
        1,
        color=COLOURS["muted"],
        linewidth=1.2,
        linestyle="--",
    )
    layers = np.arange(low.shape[1])
    axis.vlines(
        layers,
        low[-1],
        high[-1],
        color=COLOURS["c2"],
        linewidth=4,
    )
    axis.set_title(f"lowest to highest channel, step {steps[-1]:.0f}")


def stacked_bars(
    axis: Any, occupancy: np.ndarray, colours: tuple[str, ...] = drawing.REGION_COLOURS
) -> None:
    """Draws occupancy [L, 4] as one bar per layer, its regions stacked in order."""
    layers = np.arange(len(occupancy))
    bottom = np.zeros(len(occupancy))
    for region, colour, share in zip(REGIONS, colours, occupancy.T, strict=True):
        axis.bar(
            layers,
            share,
            bottom=bottom,
            width=0.86,
            color=colour,
            label=region,
        )
        bottom = bottom + share
    axis.set_ylim(0, 1)
    axis.set_xlim(-0.6, len(occupancy) - 0.4)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.grid(False)


def _line(
    name: str, label: str, colour: str, *, zero: bool = False, noisy: bool = False
) -> Plot:
    """Returns the plot of a scalar of the log steps; with ``zero`` its axis starts at 0.

    A noisy scalar is a faint line, with its running mean as a strong line if there are at least 40
    values.
    """

    @_plot(name.replace("_", "-"), f"{label} over the steps", label, zero=zero)
    def draw(history: History, axis: Any) -> None:
        """Draws the scalar over the log steps."""
        steps, values = history.column(name)
        if noisy:
            _draw_noisy(axis, steps, values, colour)
        elif np.isfinite(values).any():
            axis.plot(*thin(steps, values), color=COLOURS[colour])

    return draw


def _draw_noisy(
    axis: Any,
    steps: np.ndarray,
    values: np.ndarray,
    colour: str,
) -> None:
    """Draws a faint line of the values [T], and a strong one of their running mean."""
    if not np.isfinite(values).any():
        return
    window = len(values) // 20  # values of a running mean
    if window > 1:
        axis.plot(
            *thin(steps, values),
            color=COLOURS[colour],
            alpha=0.35,
            linewidth=1,
        )
        values = smooth(values, window)
    axis.plot(*thin(steps, values), color=COLOURS[colour])


def _heat_maps(
    maps: list[tuple[str, np.ndarray, np.ndarray]], name: str, label: str
) -> str:
    """Draws (title, steps, values [T, L]) side by side on one colour scale."""
    low = min(np.nanmin(values) for _, _, values in maps)
    high = max(np.nanmax(values) for _, _, values in maps)
    if high <= low:
        high = low + 1e-6
    figure, axes = new_figure(
        4.2,
        columns=len(maps),
        sharey=True,
        squeeze=False,
    )
    for axis, (title, steps, values) in zip(axes[0], maps, strict=True):
        at, values = evenly(steps, values, MAP_COLUMNS)
        first = at[0]
        last = at[-1]
        half = 0.5  # half the width of a column, in steps
        if last > first:
            half = 0.5 * (last - first) / (len(at) - 1)
        axis.xaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
        ends = (first - half, last + half)
        image = _image(axis, values.T, ends, vmin=low, vmax=high)
        axis.set(title=title, xlabel="step")
    axes[0][0].set_ylabel("layer")
    _colour_bar(figure, image, list(axes[0]))
    return to_svg(figure, name, label)


def _image(
    axis: Any, values: np.ndarray, ends: tuple[float, float], **colours: float
) -> Any:
    """Draws values [L, columns], a row for each layer, between both ends of the other axis."""
    axis.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.grid(False)
    return axis.imshow(
        values,
        extent=(*ends, -0.5, len(values) - 0.5),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap="viridis",
        **colours,
    )


def _colour_bar(figure: Any, image: Any, axes: Any) -> None:
    """Draws the colour scale of an image below the axes."""
    bar = figure.colorbar(
        image,
        ax=axes,
        location="bottom",
        aspect=40,
        pad=0.02,
        ticks=MaxNLocator(4),
    )
    bar.outline.set_visible(False)


# ---------------------------------------------------------------- adapters and factors


def histogram(history: History, mechanism: str) -> str | None:
    """Plots a mechanism's multipliers over all channels at two steps, and by layer below.

    The steps are the first step at which it acts and the last log step.
    """
    histograms = history.histograms(mechanism)
    if histograms is None:
        return None
    together = _shares(histograms.counts.sum(axis=1))  # [T, L, B + 1] -> [T, B + 1]
    # Before it acts, all multipliers are 1, in a single bin.
    bins_used = (together > 0).sum(axis=1)
    acting = int(np.argmax(bins_used > 1))
    bins = _shown(together[[acting, -1]])
    first = together[acting][bins]
    last = together[-1][bins]
    figure, (upper, lower) = new_figure(5.4, rows=2, sharex=True)
    at = np.arange(len(last))
    upper.bar(
        at,
        last,
        width=0.92,
        color=COLOURS["c1"],
        label=f"step {histograms.steps[-1]:.0f}",
    )
    if acting < len(histograms.steps) - 1:
        label = f"step {histograms.steps[acting]:.0f}"
        upper.step(
            at,
            first,
            where="mid",
            color=COLOURS["fg"],
            linewidth=1.3,
            label=label,
        )
    upper.set(ylabel="share of all channels")
    legend(upper)
    shares = _shares(histograms.counts[-1])[:, bins]
    ends = (-0.5, len(at) - 0.5)
    image = _image(lower, shares, ends, vmin=0)
    title = f"share of each layer's channels, step {histograms.steps[-1]:.0f}"
    lower.set(
        xlabel="factor",
        ylabel="layer",
        title=title,
    )
    _label_bins(lower, histograms, bins)
    _colour_bar(figure, image, lower)
    title = f"Factors of {mechanism} over channels, and in every layer"
    return to_svg(figure, f"histogram-{mechanism}", title)


def _by_module(history: History, name: str, value: str, title: str) -> str | None:
    """Plots a value of the adapters by kind of module: over the steps, and by layer at the last.

    Over the steps it is the sum over layers or, of norms, the root of the sum of squares.

    Args:
      history: of the run.
      name: of the figure, and of the values in the log (`History.adapters`).
      value: label of the values; "norm" for norms.
      title: text for screen readers.
    """
    curves = history.adapters(name)
    lines = list(itertools.product(("-", "--"), _LINES))
    drawn = list(curves)[: len(lines)]
    if not drawn:
        return None
    figure, (upper, lower) = new_figure(5.0, rows=2)
    last = 0.0
    for path, (style, colour) in zip(drawn, lines, strict=False):
        steps, values = curves[path]
        last = max(last, steps[-1])
        with np.errstate(over="ignore"):  # values of an edited log
            total = np.nansum(values, axis=1)
            if value == "norm":
                total = np.sqrt(np.nansum(np.square(values), axis=1))
        line = {"color": COLOURS[colour], "linestyle": style}
        label = path.replace("layers/", "")
        upper.plot(*thin(steps, total), label=label, **line)
        layers = np.arange(values.shape[1])
        lower.plot(
            layers,
            values[-1],
            marker="o",
            markersize=3,
            **line,
        )
    upper.set(xlabel="step", ylabel=f"{value}, all layers")
    lower.set(xlabel="layer", ylabel=f"{value}, step {last:.0f}")
    for axis in (upper, lower):
        axis.set_ylim(bottom=0)
    columns = 2
    if max(map(len, drawn)) < 24:
        columns = 3
    figure.legend(
        loc="outside upper center",
        ncols=columns,
        columnspacing=1,
        handlelength=1.2,
    )
    return to_svg(figure, name, title)


def _shares(counts: np.ndarray) -> np.ndarray:
    """Returns counts [..., B + 1] divided by their row's sum; empty rows stay zero."""
    totals = counts.sum(axis=-1, keepdims=True)
    return counts / np.maximum(totals, 1)


def _shown(shares: np.ndarray) -> slice:
    """Returns the bins that a picture shows, given shares [rows, B + 1].

    They are those from the first to the last non-empty bin, and one more on either side.
    """
    bins = shares.shape[-1]
    non_empty = np.flatnonzero(shares.sum(axis=0))
    if not non_empty.size:
        return slice(0, bins)
    first = int(non_empty[0])
    last = int(non_empty[-1])
    start = max(first - 1, 0)
    return slice(start, min(last + 2, bins))


def _label_bins(axis: Any, histograms: Histograms, bins: slice) -> None:
    """Sets a tick with its multiplier at some of the edges between the shown bins.

    Bin i lies at the place ``i - bins.start``, and edge i - 1 half a bin before it.
    """
    first = max(bins.start, 1)
    edges = histograms.edges[first - 1 : bins.stop - 1]
    every = -(-len(edges) // _MOST_TICKS)  # rounded up
    # A tick of 1, if in range, is always shown: multipliers are read relative to it.
    middle = 0  # index of the edge nearest to 1, on a logarithmic scale
    if len(edges):
        distances = np.abs(np.log(np.maximum(edges, 1e-12)))
        middle = int(np.argmin(distances))
    places = []
    labels = []
    for index, edge in enumerate(edges):
        if (index - middle) % every == 0:
            places.append(first + index - bins.start - 0.5)
            labels.append(f"{edge:.2g}")
    axis.set_xticks(places, labels)


# ---------------------------------------------------------------- the page's plots, in order

TRAINING: dict[str, Plot] = {
    "metric": metric,
    "loss": loss,
    "held_out_loss": held_out_loss,
    "rewards": rewards,
    "sampled_rewards": sampled_rewards,
    "entropy": _line("entropy", "nats a token", "c2", zero=True, noisy=True),
    "divergence": _line("divergence", "nats a token", "c3", zero=True, noisy=True),
    "length": _line("length", "tokens a sample", "c1", zero=True, noisy=True),
    "groups_alike": _line(
        "groups_alike", "share of groups", "c3", zero=True, noisy=True
    ),
    "learning_rate": _line("learning_rate", "learning rate", "c1"),
    "speed": speed,
    "gradient": _line("grad_norm", "gradient norm", "c1", zero=True, noisy=True),
    "adapters": partial(
        _by_module,
        name="adapters",
        value="norm",
        title="Norms of the adapters over the steps, and of every layer",
    ),
    "ranks": partial(
        _by_module,
        name="ranks",
        value="ranks",
        title="Ranks that are left over the steps, and to every layer",
    ),
}
GATES: dict[str, Plot] = {
    "misalignment": misalignment,
    "misalignment_map": misalignment_map,
    "excess_map": excess_map,
    "feature": feature,
    "importance": importance,
    "occupancy": occupancy,
    "step_scale": step_scale,
}
