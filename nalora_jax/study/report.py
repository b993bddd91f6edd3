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
from nalora_jax.config.structured import dotted
from nalora_jax.errors import NaloraError
from nalora_jax.report import tables
from nalora_jax.report.tables import markdown_table
from nalora_jax.study import analysis, pictures, plan, provenance
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import Record, Records, hours

log = logging.getLogger(__name__)
number = partial(tables.number, missing="-")

TABLES = "results.md"
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
        remedy = f"run it first: nalora study run {protocol.folder}"
        raise NaloraError(
            str(store.path),
            expected="records of finished runs",
            found="none",
            remedy=remedy,
        )
    if note := provenance.describe_old(records):
        log.info("%s", note)
    drawn = pictures.draw(protocol, records)
    text = render_results(protocol, records)
    if drawn:
        names = {name: name.removesuffix(".svg").replace("_", " ") for name in drawn}
        links = "\n\n".join(
            f"![{label}]({PICTURES}/{name})" for name, label in names.items()
        )
        text += f"\n## Pictures\n\n{links}\n"
    folder = make_unlinked_folder(protocol.folder / PICTURES)
    for path in folder.glob("*.svg"):
        # of an earlier report
        if _OURS.fullmatch(path.name) and path.name not in drawn:
            path.unlink()
    written = [protocol.folder / TABLES, *(folder / name for name in drawn)]
    for path, content in zip(written, [text, *drawn.values()], strict=True):
        write_atomically(path, content)
    return written


# ---------------------------------------------------------------- tables; equal records give equal
# bytes

Group = Sequence[analysis.MethodResult]  # of a task and model
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
    *(*_BRIEF, "Wilcoxon p (Holm)", "sign p", "effect", "equivalent", "deviation"),
    *("seeds needed", "margin (of the gain)"),
]


def render_results(protocol: Protocol, records: Mapping[str, Record]) -> str:
    """Returns all tables as one Markdown document, by the template ``results.md.j2``."""
    tables = _Tables(protocol, records)
    compared = tables.compared
    tasks = protocol.tasks.items()
    families = {c.other == protocol.baseline: c.family for c in compared}
    primary = [
        comparison for comparison in compared if comparison.measure.kind == "primary"
    ]
    of_skewed = (c for c in primary if abs(c.paired.skewness) > _SKEWED)
    skewed = (
        f"`{c.cell.method}` - `{c.other}` on {c.cell.task} ({c.paired.skewness:+.1f})"
        for c in of_skewed
    )
    scored = (
        f"{task.accuracy_items:,} ({name})"
        for name, task in tasks
        if task.accuracy_items
    )
    share = f"{protocol.margin_share:.0%} of the training gain"
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    template = (
        files("nalora_jax.study").joinpath("results.md.j2").read_text(encoding="utf-8")
    )
    text = environment.from_string(template).render(
        question=protocol.question,
        unit=_unit(protocol),
        metric=analysis.named(protocol.metric),
        seeds=", ".join(map(str, protocol.tuning_seeds)),
        baseline=protocol.baseline,
        runs=tables.runs(),
        methods=tables.methods(),
        rates=tables.by_place(tables.learning_rates),
        common=tables.by_place(tables.common_rates),
        scored=", ".join(scored),
        tests=tables.by_place(tables.tests),
        families=[families.get(True, 0), families.get(False, 0)],
        margin=f"{protocol.margin:g}" if protocol.margin else share,
        primary=markdown_table(_PRIMARY, map(tables.primary_row, primary))
        if primary
        else "",
        skewed=", ".join(skewed),
        limit=_SKEWED,
        other=tables.brief("other", "measure"),
        multiples=tables.by_place(tables.multiples)
        if len(protocol.test_multiples) > 1
        else "",
        multiple=tables.brief("multiple", "rate"),
        probes=tables.by_place(tables.probes) if protocol.probes else "",
        probe=tables.brief("probe", "data"),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _unit(protocol: Protocol) -> str:
    units = {
        "": "nats per answer token" if not protocol.preference else "nats per pair",
        "classify": "nats per image among the prompts of all classes",
        "contrast": "nats per image or caption among all held-out pairs (the mean of both ways)",
    }
    runs = [
        protocol.config(protocol.models[0], t, protocol.baseline, 1.0, 0)
        for t in protocol.tasks
    ]
    if runs[0].rl.rewards:
        return (
            "1 minus the mean reward of greedy answers, of probes nats per answer token"
        )
    return "; ".join(dict.fromkeys(units[config.vision.task] for config in runs))


class _Tables:
    """The tables of a study's results; of a task and model, heads and rows."""

    def __init__(self, protocol: Protocol, records: Mapping[str, Record]) -> None:
        self._protocol = protocol
        self._records = records
        self._results = analysis.results(protocol, records)
        self.compared = analysis.comparisons(protocol, self._results)

    def by_place(self, table: Callable[[Group], Table]) -> str:
        """Returns the table of each task and model that has rows."""
        made = {
            place: table(group)
            for place, group in analysis.by_task(self._results).items()
        }
        return "\n\n".join(
            f"### {task}, {model}\n\n{markdown_table(heads, rows)}"
            for (task, model), (heads, rows) in made.items()
            if rows
        )

    def runs(self) -> str:
        """Returns the table of runs, files and devices."""
        protocol = self._protocol
        records = self._records
        if protocol.budget_hours:
            budget = f" of {protocol.budget_hours:g}"
        else:
            budget = ""
        tests = [record for record in records.values() if record["stage"] == "test"]
        rules = {
            item
            for record in records.values()
            for item in record.get("rules", {}).items()
        }
        rows = {
            "runs": f"{len(records) - len(tests)} to tune, {len(tests)} to test",
            "tests not done": self._not_done() if tests else "",
            "hours": f"{hours(records):.1f}{budget}",
            "settings of every run": _settings(protocol.run),
            "protocol": f"sha256 {protocol.digest[:16]}",
            "respelled from protocol": ", ".join(
                digest[:16] for digest in protocol.respelled_from
            ),
            "protocol committed in": _committed(tests),
            "records made under protocol": self._distinct("protocol", 16),
            "code (sha256 of the package)": self._distinct("code", 12),
            "base (sha256 of the weights)": self._distinct("base", 16),
            "rule files (sha256)": ", ".join(
                f"{name} {digest[:12]}" for name, digest in sorted(rules)
            ),
        }
        if old := len(provenance.old_records(records)):
            label = "records without digests of base, data and rules"
            rows[label] = f"{old} (made by an earlier version)"
        rows["devices"] = self._distinct("device")
        return markdown_table(["", ""], [row for row in rows.items() if row[1]])

    def _not_done(self) -> str:
        """Returns the tests at chosen rates without a record."""
        protocol = self._protocol
        records = self._records
        several = len(protocol.tasks) * len(protocol.models) > 1
        return "; ".join(
            f"{run.cell.method}{f' on {run.cell.task}' if several else ''} at x {run.multiple:g}, seed {run.seed}"
            for run in plan.wanted(protocol, records)
            if run.stage == "test" and run.id not in records
        )

    def _distinct(self, name: str, length: int = 200) -> str:
        records = self._records.values()
        return ", ".join(
            sorted(
                {str(record[name])[:length] for record in records if record.get(name)}
            )
        )

    def methods(self) -> str:
        """Returns the methods with their settings."""
        rows = []
        for name, method in self._protocol.methods.items():
            keys = {"reseed": method.reseed, "no_gate": method.no_gate}
            settings = method.settings | {
                key: value for key, value in keys.items() if value
            }
            placebo = f"`{method.placebo_of}`" if method.placebo_of else "-"
            rows.append(
                [name, method.about or "-", _settings(settings) or "-", placebo]
            )
        return markdown_table(["method", "description", "settings", "placebo of"], rows)

    def learning_rates(self, group: Group) -> Table:
        """Returns the costs by which each method's rate was chosen."""
        rates = sorted({rate for result in group for rate in result.tuning.rates})
        rows = [
            [
                r.cell.method,
                *(_tuned(r.tuning, rate) for rate in rates),
                "yes" * r.tuning.at_edge,
            ]
            for r in group
        ]
        return ["method", *(f"{rate:g}" for rate in rates), "at an end"], rows

    def common_rates(self, group: Group) -> Table:
        """Returns the differences from the baseline at each learning rate that both were tuned
        at."""
        (baseline,) = (
            result for result in group if result.cell.method == self._protocol.baseline
        )
        by_method = {
            r.cell.method: analysis.common_rates(r, baseline)
            for r in group
            if r is not baseline
        }
        rates = sorted({rate for common in by_method.values() for rate in common})
        heads = [
            f"**{rate:g}**" if rate == baseline.tuning.chosen else f"{rate:g}"
            for rate in rates
        ]
        rows = [
            [name, *(_common(common.get(r)) for r in rates)]
            for name, common in by_method.items()
        ]
        return ["method", *heads], rows if rates else []

    def tests(self, group: Group) -> Table:
        """Returns the measures at the chosen rates."""
        metric = self._protocol.metric
        names = [
            name
            for name in plan.others_of(metric)
            if any(result.measured(name) for result in group)
        ]
        heads = [
            "method",
            "rate",
            "parameters",
            "seeds",
            "diverged",
            analysis.named(metric),
            "deviation",
        ]
        heads += [
            *(name.replace("_", " ") for name in names),
            *_MOVEMENT.values(),
            "seconds a run",
        ]
        return heads, [_test_row(result, names) for result in group if result.tests]

    def multiples(self, group: Group) -> Table:
        """Returns the test costs at multiples of the chosen rates, and the runs that diverged."""
        factors = sorted(self._protocol.test_multiples)
        rows = [
            [
                r.cell.method,
                *(
                    f"{number(analysis.mean_of(r.losses(m)))} ({r.diverged(m)})"
                    for m in factors
                ),
            ]
            for r in group
            if r.tests
        ]
        return ["method", *(f"x {m:g}" for m in factors)], rows

    def probes(self, group: Group) -> Table:
        """Returns the loss on other data before training, and its mean change."""
        names = list(self._protocol.probes)
        finite = [
            (result.cell.method, list(result.finite().values())) for result in group
        ]
        rows = [
            [method, *(_probe(tests, name) for name in names)]
            for method, tests in finite
            if tests
        ]
        return ["method", *names], rows

    def brief(self, kind: str, lead: str) -> str:
        """Returns the comparisons of one kind of measure with intervals; "" without any."""
        compared = [
            comparison
            for comparison in self.compared
            if comparison.measure.kind == kind
        ]
        rows = [
            [comparison.measure.label, *self._brief_row(comparison)]
            for comparison in compared
        ]
        return markdown_table([lead, *_BRIEF], rows) if rows else ""

    def _brief_row(self, comparison: analysis.MethodComparison) -> list[str]:
        p = comparison.paired
        cell = comparison.cell
        if len(self._protocol.models) > 1:
            task = f"{cell.task} ({cell.model})"
        else:
            task = cell.task
        interval = f"{signed(p.low)} to {signed(p.high)}" if p.n > 1 else "-"
        difference = [str(p.n), signed(p.mean), interval, f"{p.better}/{p.n}"]
        return [
            cell.method,
            comparison.other,
            task,
            *difference,
            p_value(p.t_p, comparison.t_holm),
        ]

    def primary_row(self, comparison: analysis.MethodComparison) -> list[str]:
        """Returns all statistics of a comparison by the primary metric."""
        p = comparison.paired
        margin = "-"
        needed = "-"
        if p.margin > 0:
            if comparison.gain > 0:
                share = f"{p.margin / comparison.gain:.1%}"
            else:
                share = "no gain"
            margin = f"{p.margin:.3g} ({share})"
            needed = str(p.seeds_needed or "over 10,000") if p.n > 1 else "-"
        return [
            *self._brief_row(comparison),
            p_value(p.wilcoxon_p, comparison.wilcoxon_holm),
            number(p.sign_p, 3),
            number(p.effect, 2),
            "yes" if p.equivalent else "no",
            number(p.deviation),
            needed,
            margin,
        ]


# ---------------------------------------------------------------- cells


def _committed(tests: Sequence[Record]) -> str:
    if not tests:
        return "not yet tested"
    commits = sorted(
        {str(record["commit"])[:12] for record in tests if record.get("commit")}
    )
    outside = sum(not record.get("commit") for record in tests)
    return ", ".join(
        [*commits, *([f"no repository ({outside} tests)"] if outside else [])]
    )


def _settings(settings: Mapping[str, Any]) -> str:
    """Returns settings as text for a table cell.

    Example:
      >>> _settings({"lora": {"dora": True, "init": "pissa"}})
      '`lora.dora = true`, `lora.init = "pissa"`'
    """
    texts = {
        name: json.dumps(value, ensure_ascii=False, default=str)
        for name, value in dotted(settings)
    }
    return ", ".join(
        f"`{name} = {text}`".replace("|", "\\|") for name, text in texts.items()
    )


def _tuned(grid: plan.Tuning, rate: float) -> str:
    if grid.costs.get(rate) is None:
        return "-" if rate in grid.costs else ""
    if grid.costs[rate] == math.inf:
        text = "diverged"
    else:
        text = number(grid.costs[rate])
    return f"**{text}**" if rate == grid.chosen else text


def _common(common: tuple[float, float | None] | None) -> str:
    """Returns a difference at a common rate, and the ratio of the movements."""
    if common is None:
        return ""
    difference, movement = common
    return signed(difference) + ("" if movement is None else f" ({movement:.2f} x)")


def _test_row(result: analysis.MethodResult, names: Sequence[str]) -> list[str]:
    losses = result.losses()
    finite = list(result.finite().values())
    tests = list(result.tests.values())
    return [
        result.cell.method,
        f"{result.tuning.chosen:g}",
        f"{tests[0]['parameters']:,}",
        str(len(losses)),
        str(result.diverged()),
        number(analysis.mean_of(losses)),
        number(analysis.deviation(losses)),
        *(
            number(analysis.mean_of(result.measured(name)), 4 if name == "loss" else 3)
            for name in names
        ),
        *(
            number(analysis.mean_of(analysis.last_of(finite, name)))
            for name in _MOVEMENT
        ),
        number(analysis.mean_of([float(record["seconds"]) for record in tests]), 0),
    ]


def _probe(records: Sequence[Record], name: str) -> str:
    before = float(records[0]["probes"][name]["before"])
    return f"{number(before)} {signed(analysis.mean_of([analysis.forgotten(name, record) for record in records]))}"


def signed(value: float) -> str:
    """Returns a difference with its sign.

    Example:
      >>> signed(-0.00001), signed(0.0044)
      ('-0.0000', '+0.0044')
    """
    return f"{value + 0.0:+.4f}"


def p_value(p: float, corrected: float) -> str:
    """Returns a p-value, with its corrected value in brackets.

    Example:
      >>> p_value(0.0313, 0.5625), p_value(0.00002, 0.0004)
      ('0.031 (0.562)', '<0.001 (<0.001)')
    """
    if not math.isfinite(p):
        return "-"
    value, by_holm = (
        "<0.001" if each < 0.001 else f"{each:.3f}" for each in (p, corrected)
    )
    return f"{value} ({by_holm})"


# ---------------------------------------------------------------- progress, as text


def status(protocol: Protocol) -> str:
    """Returns the numbers of runs, the time spent and estimated, and the chosen learning rates.

    Raises:
      NaloraError: records or protocol were changed (`checked_records`).
    """
    store = Records(protocol.folder)
    records = provenance.checked_records(protocol, store)
    runs = plan.wanted(protocol, records)
    grids = {
        cell: plan.tuning(protocol, cell, records) for cell in plan.cells(protocol)
    }
    left = [run for run in runs if run.id not in records]
    busy = sum(store.claimed(run.id) for run in left)
    untuned = sum(grid.chosen is None for grid in grids.values())
    later = untuned * len(protocol.test_seeds) * len(protocol.test_multiples)
    spent = hours(records)
    lines = [
        f"{protocol.path}: {protocol.question}",
        f"runs: {len(runs) - len(left)} done, {busy} in progress, {len(left) - busy} to do"
        + (
            f", and {later} tests once their learning rates are chosen" if later else ""
        ),
        f"time: {spent:.1f} h spent"
        + (f" of {protocol.budget_hours:g} h" if protocol.budget_hours else "")
        + (
            f", about {(len(left) + later) * spent / len(records):.1f} h left"
            if records
            else ""
        ),
    ]
    if protocol.metric != "loss":
        lines.append(f"{analysis.named(protocol.metric)} on the validation items:")
    for cell, grid in grids.items():
        costs = {
            rate: "-" if cost is None else f"{cost:.4f}"
            for rate, cost in grid.costs.items()
        }
        chosen = f"; chosen {grid.chosen:g}" if grid.chosen else ""
        end = " (at an end of the grid)" if grid.at_edge else ""
        listed = ", ".join(f"{rate:g}: {cost}" for rate, cost in costs.items())
        lines.append(f"  {' '.join(cell)}: {listed}{chosen}{end}")
    if foreign := records.keys() - {run.id for run in runs}:
        lines.append(f"{len(foreign)} records belong to no run of this protocol")
    return "\n".join(lines)
