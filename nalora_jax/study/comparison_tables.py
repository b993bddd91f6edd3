"""Tables of differences between methods, for a study's report."""

from __future__ import annotations

from collections.abc import Sequence

from nalora_jax.study.analysis import (
    CommonRate,
    MethodComparison,
    MethodResult,
    common_rates,
    forgotten,
    mean,
    named,
)
from nalora_jax.study.markdown import grouped, interval, number, p_value, signed, table, task_of
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import Record

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
        parts.append(f"{title}\n\n" + table(["method", *header], rows))
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
    parts = [title, _explained(protocol, compared), table([*header, "margin (of the gain)"], rows)]
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
    task = task_of(cell, several_models=several_models)
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
    return table([lead, *_BRIEF], rows)


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
                *(f"{number(mean(result.losses(m)))} ({result.diverged(m)})" for m in factors),
            ]
            for result in group
            if result.tests
        ]
        parts.append(f"{heading}\n\n" + table(["method", *(f"x {m:g}" for m in factors)], rows))
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
        parts.append(f"{heading}\n\n" + table(["method", *names], rows))
    if differences := _brief(protocol, compared, "probe", "data"):
        parts.append(f"Paired differences of these changes:\n\n{differences}")
    return "\n\n".join(parts)


def _probe(records: Sequence[Record], name: str) -> str:
    before = float(records[0]["probes"][name]["before"])
    return f"{number(before)} {signed(mean([forgotten(name, record) for record in records]))}"
