"""Results and comparisons of a study, computed from its records."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from nalora_jax.study.plan import (
    COSTS,
    Cell,
    Tuning,
    cells,
    cost,
    others_of,
    test_runs,
    tuning,
    tuning_runs,
)
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import Record
from nalora_jax.study.statistics import Paired, holm, paired


@dataclass(frozen=True)
class MethodResult:
    """A cell with its finished runs."""

    cell: Cell
    tuning: Tuning
    tuned: tuple[Record, ...]
    tests: Mapping[tuple[int, float], Record]  # by seed and multiple of the chosen rate
    metric: str = "loss"  # of the protocol

    def finite(self, multiple: float = 1.0) -> dict[int, Record]:
        """Returns the tests that did not diverge, by seed."""
        of_multiple = {
            seed: record for (seed, m), record in self.tests.items() if m == multiple
        }
        return {
            seed: record
            for seed, record in of_multiple.items()
            if not record["diverged"]
        }

    def losses(self, multiple: float = 1.0) -> list[float]:
        """Returns the test costs (`study.plan.cost`) of `finite`, in the order of the seeds."""
        return [
            cost(self.metric, record["test"])
            for record in self.finite(multiple).values()
        ]

    def measured(self, name: str) -> list[float]:
        """Returns a measure of the test items at the chosen rate by seed; [] if not measured."""
        records = self.finite().values()
        return [
            float(record["test"][name])
            for record in records
            if record["test"].get(name) is not None
        ]

    def diverged(self, multiple: float = 1.0) -> int:
        """Returns the number of tests that diverged."""
        return sum(
            m == multiple and bool(record["diverged"])
            for (_, m), record in self.tests.items()
        )

    def at_rate(self, rate: float) -> list[Record]:
        """Returns the finite tuning runs at ``rate``."""
        return [
            record
            for record in self.tuned
            if record["rate"] == rate and not record["diverged"]
        ]


@dataclass(frozen=True)
class Measure:
    """A quantity by which test runs are compared; small values are good."""

    # primary: the protocol's metric at the chosen rate. other: further measures of the test
    # items there. multiple: the metric at a multiple of the chosen rate. probe: the change of
    # the loss on other data.
    kind: Literal["primary", "other", "multiple", "probe"]
    label: str
    value: Callable[[Record], float | None]
    multiple: float = 1.0


@dataclass(frozen=True)
class MethodComparison:
    """A method compared with another on a task, by one measure."""

    cell: Cell
    other: str
    measure: Measure
    paired: Paired
    gain: float  # of the baseline by training (`training_gain`)
    # p-values by Holm over the study's `family` comparisons with the baseline or with controls.
    t_holm: float = math.nan
    wilcoxon_holm: float = math.nan
    family: int = 0


def results(protocol: Protocol, records: Mapping[str, Record]) -> list[MethodResult]:
    """Returns every cell of the study with its runs, in the order of the file."""
    cell_results = []
    for cell in cells(protocol):
        grid = tuning(protocol, cell, records)
        tuned = [
            run for run in tuning_runs(protocol, cell, grid.rates) if run.id in records
        ]
        tests = test_runs(protocol, cell, grid.chosen) if grid.chosen else []
        by_seed = {
            (run.seed, run.multiple): records[run.id]
            for run in tests
            if run.id in records
        }
        finished = tuple(records[run.id] for run in tuned)
        cell_results.append(
            MethodResult(cell, grid, finished, by_seed, protocol.metric)
        )
    return cell_results


def by_task(
    cell_results: Sequence[MethodResult],
) -> dict[tuple[str, str], list[MethodResult]]:
    """Returns the results by task and model."""
    groups: dict[tuple[str, str], list[MethodResult]] = {}
    for result in cell_results:
        groups.setdefault((result.cell.task, result.cell.model), []).append(result)
    return groups


def named(metric: str) -> str:
    """Returns the label of a metric's cost."""
    return metric if metric in COSTS else f"1 - {metric.replace('_', ' ')}"


def measures(protocol: Protocol, cell_results: Sequence[MethodResult]) -> list[Measure]:
    """Returns every measure by which the study compares methods, the primary one first."""
    metric = protocol.metric
    primary = Measure("primary", named(metric), partial(_test_cost, metric))
    other_names = [
        n
        for n in others_of(metric)
        if any(result.measured(n) for result in cell_results)
    ]
    multiples = [m for m in sorted(protocol.test_multiples) if m != 1]
    return [
        primary,
        *(
            Measure("other", named(name), partial(_test_cost, name))
            for name in other_names
        ),
        *(
            replace(primary, kind="multiple", label=f"x {m:g}", multiple=m)
            for m in multiples
        ),
        *(Measure("probe", name, partial(forgotten, name)) for name in protocol.probes),
    ]


def _test_cost(metric: str, record: Record) -> float | None:
    return cost(metric, record["test"]) if metric in record["test"] else None


def forgotten(probe: str, record: Record) -> float:
    """Returns the increase of the loss on other data by training."""
    measured = record["probes"][probe]
    return float(measured["loss"]) - float(measured["before"])


def comparisons(
    protocol: Protocol, cell_results: Sequence[MethodResult]
) -> list[MethodComparison]:
    """Compares methods with the baseline and with their permutation controls by every measure.

    Only seeds that both methods finished count. p-values are corrected over all comparisons with
    the baseline together (methods, tasks, models and measures), and over all comparisons with
    permutation controls (``placebo_of`` in the protocol) together.
    """
    baseline = protocol.baseline
    methods = protocol.methods
    with_baseline = [(name, baseline) for name in methods if name != baseline]
    placebos = [
        (method.placebo_of, name)
        for name, method in methods.items()
        if method.placebo_of
    ]
    with_placebo = [
        pair for pair in dict.fromkeys(placebos) if pair not in with_baseline
    ]
    by_cell = {r.cell: r for r in cell_results}
    all_measures = measures(protocol, cell_results)
    compared = []
    for pairs in (with_baseline, with_placebo):
        places = itertools.product(all_measures, pairs, protocol.models, protocol.tasks)
        family = (
            _compared(protocol, by_cell, measure, Cell(model, task, method), other)
            for measure, (method, other), model, task in places
        )
        found = [comparison for comparison in family if comparison is not None]
        by_t = holm([comparison.paired.t_p for comparison in found])
        by_rank = holm([comparison.paired.wilcoxon_p for comparison in found])
        compared += [
            replace(comparison, t_holm=t, wilcoxon_holm=rank, family=len(found))
            for comparison, t, rank in zip(found, by_t, by_rank, strict=True)
        ]
    return compared


def _compared(
    protocol: Protocol,
    by_cell: Mapping[Cell, MethodResult],
    measure: Measure,
    cell: Cell,
    other: str,
) -> MethodComparison | None:
    """Returns the comparison over the seeds that both methods finished; None without any."""
    gain = training_gain(by_cell[cell._replace(method=protocol.baseline)])
    sides = cell, cell._replace(method=other)
    records, reference = (by_cell[side].finite(measure.multiple) for side in sides)
    pairs = [
        (record, reference[seed])
        for seed, record in records.items()
        if seed in reference
    ]
    values = [(measure.value(record), measure.value(other)) for record, other in pairs]
    both = [
        (first, second)
        for first, second in values
        if first is not None and second is not None
    ]
    if not both:
        return None
    margin = protocol.margin or protocol.margin_share * gain
    statistics = paired(
        [first for first, _ in both], [second for _, second in both], margin
    )
    return MethodComparison(cell, other, measure, statistics, gain)


def training_gain(baseline: MethodResult) -> float:
    """Returns the fall of the validation cost by training at the chosen rate.

    Returns:
      The mean over the tuning runs, so that it is known before a test item is read; NaN without
      any.
    """
    if baseline.tuning.chosen is None:
        return math.nan
    metric = baseline.metric
    runs = baseline.at_rate(baseline.tuning.chosen)
    falls = [
        cost(metric, r["curve"][0]) - cost(metric, r["validation"])
        for r in runs
        if r["curve"]
    ]
    return mean_of(falls)


def common_rates(
    result: MethodResult, baseline: MethodResult
) -> dict[float, tuple[float, float | None]]:
    """Compares a method with the baseline at every learning rate that both finished tuning.

    Returns:
      By rate, the difference of the mean validation costs over the tuning seeds, and the gates'
      feature movement over the baseline's, which may be missing.
    """
    common = {}
    for rate, loss in result.tuning.costs.items():
        reference = baseline.tuning.costs.get(rate)
        if loss is None or reference is None or not math.isfinite(loss - reference):
            continue
        at_rate = (side.at_rate(rate) for side in (result, baseline))
        moved, of_baseline = (
            mean_of(last_of(records, "mean_feature")) for records in at_rate
        )
        ratio = moved / of_baseline if of_baseline else math.nan
        common[rate] = loss - reference, ratio if math.isfinite(ratio) else None
    return common


def mean_of(values: Sequence[float]) -> float:
    """Returns the mean; NaN without values."""
    return math.fsum(values) / len(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """Returns the sample standard deviation; NaN for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def last_of(records: Iterable[Record], name: str) -> list[float]:
    """Returns a number of each record's last log step that has it, without records that have
    none."""
    rows = (
        (row.get(name) for row in reversed(record["training"])) for record in records
    )
    values = (next((value for value in row if value is not None), None) for row in rows)
    return [float(value) for value in values if value is not None]
