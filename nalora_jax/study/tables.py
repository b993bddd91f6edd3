"""The tables of a study's report, as Markdown; equal records give equal bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from nalora_jax.study.analysis import (
    MethodComparison,
    MethodResult,
    comparisons,
    deviation,
    last,
    mean,
    results,
    tested,
)
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import Record

_WAYS = ("image_to_text", "text_to_image")
# Of the test items, beside their number.
_MEASURES = ("loss", "accuracy", "recall", *(f"{way}_recall_{k}" for way in _WAYS for k in (1, 5)))
# Of the last log step of a run.
_MOVEMENT = {
    "misalignment": "misalignment",
    "misalignment_limit": "its limit",
    "mean_feature": "feature movement",
}


def render(protocol: Protocol, records: Mapping[str, Record]) -> str:
    """All tables, as one Markdown document."""
    found = results(protocol, records)
    parts = [
        f"# Results: {protocol.question}",
        f"Made by `nalora study report` from `records.jsonl` alone. Losses are nats {_unit(protocol)}; differences are "
        "method minus the other, so below 0 is better.",
        _runs(protocol, records),
        _methods(protocol),
        _learning_rates(protocol, found),
        _tests(protocol, found),
        _comparisons(protocol, comparisons(protocol, found)),
        _other_measures(protocol, found),
        _multiples(protocol, found),
        _probes(protocol, found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def named(metric: str) -> str:
    """What is compared, in words."""
    return metric if metric == "loss" else f"1 - {metric.replace('_', ' ')}"


def _unit(protocol: Protocol) -> str:
    """Of the losses of all tasks."""
    units = {
        "": "per answer token",
        "classify": "per image among the prompts of all classes",
        "contrast": "per image or caption among all held-out pairs (the mean of both ways)",
    }
    runs = [protocol.config(protocol.models[0], task, protocol.baseline, 1.0, 0) for task in protocol.tasks]
    return "; ".join(dict.fromkeys(units[one.vision.task] for one in runs))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column to the left, the others to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 4) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value + 0.0:.{digits}f}"


def _runs(protocol: Protocol, records: Mapping[str, Record]) -> str:
    hours = sum(float(record["seconds"]) for record in records.values()) / 3600
    budget = f" of {protocol.budget_hours:g}" if protocol.budget_hours else ""
    per_stage = {stage: sum(one["stage"] == stage for one in records.values()) for stage in ("tune", "test")}
    rows = [
        ["runs", f"{per_stage['tune']} to tune, {per_stage['test']} to test"],
        ["hours", f"{hours:.1f}{budget}"],
        ["protocol", f"sha256 {protocol.digest[:16]}"],
        ["protocol committed in", _distinct(records, "commit", 12) or "not yet tested, or not in a repository"],
        ["records made under protocol", _distinct(records, "protocol", 16)],
        ["code (sha256 of the package)", _distinct(records, "code", 12)],
        ["devices", _distinct(records, "device")],
    ]
    return "## Runs\n\n" + table(["", ""], rows)


def _distinct(records: Mapping[str, Record], name: str, length: int = 200) -> str:
    return ", ".join(sorted({str(one[name])[:length] for one in records.values() if one.get(name)}))


def _methods(protocol: Protocol) -> str:
    rows = [
        [name, method.about or "-", f"`{method.placebo_of}`" if method.placebo_of else "-"]
        for name, method in protocol.methods.items()
    ]
    return "## Methods\n\n" + table(["method", "what it is", "placebo of"], rows)


def _learning_rates(protocol: Protocol, found: Sequence[MethodResult]) -> str:
    seeds = ", ".join(map(str, protocol.tuning_seeds))
    chosen = f"Final validation {named(protocol.metric)}, mean over tuning seeds {seeds}; the chosen rate is bold."
    parts = [f"## Learning rates\n\n{chosen}"]
    for title, group in _groups(found):
        rates = sorted({rate for result in group for rate in result.tuning.rates})
        rows = [[_named(result), *(_tuned(result, rate) for rate in rates), _edge(result)] for result in group]
        parts.append(f"{title}\n\n" + table(["method", *(f"{rate:g}" for rate in rates), "at an end"], rows))
    return "\n\n".join(parts)


def _tuned(result: MethodResult, rate: float) -> str:
    grid = dict(zip(result.tuning.rates, result.tuning.losses, strict=True))
    if grid.get(rate) is None:
        return "-" if rate in grid else ""
    text = "diverged" if grid[rate] == math.inf else number(grid[rate])
    return f"**{text}**" if rate == result.tuning.chosen else text


def _edge(result: MethodResult) -> str:
    return "yes" if result.tuning.at_edge else ""


def _tests(protocol: Protocol, found: Sequence[MethodResult]) -> str:
    parts = [
        f"## Test\n\nAt each method's chosen rate; mean and standard deviation over the test seeds.{_scored(protocol)}"
    ]
    header = ["method", "rate", "parameters", "seeds", "diverged", named(protocol.metric), "deviation"]
    for title, group in _groups(found):
        names = _other_names(protocol, group)
        rows = [_test_row(result, names) for result in group if result.tests]
        columns = [*(name.replace("_", " ") for name in names), *_MOVEMENT.values(), "seconds a run"]
        parts += [f"{title}\n\n" + table([*header, *columns], rows)] if rows else []
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _scored(protocol: Protocol) -> str:
    """Of tasks whose accuracy is that of some of the items only."""
    some = [f"{task.accuracy_items:,} ({name})" for name, task in protocol.tasks.items() if task.accuracy_items]
    return f" Accuracy: of {', '.join(some)} of the items." if some else ""


def _other_names(protocol: Protocol, group: Sequence[MethodResult]) -> list[str]:
    """Measures of the test items beside the one that the columns before show already."""
    return [name for name in _MEASURES if name != protocol.metric and any(one.measured(name) for one in group)]


def _test_row(result: MethodResult, names: Sequence[str]) -> list[str]:
    losses, held = result.losses(), list(result.held().values())
    movement = [mean([v for one in held if (v := last(one, name)) is not None]) for name in _MOVEMENT]
    return [
        _named(result),
        f"{result.tuning.chosen:g}",
        f"{next(iter(result.tests.values()))['parameters']:,}",
        str(len(losses)),
        str(result.diverged()),
        number(mean(losses)),
        number(deviation(losses)),
        *(number(mean(result.measured(name)), 4 if name == "loss" else 3) for name in names),
        *(number(value) for value in movement),
        number(mean([float(one["seconds"]) for one in result.tests.values()]), 0),
    ]


def _comparisons(protocol: Protocol, made: Sequence[MethodComparison]) -> str:
    if not made:
        return ""
    text = (
        f"## Paired differences of the test {named(protocol.metric)}\n\n"
        "Interval: 95% percentile bootstrap over seeds (few seeds make it too narrow). Better: seeds on which the "
        "method has the lower value. Sign test and Wilcoxon: exact, two-sided; Holm: Wilcoxon over tasks and models. "
        f"Level: two one-sided t tests at 5% reject a difference of {protocol.margin:g} or more. Effect: mean over "
        f"deviation. Seeds: pairs to see {protocol.margin:g} with a power of 80%."
    )
    header = ["method", "against", "task", "seeds", "difference", "interval", "better", "sign p", "Wilcoxon p"]
    header += ["Holm p", "effect", f"level within {protocol.margin:g}", "deviation", "seeds needed"]
    several = len(protocol.models) > 1
    rows = []
    for one in made:
        p, cell = one.paired, one.cell
        task = f"{cell.task} ({cell.model})" if several else cell.task
        rows.append(
            [
                *(cell.method, one.other, task, str(p.n), f"{p.mean + 0.0:+.4f}", f"{p.low:+.4f} to {p.high:+.4f}"),
                *(f"{p.better}/{p.n}", number(p.sign_p, 3), number(p.wilcoxon_p, 3), number(one.adjusted_p, 3)),
                *(number(p.effect, 2), "yes" if p.equivalent else "no", number(p.deviation)),
                "-" if p.n < 2 else str(p.seeds_needed or "over 10,000"),
            ]
        )
    return f"{text}\n\n" + table(header, rows)


def _other_measures(protocol: Protocol, found: Sequence[MethodResult]) -> str:
    """Differences of what was measured besides, without tests: there are too many to read anything into one."""
    names = _other_names(protocol, found)
    made = {named(name): comparisons(protocol, found, tested(name)) for name in names}
    return f"## Paired differences of other measures\n\n{_brief('measure', made)}" if any(made.values()) else ""


def _brief(lead: str, made: Mapping[str, Sequence[MethodComparison]]) -> str:
    """Comparisons by what the column ``lead`` says, without tests."""
    each = [(what, one.cell, one.other, one.paired) for what, several in made.items() for one in several]
    models = {cell.model for _, cell, _, _ in each}
    rows = []
    for what, cell, other, p in each:
        task = f"{cell.task} ({cell.model})" if len(models) > 1 else cell.task
        cells = [what, cell.method, other, task, str(p.n), f"{p.mean + 0.0:+.4f}"]
        rows.append([*cells, f"{p.low:+.4f} to {p.high:+.4f}", f"{p.better}/{p.n}"])
    return table([lead, "method", "against", "task", "seeds", "difference", "interval", "better"], rows)


def _multiples(protocol: Protocol, found: Sequence[MethodResult]) -> str:
    multiples = sorted(protocol.test_multiples)
    if len(multiples) < 2:
        return ""
    what = f"Mean test {named(protocol.metric)} at multiples of the chosen rate (runs that diverged)."
    parts = [f"## Above the chosen rate\n\n{what}"]
    for title, group in _groups(found):
        rows = [
            [_named(one), *(f"{number(mean(one.losses(m)))} ({one.diverged(m)})" for m in multiples)]
            for one in group
            if one.tests
        ]
        parts.append(f"{title}\n\n" + table(["method", *(f"x {m:g}" for m in multiples)], rows))
    made = {f"x {m:g}": comparisons(protocol, found, multiple=m) for m in multiples if m != 1}
    if any(made.values()):
        parts.append(f"Paired differences of the test {named(protocol.metric)} there:\n\n{_brief('rate', made)}")
    return "\n\n".join(parts)


def _probes(protocol: Protocol, found: Sequence[MethodResult]) -> str:
    names = list(protocol.probes)
    if not names:
        return ""
    parts = ["## Other data\n\nLoss on data that was not trained on: before, and the mean change by training."]
    for title, group in _groups(found):
        rows = []
        for result in group:
            held = list(result.held().values())
            rows += [[_named(result), *(_probe(held, name) for name in names)]] if held else []
        parts.append(f"{title}\n\n" + table(["method", *names], rows))
    made = {name: comparisons(protocol, found, partial(_forgotten, name)) for name in names}
    if any(made.values()):
        parts.append(f"Paired differences of these changes:\n\n{_brief('data', made)}")
    return "\n\n".join(parts)


def _forgotten(name: str, record: Record) -> float:
    """How much worse training made the loss on other data."""
    probe = record["probes"][name]
    return float(probe["loss"]) - float(probe["before"])


def _probe(held: Sequence[Record], name: str) -> str:
    change = mean([_forgotten(name, one) for one in held])
    return f"{number(float(held[0]['probes'][name]['before']))} {change + 0.0:+.4f}"


def _groups(found: Sequence[MethodResult]) -> list[tuple[str, list[MethodResult]]]:
    """Results by model and task, each with its heading."""
    groups: dict[str, list[MethodResult]] = {}
    for result in found:
        groups.setdefault(f"### {result.cell.task}, {result.cell.model}", []).append(result)
    return list(groups.items())


def _named(result: MethodResult) -> str:
    return result.cell.method
