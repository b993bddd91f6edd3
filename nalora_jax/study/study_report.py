"""Tables and pictures of a study, computed from its records, and its progress."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from nalora_jax.common.files import make_unlinked_folder, write_atomically
from nalora_jax.config.structured import flatten_settings
from nalora_jax.errors import NaloraError
from nalora_jax.report import tables
from nalora_jax.report.tables import markdown_table
from nalora_jax.study import analysis, pictures, planned_runs, provenance
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import Records, StudyRecord, hours
from nalora_jax.study.subjects import subject_of

log = logging.getLogger(__name__)
_number = partial(tables.number, missing="-")

_RESULTS = "results.md"
PICTURES = "pictures"
_OURS = re.compile(
    r"(loss_by_rate|loss_by_step|misalignment|importance|differences(_\d+)?)\.svg"
)


def write_tables(protocol: Protocol) -> list[Path]:
    """Writes ``results.md`` and ``pictures/*.svg`` to the protocol's folder; returns their paths.

    Raises:
      NaloraError: there is no record, the file is damaged, or records or protocol changed.
    """
    store = Records(protocol.folder)
    records = provenance.checked_records(protocol, store)
    if not records:
        raise NaloraError(
            str(store.path),
            expected="records of finished runs",
            found="none",
            remedy=f"run it first: nalora study run {protocol.folder}",
        )
    if note := provenance.describe_old(records):
        log.info("%s", note)
    drawn = pictures.draw(protocol, records)
    text = render_results(protocol, records)
    if drawn:
        text += "\n## Pictures\n"
    for name in drawn:
        label = name.removesuffix(".svg").replace("_", " ")
        text += f"\n![{label}]({PICTURES}/{name})\n"
    folder = make_unlinked_folder(protocol.folder / PICTURES)
    for path in folder.glob("*.svg"):
        # of an earlier report
        if _OURS.fullmatch(path.name) and path.name not in drawn:
            path.unlink()
    written = [protocol.folder / _RESULTS, *(folder / name for name in drawn)]
    for path, content in zip(written, [text, *drawn.values()], strict=True):
        write_atomically(path, content)
    return written


# ---------------------------------------------------------------- tables

# Equal records give equal bytes.

_Group = Sequence[analysis.MethodResult]  # of a task and model
Table = tuple[list[str], list[list[str]]]  # heads and rows

# Columns of a run's last log step.
_MOVEMENT = {
    "misalignment": "misalignment",
    "misalignment_limit": "its limit",
    "mean_feature": "feature movement",
}
_SKEWED = 1  # absolute sample skewness of the differences above which the report warns
_BRIEF = [
    "method",
    "against",
    "task",
    "seeds",
    "difference",
    "95% interval",
    "better",
    "t p (Holm)",
]
_PRIMARY = [
    *_BRIEF,
    "Wilcoxon p (Holm)",
    "sign p",
    "effect",
    "equivalent",
    "deviation",
    "seeds needed",
    "margin (of the gain)",
]


def render_results(protocol: Protocol, records: Mapping[str, StudyRecord]) -> str:
    """Returns all tables as one Markdown document, by the template ``results.md.j2``.

    Args:
      protocol: the study.
      records: its finished runs.
    """
    tables = _Tables(protocol, records)
    compared = tables.compared
    # Number of comparisons with the baseline (True) and with permutation controls (False).
    families = {c.other == protocol.baseline: c.family for c in compared}
    skewed = []  # comparisons whose differences are too skewed for a t test
    primary = []  # rows of the table of the primary metric
    for comparison in compared:
        if comparison.measure.kind == "primary":
            primary.append(tables.primary_row(comparison))
            skewness = comparison.paired.skewness
            if abs(skewness) > _SKEWED:
                cell = comparison.cell
                methods = f"`{cell.method}` - `{comparison.other}`"
                skewed.append(f"{methods} on {cell.task} ({skewness:+.1f})")
    scored = []
    for name, task in protocol.tasks.items():
        if task.accuracy_items:
            scored.append(f"{task.accuracy_items:,} ({name})")
    if protocol.margin:
        margin = f"{protocol.margin:g}"
    else:
        margin = f"{protocol.margin_share:.0%} of the training gain"
    multiples = ""
    if len(protocol.test_multiples) > 1:
        multiples = tables.by_place(tables.multiples)
    probes = ""
    if protocol.probes:
        probes = tables.by_place(tables.probes)
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    path = files("nalora_jax.study") / "results.md.j2"
    template = environment.from_string(path.read_text(encoding="utf-8"))
    text = template.render(
        question=protocol.question,
        unit=_unit(protocol),
        metric=analysis.cost_label(protocol.metric),
        seeds=", ".join(map(str, protocol.tuning_seeds)),
        baseline=protocol.baseline,
        runs=tables.runs(),
        methods=tables.methods(),
        rates=tables.by_place(tables.learning_rates),
        common=tables.by_place(tables.common_rates),
        scored=", ".join(scored),
        tests=tables.by_place(tables.tests),
        families=[families.get(True, 0), families.get(False, 0)],
        margin=margin,
        primary=_table_of(_PRIMARY, primary),
        skewed=", ".join(skewed),
        limit=_SKEWED,
        other=tables.brief("other", "measure"),
        multiples=multiples,
        multiple=tables.brief("multiple", "rate"),
        probes=probes,
        probe=tables.brief("probe", "data"),
    )
    # without several blank lines, which empty tables leave
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _table_of(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; "" without rows."""
    if not rows:
        return ""
    return markdown_table(heads, rows)


def _unit(protocol: Protocol) -> str:
    """Returns the units of the losses of all tasks."""
    of_tasks = []
    for task in protocol.tasks:
        config = protocol.config(protocol.models[0], task, protocol.baseline, 1.0, 0)
        of_tasks.append(subject_of(config).unit(config))
    return "; ".join(dict.fromkeys(of_tasks))


class _Tables:
    """The tables of a study's results.

    Methods with the argument ``group`` return heads and rows of a task and model, for `by_place`.
    Other methods return Markdown.
    """

    def __init__(self, protocol: Protocol, records: Mapping[str, StudyRecord]) -> None:
        """Computes the results of all cells and the comparisons of all methods."""
        self._protocol = protocol
        self._records = records
        self._results = analysis.results(protocol, records)
        self.compared = analysis.comparisons(protocol, self._results)

    def by_place(self, table: Callable[[_Group], Table]) -> str:
        """Returns the table of each task and model, with a heading; without tables of no row."""
        tables = []
        for (task, model), group in analysis.group_by_task(self._results).items():
            heads, rows = table(group)
            if rows:
                tables.append(f"### {task}, {model}\n\n{markdown_table(heads, rows)}")
        return "\n\n".join(tables)

    def runs(self) -> str:
        """Returns the table of the study's runs, files and devices, without empty rows."""
        protocol = self._protocol
        records = self._records
        spent = f"{hours(records):.1f}"
        if protocol.budget_hours:
            spent += f" of {protocol.budget_hours:g}"
        tests = [record for record in records.values() if record["stage"] == "test"]
        not_done = ""
        if tests:
            not_done = self._tests_not_done()
        rules = set()
        for record in records.values():
            for name, digest in record.get("rules", {}).items():
                rules.add((name, digest))
        rule_files = [f"{name} {digest[:12]}" for name, digest in sorted(rules)]
        respelled = [digest[:16] for digest in protocol.respelled_from]
        rows = {
            "runs": f"{len(records) - len(tests)} to tune, {len(tests)} to test",
            "tests not done": not_done,
            "hours": spent,
            "settings of every run": _settings(protocol.run),
            "protocol": f"sha256 {protocol.digest[:16]}",
            "respelled from protocol": ", ".join(respelled),
            "protocol committed in": _commits(tests),
            "records made under protocol": self._distinct("protocol", 16),
            "code (sha256 of the package)": self._distinct("code", 12),
            "base (sha256 of the weights)": self._distinct("base", 16),
            "rule files (sha256)": ", ".join(rule_files),
        }
        if old := len(provenance.old_records(records)):
            label = "records without digests of base, data and rules"
            rows[label] = f"{old} (made by an earlier version)"
        rows["devices"] = self._distinct("device")
        filled = [(label, value) for label, value in rows.items() if value]
        return markdown_table(["", ""], filled)

    def _tests_not_done(self) -> str:
        """Returns the tests at chosen rates without a record."""
        protocol = self._protocol
        several = len(protocol.tasks) * len(protocol.models) > 1
        tests = []
        for run in planned_runs.list_pending(protocol, self._records):
            if run.stage == "test":
                method = run.cell.method
                if several:
                    method += f" on {run.cell.task}"
                tests.append(f"{method} at x {run.multiple:g}, seed {run.seed}")
        return "; ".join(tests)

    def _distinct(self, name: str, length: int = 200) -> str:
        """Returns the different values of a field of the records, cut to ``length`` characters."""
        values = set()
        for record in self._records.values():
            if record.get(name):
                values.add(str(record[name])[:length])
        return ", ".join(sorted(values))

    def methods(self) -> str:
        """Returns the table of methods with their settings."""
        heads = ["method", "description", "settings", "placebo of"]
        rows = []
        for name, method in self._protocol.methods.items():
            settings = dict(method.settings)
            if method.reseed:
                settings["reseed"] = method.reseed
            if method.no_gate:
                settings["no_gate"] = method.no_gate
            placebo = "-"
            if method.placebo_of:
                placebo = f"`{method.placebo_of}`"
            row = [
                name,
                method.about or "-",
                _settings(settings) or "-",
                placebo,
            ]
            rows.append(row)
        return markdown_table(heads, rows)

    def learning_rates(self, group: _Group) -> Table:
        """Returns the costs by which each method's learning rate was chosen, a column per rate."""
        all_rates: set[float] = set()
        for result in group:
            all_rates.update(result.tuning.rates)
        rates = sorted(all_rates)
        heads = ["method", *(f"{rate:g}" for rate in rates), "at an end"]
        rows = []
        for result in group:
            row = [result.cell.method]
            row += [_tuned(result.tuning, rate) for rate in rates]
            if result.tuning.at_edge:
                row.append("yes")
            else:
                row.append("")
            rows.append(row)
        return heads, rows

    def common_rates(self, group: _Group) -> Table:
        """Returns the differences from the baseline, a column per learning rate.

        The rates are those at which a method and the baseline were tuned.
        """
        by_method = {result.cell.method: result for result in group}
        baseline = by_method.pop(self._protocol.baseline)
        differences = {}
        all_rates: set[float] = set()
        for name, result in by_method.items():
            differences[name] = analysis.common_rates(result, baseline)
            all_rates.update(differences[name])
        heads = ["method"]
        if not all_rates:
            return heads, []
        rates = sorted(all_rates)
        for rate in rates:
            head = f"{rate:g}"
            if rate == baseline.tuning.chosen:
                head = f"**{head}**"
            heads.append(head)
        rows = []
        for name, by_rate in differences.items():
            row = [name]
            row += [_difference(by_rate.get(rate)) for rate in rates]
            rows.append(row)
        return heads, rows

    def tests(self, group: _Group) -> Table:
        """Returns each method's measures of the test items at its chosen learning rate."""
        metric = self._protocol.metric
        names = analysis.other_measured(metric, group)
        heads = [
            "method",
            "rate",
            "parameters",
            "seeds",
            "diverged",
            analysis.cost_label(metric),
            "deviation",
        ]
        heads += [
            *(name.replace("_", " ") for name in names),
            *_MOVEMENT.values(),
            "seconds a run",
        ]
        return heads, [_test_row(result, names) for result in group if result.tests]

    def multiples(self, group: _Group) -> Table:
        """Returns the test costs at multiples of the chosen rates, and the runs that diverged."""
        multiples = sorted(self._protocol.test_multiples)
        heads = ["method", *(f"x {multiple:g}" for multiple in multiples)]
        rows = []
        for result in group:
            if not result.tests:
                continue
            row = [result.cell.method]
            for multiple in multiples:
                mean = analysis.mean_of(result.losses(multiple))
                row.append(f"{_number(mean)} ({result.diverged(multiple)})")
            rows.append(row)
        return heads, rows

    def probes(self, group: _Group) -> Table:
        """Returns the loss on other data before training, and its mean change."""
        names = list(self._protocol.probes)
        rows = []
        for result in group:
            tests = list(result.finite().values())
            if tests:
                row = [result.cell.method]
                row += [_probe(tests, name) for name in names]
                rows.append(row)
        return ["method", *names], rows

    def brief(self, kind: str, lead: str) -> str:
        """Returns the comparisons by one kind of measure (`analysis.Measure`); "" without any.

        ``lead`` is the head of the first column, the measure's label.
        """
        rows = []
        for comparison in self.compared:
            if comparison.measure.kind == kind:
                rows.append([comparison.measure.label, *self._brief_row(comparison)])
        return _table_of([lead, *_BRIEF], rows)

    def _brief_row(self, comparison: analysis.MethodComparison) -> list[str]:
        """Returns the cells of the columns `_BRIEF`."""
        statistics = comparison.paired
        cell = comparison.cell
        task = cell.task
        if len(self._protocol.models) > 1:
            task += f" ({cell.model})"
        interval = "-"
        if statistics.n > 1:
            interval = (
                f"{format_signed(statistics.low)} to {format_signed(statistics.high)}"
            )
        return [
            cell.method,
            comparison.other,
            task,
            str(statistics.n),
            format_signed(statistics.mean),
            interval,
            f"{statistics.better}/{statistics.n}",
            p_value(statistics.t_p, comparison.t_holm),
        ]

    def primary_row(self, comparison: analysis.MethodComparison) -> list[str]:
        """Returns the cells of the columns `_PRIMARY`: all statistics of a comparison."""
        statistics = comparison.paired
        margin = "-"
        needed = "-"
        if statistics.margin > 0:
            share = "no gain"
            if comparison.gain > 0:
                share = f"{statistics.margin / comparison.gain:.1%}"
            margin = f"{statistics.margin:.3g} ({share})"
            if statistics.n > 1:
                needed = str(statistics.seeds_needed or "over 10,000")
        equivalent = "no"
        if statistics.equivalent:
            equivalent = "yes"
        return [
            *self._brief_row(comparison),
            p_value(statistics.wilcoxon_p, comparison.wilcoxon_holm),
            _number(statistics.sign_p, 3),
            _number(statistics.effect, 2),
            equivalent,
            _number(statistics.deviation),
            needed,
            margin,
        ]


# ---------------------------------------------------------------- cells


def _commits(tests: Sequence[StudyRecord]) -> str:
    """Returns the commits of the protocol under which the tests were made, as text for a cell."""
    if not tests:
        return "not yet tested"
    commits = set()
    outside = 0
    for record in tests:
        if record.get("commit"):
            commits.add(str(record["commit"])[:12])
        else:
            outside += 1
    places = sorted(commits)
    if outside:
        places.append(f"no repository ({outside} tests)")
    return ", ".join(places)


def _settings(settings: Mapping[str, Any]) -> str:
    """Returns settings as text for a table cell.

    Example:
      >>> _settings({"lora": {"dora": True, "init": "pissa"}})
      '`lora.dora = true`, `lora.init = "pissa"`'
    """
    texts = []
    for name, value in flatten_settings(settings):
        text = json.dumps(value, ensure_ascii=False, default=str)
        texts.append(f"`{name} = {text}`".replace("|", "\\|"))
    return ", ".join(texts)


def _tuned(grid: planned_runs.Tuning, rate: float) -> str:
    """Returns the mean cost at a rate, bold if it is chosen; "" if the grid lacks it."""
    if rate not in grid.costs:
        return ""
    mean = grid.costs[rate]
    if mean is None:
        return "-"
    if mean == math.inf:
        return "diverged"
    if rate == grid.chosen:
        return f"**{_number(mean)}**"
    return _number(mean)


def _difference(common: tuple[float, float | None] | None) -> str:
    """Formats a difference of losses at a common rate, with the ratio of the gates' movements.

    ``common`` is the pair of both; the ratio is None if the movements were not measured, and the
    pair if the methods have no rate in common.
    """
    if common is None:
        return ""
    difference, ratio = common
    if ratio is None:
        return format_signed(difference)
    return f"{format_signed(difference)} ({ratio:.2f} x)"


def _test_row(result: analysis.MethodResult, names: Sequence[str]) -> list[str]:
    """Returns a method's row of `_Tables.tests`; ``names`` are measures other than the metric."""
    losses = result.losses()
    finite = list(result.finite().values())
    tests = list(result.tests.values())
    row = [
        result.cell.method,
        f"{result.tuning.chosen:g}",
        f"{tests[0]['parameters']:,}",
        str(len(losses)),
        str(result.diverged()),
        _number(analysis.mean_of(losses)),
        _number(analysis.deviation(losses)),
    ]
    for name in names:
        mean = analysis.mean_of(result.measured(name))
        if name == "loss":
            row.append(_number(mean, 4))
        else:
            row.append(_number(mean, 3))
    for name in _MOVEMENT:
        mean = analysis.mean_of(analysis.last_of(finite, name))
        row.append(_number(mean))
    seconds = [float(record["seconds"]) for record in tests]
    row.append(_number(analysis.mean_of(seconds), 0))
    return row


def _probe(records: Sequence[StudyRecord], name: str) -> str:
    """Returns the loss on other data before training, and its mean change."""
    before = float(records[0]["probes"][name]["before"])
    changes = [analysis.forgotten(name, record) for record in records]
    return f"{_number(before)} {format_signed(analysis.mean_of(changes))}"


def format_signed(value: float) -> str:
    """Returns a difference with its sign.

    Example:
      >>> format_signed(-0.0), format_signed(0.0044)
      ('+0.0000', '+0.0044')
    """
    # Adding 0.0 turns -0.0 into 0.0.
    return f"{value + 0.0:+.4f}"


def p_value(p: float, corrected: float) -> str:
    """Returns a p-value, with its corrected value in brackets; "-" if it is undefined.

    Example:
      >>> p_value(0.0313, 0.5625), p_value(0.00002, 0.0004)
      ('0.031 (0.562)', '<0.001 (<0.001)')
    """
    if not math.isfinite(p):
        return "-"
    texts = []
    for value in (p, corrected):
        if value < 0.001:
            texts.append("<0.001")
        else:
            texts.append(f"{value:.3f}")
    return f"{texts[0]} ({texts[1]})"


# ---------------------------------------------------------------- progress, as text


def status(protocol: Protocol) -> str:
    """Returns the progress of a study as text.

    It has the numbers of runs, the time spent and estimated, and each cell's learning rates with
    their costs.

    Raises:
      NaloraError: records or protocol were changed (`checked_records`).
    """
    store = Records(protocol.folder)
    records = provenance.checked_records(protocol, store)
    runs = planned_runs.list_runs(protocol, records)
    grids = {
        cell: planned_runs.tuning_grid(protocol, cell, records)
        for cell in planned_runs.cells(protocol)
    }
    left = [run for run in runs if run.id not in records]
    busy = sum(store.claimed(run.id) for run in left)
    untuned = sum(grid.chosen is None for grid in grids.values())
    # tests that are not in ``runs`` yet
    later = untuned * len(protocol.test_seeds) * len(protocol.test_multiples)
    spent = hours(records)
    done = len(runs) - len(left)
    to_do = len(left) - busy
    of_runs = f"runs: {done} done, {busy} in progress, {to_do} to do"
    if later:
        of_runs += f", and {later} tests once their learning rates are chosen"
    of_time = f"time: {spent:.1f} h spent"
    if protocol.budget_hours:
        of_time += f" of {protocol.budget_hours:g} h"
    if records:
        remaining = (len(left) + later) * spent / len(records)
        of_time += f", about {remaining:.1f} h left"
    lines = [f"{protocol.path}: {protocol.question}", of_runs, of_time]
    if protocol.metric != "loss":
        lines.append(f"{analysis.cost_label(protocol.metric)} on the validation items:")
    for cell, grid in grids.items():
        costs = []
        for rate, cost in grid.costs.items():
            if cost is None:
                costs.append(f"{rate:g}: -")
            else:
                costs.append(f"{rate:g}: {cost:.4f}")
        line = f"  {' '.join(cell)}: {', '.join(costs)}"
        if grid.chosen:
            line += f"; chosen {grid.chosen:g}"
        if grid.at_edge:
            line += " (at an end of the grid)"
        lines.append(line)
    if foreign := records.keys() - {run.id for run in runs}:
        lines.append(f"{len(foreign)} records belong to no run of this protocol")
    return "\n".join(lines)
