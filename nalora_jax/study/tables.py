"""The tables of a study's report, as Markdown; equal records give equal bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from nalora_jax.study.analysis import MethodComparison, MethodResult, comparisons, deviation, last, mean, results
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import Record


def render(protocol: Protocol, records: Mapping[str, Record]) -> str:
    """All tables, as one Markdown document."""
    found = results(protocol, records)
    parts = [
        f"# Results: {protocol.question}",
        "Made by `nalora study report` from `records.jsonl` alone. Losses are nats per answer token; differences are "
        "method minus the other, so below 0 is better.",
        _runs(protocol, records),
        _methods(protocol),
        _learning_rates(protocol, found),
        _tests(protocol, found),
        _comparisons(protocol, comparisons(protocol, found)),
        _multiples(protocol, found),
        _probes(protocol, found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


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
    parts = [f"## Learning rates\n\nFinal validation loss, mean over tuning seeds {seeds}; the chosen rate is bold."]
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
    parts = ["## Test\n\nAt each method's chosen rate; mean and standard deviation over the test seeds."]
    header = ["method", "rate", "parameters", "seeds", "diverged", "loss", "deviation", "accuracy"]
    header += ["misalignment", "its limit", "feature movement", "seconds a run"]
    for title, group in _groups(found):
        rows = [_test_row(result) for result in group if result.tests]
        parts += [f"{title}\n\n" + table(header, rows)] if rows else []
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _test_row(result: MethodResult) -> list[str]:
    losses, held = result.losses(), list(result.held().values())
    accuracy = [float(one["test"]["accuracy"]) for one in held if one["test"].get("accuracy") is not None]
    names = ("misalignment", "misalignment_limit", "mean_feature")
    movement = [mean([v for one in held if (v := last(one, name)) is not None]) for name in names]
    return [
        _named(result),
        f"{result.tuning.chosen:g}",
        f"{next(iter(result.tests.values()))['parameters']:,}",
        str(len(losses)),
        str(result.diverged()),
        number(mean(losses)),
        number(deviation(losses)),
        number(mean(accuracy), 3),
        *(number(value) for value in movement),
        number(mean([float(one["seconds"]) for one in result.tests.values()]), 0),
    ]


def _comparisons(protocol: Protocol, made: Sequence[MethodComparison]) -> str:
    if not made:
        return ""
    text = (
        "## Paired differences of the test loss\n\n"
        "Interval: 95% percentile bootstrap over seeds (few seeds make it too narrow). Better: seeds on which the "
        "method has the lower loss. Sign test and Wilcoxon: exact, two-sided; Holm: Wilcoxon over tasks and models. "
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


def _multiples(protocol: Protocol, found: Sequence[MethodResult]) -> str:
    multiples = sorted(protocol.test_multiples)
    if len(multiples) < 2:
        return ""
    parts = ["## Above the chosen rate\n\nMean test loss at multiples of the chosen rate (runs that diverged)."]
    for title, group in _groups(found):
        rows = [
            [_named(one), *(f"{number(mean(one.losses(m)))} ({one.diverged(m)})" for m in multiples)]
            for one in group
            if one.tests
        ]
        parts.append(f"{title}\n\n" + table(["method", *(f"x {m:g}" for m in multiples)], rows))
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
    return "\n\n".join(parts)


def _probe(held: Sequence[Record], name: str) -> str:
    probes = [one["probes"][name] for one in held]
    change = [float(one["loss"]) - float(one["before"]) for one in probes]
    return f"{number(float(probes[0]['before']))} {mean(change) + 0.0:+.4f}"


def _groups(found: Sequence[MethodResult]) -> list[tuple[str, list[MethodResult]]]:
    """Results by model and task, each with its heading."""
    groups: dict[str, list[MethodResult]] = {}
    for result in found:
        groups.setdefault(f"### {result.cell.task}, {result.cell.model}", []).append(result)
    return list(groups.items())


def _named(result: MethodResult) -> str:
    return result.cell.method
