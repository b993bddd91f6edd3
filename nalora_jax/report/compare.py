"""A page that compares several runs; runs that differ only in their seed are a line with a band.

Like report.html it is made from metrics.jsonl alone, loads no resources, and fits a phone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from nalora_jax.common.files import write_atomically
from nalora_jax.config.structured import dotted
from nalora_jax.errors import NaloraError
from nalora_jax.report.drawing import COLOURS, new_figure, style, thin, to_svg
from nalora_jax.report.history import History, read_history
from nalora_jax.report.html import plain_text, resource, template
from nalora_jax.train.progress import duration

# Settings of output and storage, which do not change a run's results.
_ASIDE = (
    "seed",
    "output",
    "resume",
    "callbacks",
    "data.workers",
    "compute.compilation_cache",
)
# Settings that decide which metrics a run computes.
_TASK = (
    *("model", "data.dataset", "data.eval_split", "data.loss_on", "data.chat"),
    *("vision.task", "preference.loss"),
)
# characters of a setting in a label, and settings
_LABEL = 32
_SETTINGS = 3
# also the maximum number of groups
_GROUP_COLOURS = (
    "c1",
    "c2",
    "c3",
    "r0",
    "r3",
    "r1",
    "r2",
)


@dataclass(frozen=True)
class Group:
    """Runs with equal settings."""

    label: str
    colour: str  # variable of the page's style
    settings: Mapping[str, str]  # by dotted name, as a user would type them
    runs: tuple[History, ...]

    @property
    def metric(self) -> str:
        """Returns the name of the headline metric."""
        metric = self.runs[0].metric
        return "held-out metric" if metric is None else metric[1]


def write_comparison(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Writes a page about the runs in ``folders`` and returns its path.

    Raises:
      NaloraError: a folder has no run or is listed twice, or there are more than seven different
        settings.
    """
    resolved = {Path(folder).resolve() for folder in folders}
    if len(resolved) < len(folders):
        raise NaloraError(
            "nalora report",
            expected="different runs",
            found=" ".join(map(str, folders)),
        )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        output, render_comparison([read_history(folder) for folder in folders])
    )
    return output


def render_comparison(runs: Sequence[History]) -> str:
    """Returns the page as text."""
    groups = group_runs(runs)
    differing = _apart([group.settings for group in groups])
    # Metrics of runs that differ in these settings, or in the metric, are not comparable.
    of_task = [name for name in differing if name in _TASK]
    if len({run.metric[1] for group in groups for run in group.runs if run.metric}) > 1:
        of_task.append("metric")
    return template("compare.html.j2").render(
        css=Markup(resource("style.css")),
        title=f"{len(runs)} runs, {len(groups)} {'setting' if len(groups) == 1 else 'settings'}",
        heads=list(_row(groups[0])),
        rows=[
            (group.label, f"var(--{group.colour})", list(_row(group).values()))
            for group in groups
        ],
        metric=groups[0].metric,
        apart=of_task,
        plain=list(_plain_exports(groups)),
        pictures=list(_pictures(groups)),
        labels=[group.label for group in groups],
        settings=[
            [name, *(group.settings.get(name, "–") for group in groups)]
            for name in differing
        ],
    )


def group_runs(runs: Sequence[History]) -> list[Group]:
    """Groups runs that differ only in their seed, in the given order, named by differences."""
    groups: list[tuple[dict[str, str], list[History]]] = []
    for run in runs:
        identity = {
            name: plain_text(value)
            for name, value in dotted(run.config)
            if name not in _ASIDE
        }
        alike = [members for settings, members in groups if settings == identity]
        if not alike:
            alike = [[]]
            groups.append((identity, alike[0]))
        alike[0].append(run)
    if len(groups) > len(_GROUP_COLOURS):
        expected = f"at most {len(_GROUP_COLOURS)} different settings"
        raise NaloraError("nalora report", expected=expected, found=len(groups))
    apart = _apart([identity for identity, _ in groups])
    names = [_method(members[0].config) for _, members in groups]
    labels = []
    for name, (identity, _) in zip(names, groups, strict=True):
        # Settings in the method's name are not repeated, unless two groups have the same name.
        shown = [
            each
            for each in apart
            if names.count(name) > 1 or not each.startswith("mechanisms")
        ]
        values = [
            f"{each.rpartition('.')[2]} {identity.get(each, 'unknown')}"
            for each in shown
        ]
        labels.append(
            ", ".join([name, *(value[:_LABEL] for value in values[:_SETTINGS])])
        )
    # The table below the pictures has every setting in full.
    labels = [
        f"{label} ({n})" if labels.count(label) > 1 else label
        for n, label in enumerate(labels, 1)
    ]
    return [
        Group(label, colour, identity, tuple(members))
        for label, colour, (identity, members) in zip(
            labels, _GROUP_COLOURS, groups, strict=False
        )
    ]


def _apart(identities: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns the names of the settings in which runs differ."""
    names = dict.fromkeys(name for identity in identities for name in identity)
    return [
        name
        for name in names
        if len({identity.get(name) for identity in identities}) > 1
    ]


def _method(config: Mapping[str, Any]) -> str:
    """Returns "LoRA" ("AdaLoRA" with its ranks) if no mechanism is on, else "NA-LoRA"."""
    if config.get("mechanisms"):
        return "NA-LoRA"
    if config.get("adalora", {}).get("target_rank"):
        return "AdaLoRA"
    return "LoRA"


def _plain_exports(groups: Sequence[Group]) -> Iterator[str]:
    """Yields a sentence on every group with adapters that were exported before its mechanisms
    acted."""
    for group in groups:
        steps = {
            run.exported_step: run.unreached_step
            for run in group.runs
            if run.unreached_step
        }
        for step, first in steps.items():
            yield (
                f"{group.label}: the adapter of step {step} was exported, and mechanisms act from step {first}: "
                "it is plain LoRA."
            )


def _row(group: Group) -> dict[str, str]:
    """Returns a group's cells by column: means over its runs, with minimum and maximum of several
    runs."""
    ends = [run.outcome for run in group.runs if len(run.outcome) == 2]
    losses = [
        run.measured[-1]["eval"].get("loss") for run in group.runs if run.measured
    ]
    seeds = ", ".join(str(run.config.get("seed", "?")) for run in group.runs)
    count = len(group.runs)
    speeds = [run.column("tokens_per_second")[1] for run in group.runs]
    row = {
        "before": _spread([end[0].value for end in ends]),
        "after": _spread([end[1].value for end in ends]),
        "difference": _spread([end[1].value - end[0].value for end in ends], "+.3f"),
        "loss after": _spread(losses),
        "exported step": ", ".join(
            dict.fromkeys(str(run.exported_step or "–") for run in group.runs)
        ),
        "misalignment": _spread([run.last("misalignment") for run in group.runs]),
        "tokens/s": _spread(
            [float(np.nanmedian(s)) for s in speeds if np.isfinite(s).any()], ",.0f"
        ),
        "time": _spread([run.total("seconds") for run in group.runs], "time"),
        "runs": f"{count} ({'seed' if count == 1 else 'seeds'} {seeds})",
    }
    if "loss" in group.metric:
        del row["loss after"]  # it is the metric
    return row


def _spread(values: Sequence[float | None], form: str = ".3f") -> str:
    finite = [value for value in values if value is not None and np.isfinite(value)]

    def text(value: float) -> str:
        return duration(value) if form == "time" else format(value, form)

    if not finite:
        return "–"
    mean = text(float(np.mean(finite)))
    low = text(min(finite))
    high = text(max(finite))
    if low == high:
        return mean
    return f"{mean} ({low} to {high})"


def _pictures(groups: Sequence[Group]) -> Iterator[tuple[str, str, Markup]]:
    """Yields (name, title, plot); the template explains them by name."""
    metric = groups[0].metric
    titles = {  # of the metric one that names the held-out data once
        "metric": metric.capitalize()
        if metric.startswith("held-out")
        else f"Held-out {metric}",
        "loss": "Training loss",
        "misalignment": "Misalignment",
        "feature": "Feature movement",
        "grad_norm": "Gradient norm",
    }
    with style():
        for name, title in titles.items():
            svg = _bands(groups, name, title)
            if svg is not None:
                yield name, title, Markup(svg)


def _column(run: History, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values of the headline metric, of a mean over layers, or of a scalar of the
    log steps."""
    if name == "metric":
        scores = run.scores
        return np.array([s.step for s in scores], float), np.array(
            [s.value for s in scores], float
        )
    if name != "feature":
        return run.column(name)
    steps, values = run.layers(name)
    if values.ndim != 2:
        return np.zeros(0), np.zeros(0)
    measured = np.isfinite(values).any(axis=1)
    return steps[measured], np.nanmean(values[measured], axis=1)


def _bands(groups: Sequence[Group], name: str, title: str) -> str | None:
    """Returns a plot with a line and band per group, over the steps common to all of its runs."""
    figure, axis = new_figure()
    for group in groups:
        columns = [map(np.ndarray.tolist, _column(run, name)) for run in group.runs]
        rows = [dict(zip(*pair, strict=True)) for pair in columns]
        steps = sorted(set.intersection(*(set(row) for row in rows)))
        values = np.array([[row[step] for step in steps] for row in rows])
        complete = np.isfinite(values).all(axis=0)
        steps = [tick for tick, fine in zip(steps, complete, strict=True) if fine]
        values = values[:, complete]
        if not steps:
            continue
        at, mean, low, high = thin(
            np.array(steps), values.mean(0), values.min(0), values.max(0)
        )
        if len(rows) > 1:
            axis.fill_between(
                at, low, high, color=COLOURS[group.colour], alpha=0.2, linewidth=0
            )
        marker = {"marker": "o", "markersize": 4} if len(at) < 20 else {}
        axis.plot(at, mean, color=COLOURS[group.colour], **marker)
    if not axis.lines:
        return None
    axis.set(xlabel="step", ylabel=title[0].lower() + title[1:])
    return to_svg(
        figure,
        f"compare-{name.replace('_', '-')}",
        f"{title} of the runs over the steps",
    )
