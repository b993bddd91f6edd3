"""Tables and pictures of a study, computed from its records, and its progress."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nalora_jax.common.files import make_unlinked_folder, write_atomically
from nalora_jax.config.structured import dotted
from nalora_jax.errors import NaloraError
from nalora_jax.report import tables
from nalora_jax.report.tables import markdown_table
from nalora_jax.study.analysis import (
    CommonRate,
    MethodComparison,
    MethodResult,
    common_rates,
    comparisons,
    deviation,
    forgotten,
    last,
    mean_of,
    named,
    results,
)
from nalora_jax.study.pictures import draw
from nalora_jax.study.plan import Cell, cells, others_of, tuning, wanted
from nalora_jax.study.protocol import Method, Protocol
from nalora_jax.study.provenance import checked_records, describe_old, old_records
from nalora_jax.study.records import Record, Records, hours
from nalora_jax.study.statistics import Paired

log = logging.getLogger(__name__)
number = partial(tables.number, missing="-")

TABLES = "results.md"
PICTURES = "pictures"
_OURS = re.compile(r"(loss_by_rate|loss_by_step|misalignment|importance|differences(_\d+)?)\.svg")


def write_tables(protocol: Protocol) -> list[Path]:
    """Writes ``results.md`` and ``pictures/*.svg`` to the protocol's folder; returns their paths.

    Raises:
      NaloraError: there is no record, the file is damaged, or records or protocol changed.
    """
    store = Records(protocol.folder)
    records = checked_records(protocol, store)
    if not records:
        remedy = f"run it first: nalora study run {protocol.folder}"
        raise NaloraError(str(store.path), expected="records of finished runs", found="none", remedy=remedy)
    if note := describe_old(records):
        log.info("%s", note)
    drawn = draw(protocol, records)
    text = render_results(protocol, records)
    if drawn:
        links = "\n\n".join(
            f"![{name.removesuffix('.svg').replace('_', ' ')}]({PICTURES}/{name})" for name in drawn
        )
        text += f"\n## Pictures\n\n{links}\n"
    folder = make_unlinked_folder(protocol.folder / PICTURES)
    for path in folder.glob("*.svg"):
        if _OURS.fullmatch(path.name) and path.name not in drawn:  # of an earlier report
            path.unlink()
    written = [protocol.folder / TABLES, *(folder / name for name in drawn)]
    for path, content in zip(written, [text, *drawn.values()], strict=True):
        write_atomically(path, content)
    return written


# ---------------------------------------------------------------- tables; equal records give equal bytes

# Columns of a run's last log step.
_MOVEMENT = {
    "misalignment": "misalignment",
    "misalignment_limit": "its limit",
    "mean_feature": "feature movement",
}


def render_results(protocol: Protocol, records: Mapping[str, Record]) -> str:
    """Returns all tables as one Markdown document."""
    cell_results = results(protocol, records)
    compared = comparisons(protocol, cell_results)
    parts = [
        f"# Results: {protocol.question}",
        "Written by `nalora study report` from `records.jsonl` and `protocol.toml`. Losses are "
        f"{_unit(protocol)}; differences are method minus the other, so below 0 is better.",
        _runs(protocol, records),
        _methods(protocol),
        _learning_rates(protocol, cell_results),
        common_rate_tables(protocol, cell_results),
        _tests(protocol, cell_results),
        primary_table(protocol, compared),
        other_measures(protocol, compared),
        multiples(protocol, cell_results, compared),
        probes(protocol, cell_results, compared),
    ]
    return "\n\n".join(section for section in parts if section) + "\n"


def _unit(protocol: Protocol) -> str:
    units = {
        "": "nats per answer token" if not protocol.preference else "nats per pair",
        "classify": "nats per image among the prompts of all classes",
        "contrast": "nats per image or caption among all held-out pairs (the mean of both ways)",
    }
    model, baseline = protocol.models[0], protocol.baseline
    runs = [protocol.config(model, task, baseline, 1.0, 0) for task in protocol.tasks]
    if runs[0].rl.rewards:
        return "1 minus the mean reward of greedy answers, of probes nats per answer token"
    return "; ".join(dict.fromkeys(units[config.vision.task] for config in runs))


def _runs(protocol: Protocol, records: Mapping[str, Record]) -> str:
    budget = f" of {protocol.budget_hours:g}" if protocol.budget_hours else ""
    tests = [record for record in records.values() if record["stage"] == "test"]
    rows = [
        ["runs", f"{len(records) - len(tests)} to tune, {len(tests)} to test"],
        ["tests not done", _not_done(protocol, records)],
        ["hours", f"{hours(records):.1f}{budget}"],
        ["settings of every run", _settings(protocol.run)],
        ["protocol", f"sha256 {protocol.digest[:16]}"],
        ["respelled from protocol", ", ".join(digest[:16] for digest in protocol.respelled_from)],
        ["protocol committed in", _committed(tests)],
        ["records made under protocol", _distinct(records, "protocol", 16)],
        ["code (sha256 of the package)", _distinct(records, "code", 12)],
        ["base (sha256 of the weights)", _distinct(records, "base", 16)],
        ["rule files (sha256)", _rule_files(records)],
        ["records without digests of base, data and rules", _old(records)],
        ["devices", _distinct(records, "device")],
    ]
    return "## Runs\n\n" + markdown_table(["", ""], [row for row in rows if row[1]])


def _not_done(protocol: Protocol, records: Mapping[str, Record]) -> str:
    """Returns the tests at chosen rates without a record; "" without any, or before any test."""
    if not any(record["stage"] == "test" for record in records.values()):
        return ""
    missing = [run for run in wanted(protocol, records) if run.stage == "test" and run.id not in records]
    several = len(protocol.tasks) * len(protocol.models) > 1
    names = [
        f"{run.cell.method}{f' on {run.cell.task}' if several else ''} at x {run.multiple:g}, seed {run.seed}"
        for run in missing
    ]
    return "; ".join(names)


def _committed(tests: Sequence[Record]) -> str:
    if not tests:
        return "not yet tested"
    commits = sorted({str(record["commit"])[:12] for record in tests if record.get("commit")})
    outside = sum(not record.get("commit") for record in tests)
    if outside:
        commits.append(f"no repository ({outside} tests)")
    return ", ".join(commits)


def _old(records: Mapping[str, Record]) -> str:
    count = len(old_records(records))
    if not count:
        return ""
    return f"{count} (made by an earlier version)"


def _rule_files(records: Mapping[str, Record]) -> str:
    rules = {item for record in records.values() for item in record.get("rules", {}).items()}
    return ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(rules))


def _distinct(records: Mapping[str, Record], name: str, length: int = 200) -> str:
    return ", ".join(
        sorted({str(record[name])[:length] for record in records.values() if record.get(name)})
    )


def _methods(protocol: Protocol) -> str:
    rows = [
        [
            name,
            method.about or "-",
            _settings(method.settings | _named(method)) or "-",
            f"`{method.placebo_of}`" if method.placebo_of else "-",
        ]
        for name, method in protocol.methods.items()
    ]
    return "## Methods\n\n" + markdown_table(["method", "description", "settings", "placebo of"], rows)


def _named(method: Method) -> dict[str, Any]:
    """Returns the method's keys other than its settings that change a run, if they are not the default."""
    keys = {"reseed": method.reseed, "no_gate": method.no_gate}
    return {name: value for name, value in keys.items() if value}


def _settings(settings: Mapping[str, Any]) -> str:
    """Returns settings as text for a table cell.

    Example:
      >>> _settings({"lora": {"dora": True, "init": "pissa"}})
      '`lora.dora = true`, `lora.init = "pissa"`'
    """
    texts = (
        f"`{name} = {json.dumps(value, ensure_ascii=False, default=str)}`"
        for name, value in dotted(settings)
    )
    return ", ".join(text.replace("|", "\\|") for text in texts)


def _learning_rates(protocol: Protocol, cell_results: Sequence[MethodResult]) -> str:
    seeds = ", ".join(map(str, protocol.tuning_seeds))
    chosen = f"Final validation {named(protocol.metric)}, mean over tuning seeds {seeds}; the chosen rate is bold."
    parts = [f"## Learning rates\n\n{chosen}"]
    for title, group in grouped(cell_results):
        rates = sorted({rate for result in group for rate in result.tuning.rates})
        rows = [
            [result.cell.method, *(_tuned(result, rate) for rate in rates), _edge(result)]
            for result in group
        ]
        parts.append(
            f"{title}\n\n" + markdown_table(["method", *(f"{rate:g}" for rate in rates), "at an end"], rows)
        )
    return "\n\n".join(parts)


def _tuned(result: MethodResult, rate: float) -> str:
    grid = dict(zip(result.tuning.rates, result.tuning.losses, strict=True))
    if grid.get(rate) is None:
        return "-" if rate in grid else ""
    text = "diverged" if grid[rate] == math.inf else number(grid[rate])
    return f"**{text}**" if rate == result.tuning.chosen else text


def _edge(result: MethodResult) -> str:
    return "yes" if result.tuning.at_edge else ""


def _tests(protocol: Protocol, cell_results: Sequence[MethodResult]) -> str:
    title = "At each method's chosen rate; mean and standard deviation over the test seeds."
    parts = [f"## Test\n\n{title}{_scored(protocol)}"]
    header = ["method", "rate", "parameters", "seeds", "diverged", named(protocol.metric), "deviation"]
    for heading, group in grouped(cell_results):
        names = [n for n in others_of(protocol.metric) if any(result.measured(n) for result in group)]
        rows = [_test_row(result, names) for result in group if result.tests]
        columns = [*(name.replace("_", " ") for name in names), *_MOVEMENT.values(), "seconds a run"]
        if rows:
            parts.append(f"{heading}\n\n" + markdown_table([*header, *columns], rows))
    if len(parts) == 1:
        return ""
    return "\n\n".join(parts)


def _scored(protocol: Protocol) -> str:
    """Returns a note on tasks whose accuracy is measured on some of the items only."""
    some = [
        f"{task.accuracy_items:,} ({name})" for name, task in protocol.tasks.items() if task.accuracy_items
    ]
    if not some:
        return ""
    return f" Accuracy: of {', '.join(some)} of the items."


def _test_row(result: MethodResult, names: Sequence[str]) -> list[str]:
    losses, finite = result.losses(), list(result.finite().values())
    movement = [
        mean_of([v for record in finite if (v := last(record, name)) is not None]) for name in _MOVEMENT
    ]
    return [
        result.cell.method,
        f"{result.tuning.chosen:g}",
        f"{next(iter(result.tests.values()))['parameters']:,}",
        str(len(losses)),
        str(result.diverged()),
        number(mean_of(losses)),
        number(deviation(losses)),
        *(number(mean_of(result.measured(name)), 4 if name == "loss" else 3) for name in names),
        *(number(value) for value in movement),
        number(mean_of([float(record["seconds"]) for record in result.tests.values()]), 0),
    ]


# ---------------------------------------------------------------- differences between methods

_SKEWED = 1  # absolute sample skewness of the differences above which the report warns
_BRIEF = ["method", "against", "task", "seeds", "difference", "95% interval", "better", "t p (Holm)"]


def common_rate_tables(protocol: Protocol, cell_results: Sequence[MethodResult]) -> str:
    """Returns the differences from the baseline at each learning rate that both were tuned at."""
    baselines = {r.cell: r for r in cell_results if r.cell.method == protocol.baseline}
    parts = []
    for title, group in grouped(cell_results):
        baseline = baselines[group[0].cell._replace(method=protocol.baseline)]
        by_method = {r.cell.method: common_rates(r, baseline) for r in group if r is not baseline}
        rates = sorted({rate for common in by_method.values() for rate in common})
        if not rates:
            continue
        header = [f"**{rate:g}**" if rate == baseline.tuning.chosen else f"{rate:g}" for rate in rates]
        rows = [
            [method, *(_common(common.get(rate)) for rate in rates)] for method, common in by_method.items()
        ]
        parts.append(f"{title}\n\n" + markdown_table(["method", *header], rows))
    if not parts:
        return ""
    text = (
        "## Differences at each common rate\n\n"
        f"Validation {named(protocol.metric)} of a method minus that of `{protocol.baseline}` at the "
        f"same learning rate, over tuning seeds {', '.join(map(str, protocol.tuning_seeds))}; the "
        "baseline's best rate is bold. In brackets: the feature movement of the method's gates over "
        "that of the baseline's. A method that moves them farther trains at a higher effective rate, "
        "which by itself lowers the loss below the best rate and raises it above."
    )
    return "\n\n".join([text, *parts])


def _common(common: CommonRate | None) -> str:
    if common is None:
        return ""
    text = signed(common.difference)
    if common.movement is not None:
        text += f" ({common.movement:.2f} x)"
    return text


def primary_table(protocol: Protocol, compared: Sequence[MethodComparison]) -> str:
    """Returns the comparisons by the primary metric with all statistics, and their explanation."""
    primary = [comparison for comparison in compared if comparison.measure.kind == "primary"]
    if not primary:
        return ""
    header = [*_BRIEF, "Wilcoxon p (Holm)", "sign p", "effect", "equivalent", "deviation", "seeds needed"]
    rows = [_primary_row(protocol, comparison) for comparison in primary]
    title = f"## Paired differences of the test {named(protocol.metric)}"
    parts = [title, _explained(protocol, compared), markdown_table([*header, "margin (of the gain)"], rows)]
    return "\n\n".join([*parts, *_skewed(primary)])


def _skewed(primary: Sequence[MethodComparison]) -> list[str]:
    """Returns a warning that names the comparisons with skewed differences; [] without any."""
    names = [
        f"`{c.cell.method}` - `{c.other}` on {c.cell.task} ({c.paired.skewness:+.1f})"
        for c in primary
        if abs(c.paired.skewness) > _SKEWED
    ]
    if not names:
        return []
    return [
        "**Skewed differences.** Intervals, t tests and equivalence tests assume differences without strong "
        f"skewness. The sample skewness is above {_SKEWED} here, so they may be wrong too often: {', '.join(names)}."
    ]


def _explained(protocol: Protocol, compared: Sequence[MethodComparison]) -> str:
    baseline = next((c.family for c in compared if c.other == protocol.baseline), 0)
    placebo = next((c.family for c in compared if c.other != protocol.baseline), 0)
    families = f"the {baseline} comparisons with `{protocol.baseline}` in this and the following tables"
    if placebo:
        families += f", or the {placebo} with placebos"
    margin = f"{protocol.margin_share:.0%} of the training gain"
    if protocol.margin:
        margin = f"{protocol.margin:g}"
    return (
        "This is the study's primary metric. Interval and t p: Student's t over seeds. Wilcoxon "
        f"and sign test: exact, two-sided. Holm: corrected over {families}. Better: seeds on which "
        "the method has the lower value. Equivalent: two one-sided t tests at 5% reject a "
        f"difference of the margin, {margin}, or more. The training gain is the fall of the validation "
        f"{named(protocol.metric)} in the tuning runs of `{protocol.baseline}` at its chosen rate. Effect: mean over "
        "deviation. Seeds needed: pairs that detect the margin with a power of 80%."
    )


def _primary_row(protocol: Protocol, comparison: MethodComparison) -> list[str]:
    p = comparison.paired
    return [
        *_brief_row(comparison, several_models=len(protocol.models) > 1),
        p_value(p.wilcoxon_p, comparison.wilcoxon_holm),
        number(p.sign_p, 3),
        number(p.effect, 2),
        "yes" if p.equivalent else "no",
        number(p.deviation),
        "-" if p.n < 2 or not p.margin > 0 else str(p.seeds_needed or "over 10,000"),
        _margin(p.margin, comparison.gain),
    ]


def _margin(margin: float, gain: float) -> str:
    """Returns a margin and its share of the training gain."""
    if not margin > 0:
        return "-"
    if not gain > 0:
        return f"{margin:.3g} (no gain)"
    return f"{margin:.3g} ({margin / gain:.1%})"


def _brief_row(comparison: MethodComparison, *, several_models: bool) -> list[str]:
    p, cell = comparison.paired, comparison.cell
    task = task_name(cell, several_models=several_models)
    difference = [str(p.n), signed(p.mean), interval(p), f"{p.better}/{p.n}"]
    return [cell.method, comparison.other, task, *difference, p_value(p.t_p, comparison.t_holm)]


def _brief(protocol: Protocol, compared: Sequence[MethodComparison], kind: str, lead: str) -> str:
    """Returns the comparisons of one kind of measure with intervals; "" without any."""
    several = len(protocol.models) > 1
    rows = [
        [c.measure.label, *_brief_row(c, several_models=several)]
        for c in compared
        if c.measure.kind == kind
    ]
    if not rows:
        return ""
    return markdown_table([lead, *_BRIEF], rows)


def other_measures(protocol: Protocol, compared: Sequence[MethodComparison]) -> str:
    """Returns the comparisons by the secondary measures of the test items."""
    rows = _brief(protocol, compared, "other", "measure")
    if rows:
        return f"## Paired differences of secondary measures\n\n{rows}"
    return ""


def multiples(
    protocol: Protocol, cell_results: Sequence[MethodResult], compared: Sequence[MethodComparison]
) -> str:
    """Returns the test costs at multiples of the chosen rates, and their differences."""
    factors = sorted(protocol.test_multiples)
    if len(factors) < 2:
        return ""
    title = f"Mean test {named(protocol.metric)} at multiples of the chosen rate (runs that diverged)."
    parts = [f"## Above the chosen rate\n\n{title}"]
    for heading, group in grouped(cell_results):
        rows = [
            [
                result.cell.method,
                *(f"{number(mean_of(result.losses(m)))} ({result.diverged(m)})" for m in factors),
            ]
            for result in group
            if result.tests
        ]
        parts.append(f"{heading}\n\n" + markdown_table(["method", *(f"x {m:g}" for m in factors)], rows))
    if differences := _brief(protocol, compared, "multiple", "rate"):
        parts.append(f"Paired differences of the test {named(protocol.metric)} there:\n\n{differences}")
    return "\n\n".join(parts)


def probes(
    protocol: Protocol, cell_results: Sequence[MethodResult], compared: Sequence[MethodComparison]
) -> str:
    """Returns the changes of the loss on other data, and their differences."""
    names = list(protocol.probes)
    if not names:
        return ""
    parts = ["## Other data\n\nLoss on data that was not trained on: before training, and the mean change."]
    for heading, group in grouped(cell_results):
        finite = [(result.cell.method, list(result.finite().values())) for result in group]
        rows = [
            [method, *(_probe(records, name) for name in names)] for method, records in finite if records
        ]
        parts.append(f"{heading}\n\n" + markdown_table(["method", *names], rows))
    if differences := _brief(protocol, compared, "probe", "data"):
        parts.append(f"Paired differences of these changes:\n\n{differences}")
    return "\n\n".join(parts)


def _probe(records: Sequence[Record], name: str) -> str:
    before = float(records[0]["probes"][name]["before"])
    return f"{number(before)} {signed(mean_of([forgotten(name, record) for record in records]))}"


# ---------------------------------------------------------------- cells


def signed(value: float) -> str:
    """Returns a difference with its sign.

    Example:
      >>> signed(-0.00001), signed(0.0044)
      ('-0.0000', '+0.0044')
    """
    return f"{value + 0.0:+.4f}"


def interval(statistics: Paired) -> str:
    """Returns the interval of a mean difference, or a dash for a single pair."""
    if statistics.n > 1:
        return f"{signed(statistics.low)} to {signed(statistics.high)}"
    return "-"


def p_value(p: float, corrected: float) -> str:
    """Returns a p-value, with its corrected value in brackets.

    Example:
      >>> p_value(0.0313, 0.5625), p_value(0.00002, 0.0004)
      ('0.031 (0.562)', '<0.001 (<0.001)')
    """
    if math.isfinite(p):
        return f"{_p(p)} ({_p(corrected)})"
    return "-"


def _p(value: float) -> str:
    if value < 0.001:
        return "<0.001"
    return f"{value:.3f}"


def task_name(cell: Cell, *, several_models: bool) -> str:
    """Returns the task's name, with the model's if the study has several."""
    if several_models:
        return f"{cell.task} ({cell.model})"
    return cell.task


def grouped(cell_results: Sequence[MethodResult]) -> list[tuple[str, list[MethodResult]]]:
    """Returns the results by model and task, each with its heading."""
    groups: dict[str, list[MethodResult]] = {}
    for result in cell_results:
        groups.setdefault(f"### {result.cell.task}, {result.cell.model}", []).append(result)
    return list(groups.items())


# ---------------------------------------------------------------- progress, as text


def status(protocol: Protocol) -> str:
    """Returns the numbers of runs, the time spent and estimated, and the chosen learning rates.

    Raises:
      NaloraError: records or protocol were changed (`checked_records`).
    """
    store = Records(protocol.folder)
    records = checked_records(protocol, store)
    runs = wanted(protocol, records)
    left = [run for run in runs if run.id not in records]
    busy = [run for run in left if store.claimed(run.id)]
    untuned = [cell for cell in cells(protocol) if tuning(protocol, cell, records).chosen is None]
    later = len(untuned) * len(protocol.test_seeds) * len(protocol.test_multiples)
    spent = hours(records)
    lines = [
        f"{protocol.path}: {protocol.question}",
        f"runs: {len(runs) - len(left)} done, {len(busy)} in progress, {len(left) - len(busy)} to do"
        + (f", and {later} tests once their learning rates are chosen" if later else ""),
        f"time: {spent:.1f} h spent"
        + (f" of {protocol.budget_hours:g} h" if protocol.budget_hours else "")
        + (f", about {(len(left) + later) * spent / len(records):.1f} h left" if records else ""),
    ]
    if protocol.metric != "loss":
        lines.append(f"{named(protocol.metric)} on the validation items:")
    lines += [_cell(cell, protocol, records) for cell in cells(protocol)]
    foreign = records.keys() - {run.id for run in runs}
    if foreign:
        lines.append(f"{len(foreign)} records belong to no run of this protocol")
    return "\n".join(lines)


def _cell(cell: Cell, protocol: Protocol, records: dict[str, Record]) -> str:
    grid = tuning(protocol, cell, records)
    losses = ", ".join(
        f"{rate:g}: {'-' if loss is None else f'{loss:.4f}'}"
        for rate, loss in zip(grid.rates, grid.losses, strict=True)
    )
    chosen = f"; chosen {grid.chosen:g}" if grid.chosen else ""
    return f"  {' '.join(cell)}: {losses}{chosen}{' (at an end of the grid)' if grid.at_edge else ''}"
