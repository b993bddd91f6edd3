"""Tables of a study's report, as Markdown; equal records give equal bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nalora_jax.config.structured import dotted
from nalora_jax.study import comparison_tables
from nalora_jax.study.analysis import MethodResult, comparisons, deviation, last, mean, named, results
from nalora_jax.study.identity import old_records
from nalora_jax.study.markdown import grouped, number, table
from nalora_jax.study.plan import MEASURES, wanted
from nalora_jax.study.protocol import Method, Protocol
from nalora_jax.study.records import Record

# Columns of a run's last log step.
_MOVEMENT = {
    "misalignment": "misalignment",
    "misalignment_limit": "its limit",
    "mean_feature": "feature movement",
}


def render(protocol: Protocol, records: Mapping[str, Record]) -> str:
    """Returns all tables as one Markdown document."""
    cell_results = results(protocol, records)
    compared = comparisons(protocol, cell_results)
    parts = [
        f"# Results: {protocol.question}",
        "Written by `nalora study report` from `records.jsonl` and `protocol.toml`. Losses are "
        f"nats {_unit(protocol)}; differences are method minus the other, so below 0 is better.",
        _runs(protocol, records),
        _methods(protocol),
        _learning_rates(protocol, cell_results),
        comparison_tables.common_rate_tables(protocol, cell_results),
        _tests(protocol, cell_results),
        comparison_tables.primary_table(protocol, compared),
        comparison_tables.other_measures(protocol, compared),
        comparison_tables.multiples(protocol, cell_results, compared),
        comparison_tables.probes(protocol, cell_results, compared),
    ]
    return "\n\n".join(section for section in parts if section) + "\n"


def _unit(protocol: Protocol) -> str:
    units = {
        "": "per answer token" if not protocol.preference else "per pair",
        "classify": "per image among the prompts of all classes",
        "contrast": "per image or caption among all held-out pairs (the mean of both ways)",
    }
    model, baseline = protocol.models[0], protocol.baseline
    runs = [protocol.config(model, task, baseline, 1.0, 0) for task in protocol.tasks]
    return "; ".join(dict.fromkeys(units[config.vision.task] for config in runs))


def _runs(protocol: Protocol, records: Mapping[str, Record]) -> str:
    hours = sum(float(record["seconds"]) for record in records.values()) / 3600
    budget = f" of {protocol.budget_hours:g}" if protocol.budget_hours else ""
    tests = [record for record in records.values() if record["stage"] == "test"]
    rows = [
        ["runs", f"{len(records) - len(tests)} to tune, {len(tests)} to test"],
        ["tests not done", _not_done(protocol, records)],
        ["hours", f"{hours:.1f}{budget}"],
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
    return "## Runs\n\n" + table(["", ""], [row for row in rows if row[1]])


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
    return "## Methods\n\n" + table(["method", "description", "settings", "placebo of"], rows)


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
            f"{title}\n\n" + table(["method", *(f"{rate:g}" for rate in rates), "at an end"], rows)
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
        names = [
            n for n in MEASURES if n != protocol.metric and any(result.measured(n) for result in group)
        ]
        rows = [_test_row(result, names) for result in group if result.tests]
        columns = [*(name.replace("_", " ") for name in names), *_MOVEMENT.values(), "seconds a run"]
        if rows:
            parts.append(f"{heading}\n\n" + table([*header, *columns], rows))
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
        mean([v for record in finite if (v := last(record, name)) is not None]) for name in _MOVEMENT
    ]
    return [
        result.cell.method,
        f"{result.tuning.chosen:g}",
        f"{next(iter(result.tests.values()))['parameters']:,}",
        str(len(losses)),
        str(result.diverged()),
        number(mean(losses)),
        number(deviation(losses)),
        *(number(mean(result.measured(name)), 4 if name == "loss" else 3) for name in names),
        *(number(value) for value in movement),
        number(mean([float(record["seconds"]) for record in result.tests.values()]), 0),
    ]
