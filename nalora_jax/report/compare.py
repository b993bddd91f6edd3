"""A page that compares several runs; runs that differ only in their seed are a line with a band.

Like report.html it is made from metrics.jsonl alone, loads no resources and fits a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from nalora_jax.common.files import write_atomically
from nalora_jax.config.structured import flatten_settings
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.intervals import t_interval
from nalora_jax.report import plots
from nalora_jax.report.drawing import COLOURS, new_figure, style, thin, to_svg
from nalora_jax.report.history import History, read_history
from nalora_jax.report.html import plain_text, resource, template
from nalora_jax.report.sections import describe_program
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
_FEW_POINTS = 20  # a line with fewer points has markers
_LABEL = 32  # characters of a setting in a label
_SETTINGS = 3  # settings in a label
# also the maximum number of groups
_GROUP_COLOURS = ("c1", "c2", "c3", "r0", "r3", "r1", "r2")
_MISSING = "–"
_ACTING = (
    "mechanisms acted in"  # head of a column, which is left out if no group has a value
)


@dataclass(frozen=True)
class RunGroup:
    """Runs with equal settings."""

    label: str
    colour: str  # variable of the page's style
    settings: Mapping[str, str]  # by dotted name, as a user would type them
    runs: tuple[History, ...]

    @property
    def metric(self) -> str:
        """Returns the name of the headline metric."""
        metric = self.runs[0].metric
        if metric is None:
            return "held-out metric"
        return metric[1]


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
    runs = [read_history(folder) for folder in folders]
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, render_comparison(runs))
    return output


def render_comparison(runs: Sequence[History]) -> str:
    """Returns the page as text."""
    groups = group_runs(runs)
    differing = _differing([group.settings for group in groups])
    # Metrics of runs that differ in these settings, or in the metric, are not comparable.
    of_task = [name for name in differing if name in _TASK]
    if len({run.metric[1] for run in runs if run.metric}) > 1:
        of_task.append("metric")
    title = f"{len(runs)} runs, {len(groups)} settings"
    if len(groups) == 1:
        title = f"{len(runs)} runs, 1 setting"
    columns = [_row(group) for group in groups]
    if all(cells[_ACTING] == _MISSING for cells in columns):
        for cells in columns:
            del cells[_ACTING]
    rows = []
    for group, cells in zip(groups, columns, strict=True):
        rows.append((group.label, f"var(--{group.colour})", list(cells.values())))
    settings = []
    for name in differing:
        values = [group.settings.get(name, _MISSING) for group in groups]
        settings.append([name, *values])
    paired = None
    if not of_task:
        paired = compare_by_seed(groups)
    largest_programs = [max(run.program_sizes, default=1) for run in runs]
    return template("compare.html.j2").render(
        css=Markup(resource("style.css")),
        title=title,
        heads=list(columns[0]),
        rows=rows,
        metric=groups[0].metric,
        apart=of_task,
        plain=list(_plain_exports(groups)),
        paired=paired,
        programs=max(largest_programs) > 1,
        pictures=list(_pictures(groups)),
        labels=[group.label for group in groups],
        settings=settings,
    )


def group_runs(runs: Sequence[History]) -> list[RunGroup]:
    """Groups runs that differ only in their seed, in the given order, named by differences."""
    identities: list[dict[str, str]] = []
    members: list[list[History]] = []
    for run in runs:
        identity = {}
        for name, value in flatten_settings(run.config):
            if name not in _ASIDE:
                identity[name] = plain_text(value)
        if identity not in identities:
            identities.append(identity)
            members.append([])
        members[identities.index(identity)].append(run)
    if len(identities) > len(_GROUP_COLOURS):
        raise NaloraError(
            "nalora report",
            expected=f"at most {len(_GROUP_COLOURS)} different settings",
            found=len(identities),
        )
    labels = _labels(identities, [_method(group[0].config) for group in members])
    columns = zip(labels, _GROUP_COLOURS, identities, members, strict=False)
    return [
        RunGroup(label, colour, identity, tuple(group))
        for label, colour, identity, group in columns
    ]


def _labels(identities: Sequence[Mapping[str, str]], methods: list[str]) -> list[str]:
    """Returns a different name of each group: its method and the settings that differ."""
    differing = _differing(identities)
    labels = []
    for method, identity in zip(methods, identities, strict=True):
        label = method
        # Settings in the method's name are not repeated, unless two groups have the same name.
        shown = differing
        if methods.count(method) == 1:
            shown = [name for name in differing if not name.startswith("mechanisms")]
        for name in shown[:_SETTINGS]:
            field = name.rpartition(".")[2]
            value = f"{field} {identity.get(name, 'unknown')}"
            label += f", {value[:_LABEL]}"
        labels.append(label)
    # The table below the pictures has every setting in full.
    for number, label in enumerate(labels.copy(), start=1):
        if labels.count(label) > 1:
            labels[number - 1] = f"{label} ({number})"
    return labels


def _differing(identities: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns the names of the settings in which runs differ."""
    names: dict[str, None] = {}
    for identity in identities:
        names |= dict.fromkeys(identity)
    differing = []
    for name in names:
        if len({identity.get(name) for identity in identities}) > 1:
            differing.append(name)
    return differing


def _method(config: Mapping[str, Any]) -> str:
    """Returns "LoRA" ("AdaLoRA" with its ranks) if no mechanism is on, else "NA-LoRA"."""
    if config.get("mechanisms"):
        return "NA-LoRA"
    if config.get("adalora", {}).get("target_rank"):
        return "AdaLoRA"
    return "LoRA"


def _plain_exports(groups: Sequence[RunGroup]) -> Iterator[str]:
    """Yields a sentence for each exported adapter in whose steps no mechanism acted."""
    for group in groups:
        first_steps = {}  # in which mechanisms act, by exported step
        for run in group.runs:
            if run.unreached_step:
                first_steps[run.exported_step] = run.unreached_step
        for step, first in first_steps.items():
            yield (
                f"{group.label}: the adapter of step {step} was exported, and mechanisms act "
                f"from step {first}: it is plain LoRA."
            )


def _row(group: RunGroup) -> dict[str, str]:
    """Returns a group's cells by the heads of their columns.

    They are means over its runs, with the minimum and maximum if several runs differ.
    """
    before = []
    after = []
    differences = []
    losses = []
    # different texts, in the order of the runs
    exported: dict[str, None] = {}
    acting: dict[str, None] = {}
    for run in group.runs:
        if len(run.outcome) == 2:
            first, last = run.outcome
            before.append(first.value)
            after.append(last.value)
            differences.append(last.value - first.value)
        if run.measured:
            losses.append(run.measured[-1]["eval"].get("loss"))
        exported[str(run.exported_step or _MISSING)] = None
        if run.acting_steps is None:
            acting[_MISSING] = None
        else:
            acted, steps = run.acting_steps
            acting[f"{acted} of {steps} steps"] = None
    row = {
        "before": _spread(before),
        "after": _spread(after),
        "difference": _spread(differences, "{:+.3f}".format),
        "loss after": _spread(losses),
        "exported step": ", ".join(exported),
        _ACTING: ", ".join(acting),
        "misalignment": _spread([run.last("misalignment") for run in group.runs]),
        "tokens/s": _program_rates(group),
        "time": _spread([run.total("seconds") for run in group.runs], duration),
        "runs": _seeds(group),
    }
    if "loss" in group.metric:
        del row["loss after"]  # it is the metric
    return row


def _program_rates(group: RunGroup) -> str:
    """Returns the median tokens per second of the compiled programs, as text.

    If a program trained several runs, it includes their number.
    """
    medians = []
    sizes: dict[int, None] = {}
    for run in group.runs:
        rates = run.program_rate()[1]
        if np.isfinite(rates).any():
            medians.append(float(np.nanmedian(rates)))
            sizes |= dict.fromkeys(run.program_sizes)
    text = _spread(medians, "{:,.0f}".format)
    if max(sizes, default=1) > 1:
        text += f" {describe_program(list(sizes))}"
    return text


def _seeds(group: RunGroup) -> str:
    """Returns the number of runs with their seeds."""
    seeds = ", ".join(_seed(run) for run in group.runs)
    if len(group.runs) == 1:
        return f"1 (seed {seeds})"
    return f"{len(group.runs)} (seeds {seeds})"


def _seed(run: History) -> str:
    """Returns the seed of a run as text, "?" if it is unknown."""
    return str(run.config.get("seed", "?"))


def _spread(
    values: Sequence[float | None], show: Callable[[float], str] = "{:.3f}".format
) -> str:
    """Returns the mean of the known values as text, with minimum and maximum if they differ."""
    finite = [value for value in values if value is not None and np.isfinite(value)]
    if not finite:
        return _MISSING
    mean = show(float(np.mean(finite)))
    low = show(min(finite))
    high = show(max(finite))
    if low == high:
        return mean
    return f"{mean} ({low} to {high})"


# ---------------------------------------------------------------- paired by seed


@dataclass(frozen=True)
class SeedDifferences:
    """Differences of the headline metric after training from a reference, by shared seed."""

    reference: str  # label of the group
    # label, seeds, mean difference, its 95% interval, each difference
    rows: list[list[str]]


def compare_by_seed(groups: Sequence[RunGroup]) -> SeedDifferences | None:
    """Returns the paired differences from plain LoRA, or from the first group without one.

    None if no other group shares two seeds with it. The interval is Student's t of the differences.
    """
    if len(groups) < 2:
        return None
    reference = groups[0]
    for group in reversed(groups):
        if _method(group.runs[0].config) == "LoRA":
            reference = group
    base = _results_by_seed(reference)
    rows = []
    for group in groups:
        if group is reference:
            continue
        results = _results_by_seed(group)
        differences = []
        by_seed = []
        for seed in base:
            if seed in results:
                difference = results[seed] - base[seed]
                differences.append(difference)
                by_seed.append(f"{seed}: {difference:+.3f}")
        count = len(differences)
        if count < 2:
            continue
        mean = np.mean(differences)
        low, high = t_interval(np.array(differences))
        rows.append(
            [
                group.label,
                str(count),
                f"{mean:+.3f}",
                f"{low:+.3f} to {high:+.3f}",
                ", ".join(by_seed),
            ]
        )
    if not rows:
        return None
    return SeedDifferences(reference.label, rows)


def _results_by_seed(group: RunGroup) -> dict[str, float]:
    """Returns the mean headline metric of the exported adapters by seed."""
    values: dict[str, list[float]] = {}
    for run in group.runs:
        if run.final and run.outcome:
            of_seed = values.setdefault(_seed(run), [])
            of_seed.append(run.outcome[-1].value)
    return {seed: float(np.mean(of_seed)) for seed, of_seed in values.items()}


# ---------------------------------------------------------------- plots


def _pictures(groups: Sequence[RunGroup]) -> Iterator[tuple[str, str, Markup]]:
    """Yields (name, title, plot); the template explains them by name."""
    metric = groups[0].metric.capitalize()
    if not metric.startswith("Held-out"):
        metric = f"Held-out {groups[0].metric}"
    loss_kinds = set()
    for group in groups:
        loss_kinds |= {run.loss_kind for run in group.runs}
    loss_kind = "loss"
    if len(loss_kinds) == 1:
        loss_kind = loss_kinds.pop()
    titles = {
        "metric": metric,
        loss_kind: plots.LOSS_NAMES[loss_kind].capitalize(),
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
    """Returns the steps [T] and values [T] of a curve.

    ``name`` is "metric" for the headline metric, "feature" for the mean feature movement over
    layers, a kind of loss, or a scalar of the log steps.
    """
    if name == "metric":
        evaluated = [score.step for score in run.scores]
        scores = [score.value for score in run.scores]
        return np.array(evaluated, float), np.array(scores)
    if name in plots.LOSS_NAMES:
        return run.column("loss")
    if name != "feature":
        return run.column(name)
    steps, values = run.layers(name)
    if values.ndim != 2:  # [T, L]
        return np.zeros(0), np.zeros(0)
    measured = np.isfinite(values).any(axis=1)
    return steps[measured], np.nanmean(values[measured], axis=1)


def _bands(groups: Sequence[RunGroup], name: str, title: str) -> str | None:
    """Returns a plot with a group's mean as a line and its range as a band; None if it is empty.

    Args:
      groups: of runs.
      name: of the curve, as for `_column`.
      title: of the plot, which becomes the label of its y axis.
    """
    figure, axis = new_figure()
    for group in groups:
        curves = []  # of each run, its values by step
        for run in group.runs:
            of_run = map(np.ndarray.tolist, _column(run, name))
            curves.append(dict(zip(*of_run, strict=True)))
        steps = sorted(set.intersection(*map(set, curves)))  # common to all runs
        rows = []
        for curve in curves:
            rows.append([curve[step] for step in steps])
        values = np.array(rows)  # [runs, steps]
        complete = np.isfinite(values).all(axis=0)
        if not complete.any():
            continue
        values = values[:, complete]
        at, mean, low, high = thin(
            np.array(steps)[complete],
            values.mean(0),
            values.min(0),
            values.max(0),
        )
        colour = COLOURS[group.colour]
        if len(rows) > 1:
            axis.fill_between(
                at,
                low,
                high,
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
        line = axis.plot(at, mean, color=colour)[0]
        if len(at) < _FEW_POINTS:
            line.set(marker="o", markersize=4)
    if not axis.lines:
        return None
    first_letter = title[0].lower()
    axis.set(xlabel="step", ylabel=first_letter + title[1:])
    unique = "compare-" + name.replace("_", "-")
    return to_svg(figure, unique, f"{title} of the runs over the steps")
