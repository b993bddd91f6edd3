"""Plots of a run's state: distributions of multipliers over channels, and adapter sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nalora_jax.report.history import Histograms, History
from nalora_jax.report.svg import COLOURS, legend, new_figure, style, thin, ticks, to_svg

_LINES = ("c1", "c2", "c3", "r0", "r3", "r1", "r2")
_MOST_TICKS = 7


def histogram(history: History, mechanism: str) -> str | None:
    """Plots a mechanism's multipliers over all channels at two steps, and by layer below.

    The steps are the first step at which it acts and the last log step.
    """
    histograms = history.histograms(mechanism)
    if histograms is None:
        return None
    together = _shares(histograms.counts.sum(axis=1))
    acting = int(np.argmax((together > 0).sum(axis=1) > 1))  # before it acts, all multipliers are 1
    bins = _shown(together[[acting, -1]])
    first, last = together[acting][bins], together[-1][bins]
    with style():
        figure, (upper, lower) = new_figure(5.4, rows=2, sharex=True)
        at = np.arange(len(last))
        upper.bar(at, last, width=0.92, color=COLOURS["c1"], label=f"step {histograms.steps[-1]:.0f}")
        if acting < len(histograms.steps) - 1:
            label = f"step {histograms.steps[acting]:.0f}"
            upper.step(at, first, where="mid", color=COLOURS["fg"], linewidth=1.3, label=label)
        upper.set(ylabel="share of all channels")
        legend(upper)
        image = lower.imshow(
            _shares(histograms.counts[-1])[:, bins],
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            extent=(-0.5, len(at) - 0.5, -0.5, histograms.counts.shape[1] - 0.5),
            cmap="viridis",
            vmin=0,
        )
        lower.set(
            xlabel="factor",
            ylabel="layer",
            title=f"share of each layer's channels, step {histograms.steps[-1]:.0f}",
        )
        lower.yaxis.set_major_locator(ticks(8, integer=True))
        lower.grid(False)
        _label_bins(lower, histograms, bins)
        bar = figure.colorbar(image, ax=lower, location="bottom", aspect=40, pad=0.02)
        bar.outline.set_visible(False)
        bar.locator = ticks(4)
        return to_svg(
            figure, f"histogram-{mechanism}", f"Factors of {mechanism} over channels, and in every layer"
        )


def adapters(history: History) -> str | None:
    """Plots adapter norms by kind of module over the steps, and of every layer at the last step."""
    return _by_module(
        history.adapters(),
        lambda norms: np.sqrt(np.nansum(np.square(norms), axis=1)),
        ("norm", "adapters", "Norms of the adapters over the steps, and of every layer"),
    )


def ranks(history: History) -> str | None:
    """Plots AdaLoRA's remaining ranks by kind of module over steps, and by layer at the last."""
    return _by_module(
        history.adapters("ranks"),
        lambda ranks: np.nansum(ranks, axis=1),
        ("ranks", "ranks", "Ranks that are left over the steps, and to every layer"),
    )


def _by_module(
    numbers: dict[str, tuple[np.ndarray, np.ndarray]],
    together: Callable[[np.ndarray], np.ndarray],
    words: tuple[str, str, str],
) -> str | None:
    """Plots values [steps, layers] by path; returns None if there are none.

    Args:
      numbers: steps and values.
      together: [steps, layers] -> [steps].
      words: name of the value, name of the plot, its description.
    """
    drawn, (what, picture, title) = dict(list(numbers.items())[: 2 * len(_LINES)]), words
    if not drawn:
        return None
    with style():
        figure, (upper, lower) = new_figure(5.0, rows=2)
        for index, (path, (steps, norms)) in enumerate(drawn.items()):
            name = path.replace("layers/", "")
            line = {
                "color": COLOURS[_LINES[index % len(_LINES)]],
                "linestyle": "-" if index < len(_LINES) else "--",
            }
            with np.errstate(over="ignore"):  # values of an edited log
                total = together(norms)
            upper.plot(*thin(steps, total), label=name, **line)
            lower.plot(np.arange(norms.shape[1]), norms[-1], marker="o", markersize=3, **line)
        upper.set(xlabel="step", ylabel=f"{what}, all layers")
        lower.set(
            xlabel="layer", ylabel=f"{what}, step {max(steps[-1] for steps, _ in drawn.values()):.0f}"
        )
        for axis in (upper, lower):
            axis.set_ylim(bottom=0)
        columns = 3 if max(map(len, drawn)) < 24 else 2
        figure.legend(loc="outside upper center", ncols=columns, columnspacing=1, handlelength=1.2)
        return to_svg(figure, picture, title)


def _shares(counts: np.ndarray) -> np.ndarray:
    """Returns counts [..., B + 1] divided by their row's sum."""
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)


def _shown(shares: np.ndarray) -> slice:
    """Returns the bins from the first to the last non-empty bin, and one on either side."""
    held = np.flatnonzero(shares.sum(axis=0))
    low, high = (held[0], held[-1]) if held.size else (0, shares.shape[-1] - 1)
    return slice(max(int(low) - 1, 0), min(int(high) + 2, shares.shape[-1]))


def _label_bins(axis: Any, histograms: Histograms, bins: slice) -> None:
    """Labels edges between bins as ticks, and the open bins at both ends if they are shown."""
    edges = {
        bin_ - bins.start - 0.5: histograms.edges[bin_ - 1] for bin_ in range(max(bins.start, 1), bins.stop)
    }
    every = -(-len(edges) // _MOST_TICKS)
    # A tick of 1, if in range, is always shown: multipliers are read relative to it.
    middle = 0
    if edges:
        middle = int(np.argmin(np.abs(np.log(np.maximum(list(edges.values()), 1e-12)))))
    ticks = {
        at: f"{edge:.2g}" for index, (at, edge) in enumerate(edges.items()) if (index - middle) % every == 0
    }
    axis.set_xticks(list(ticks), list(ticks.values()))
