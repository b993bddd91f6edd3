"""Results and comparisons of a study, computed from its records."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from nalora_jax.study.hypothesis_tests import Paired, compare_pairs, holm
from nalora_jax.study.planned_runs import (
    COSTS,
    Cell,
    Tuning,
    cells,
    cost,
    others_of,
    test_runs,
    tuning_grid,
    tuning_runs,
)
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import StudyRecord


@dataclass(frozen=True)
class MethodResult:
    """A cell with its finished runs."""

    cell: Cell
    tuning: Tuning
    tuned: tuple[StudyRecord, ...]
    tests: Mapping[
        tuple[int, float], StudyRecord
    ]  # by seed and multiple of the chosen rate
    metric: str = "loss"  # of the protocol

    def finite(self, multiple: float = 1.0) -> dict[int, StudyRecord]:
        """Returns the tests at a multiple of the chosen rate that did not diverge, by seed."""
        finite = {}
        for (seed, of_record), record in self.tests.items():
            if of_record == multiple and not record["diverged"]:
                finite[seed] = record
        return finite

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
        """Returns the number of tests at a multiple of the chosen rate that diverged."""
        return sum(
            of_record == multiple and bool(record["diverged"])
            for (_, of_record), record in self.tests.items()
        )

    def at_rate(self, rate: float) -> list[StudyRecord]:
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
    value: Callable[[StudyRecord], float | None]
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


def results(
    protocol: Protocol, records: Mapping[str, StudyRecord]
) -> list[MethodResult]:
    """Returns every cell of the study with its runs, in the order of the file."""
    cell_results = []
    for cell in cells(protocol):
        grid = tuning_grid(protocol, cell, records)
        tuned = [
            records[run.id]
            for run in tuning_runs(protocol, cell, grid.rates)
            if run.id in records
        ]
        tests = {}
        if grid.chosen:
            for run in test_runs(protocol, cell, grid.chosen):
                if run.id in records:
                    tests[run.seed, run.multiple] = records[run.id]
        result = MethodResult(cell, grid, tuple(tuned), tests, protocol.metric)
        cell_results.append(result)
    return cell_results


def group_by_task(
    cell_results: Sequence[MethodResult],
) -> dict[tuple[str, str], list[MethodResult]]:
    """Returns the results by task and model."""
    groups: dict[tuple[str, str], list[MethodResult]] = {}
    for result in cell_results:
        place = (result.cell.task, result.cell.model)
        groups.setdefault(place, []).append(result)
    return groups


def cost_label(metric: str) -> str:
    """Returns the label of a metric's cost."""
    if metric in COSTS:
        return metric
    return f"1 - {metric.replace('_', ' ')}"


def other_measured(metric: str, cell_results: Sequence[MethodResult]) -> list[str]:
    """Returns the measures other than the metric that any of the results has."""
    measured = []
    for name in others_of(metric):
        if any(result.measured(name) for result in cell_results):
            measured.append(name)
    return measured


def measures(protocol: Protocol, cell_results: Sequence[MethodResult]) -> list[Measure]:
    """Returns every measure by which the study compares methods, the primary one first."""
    metric = protocol.metric
    primary = Measure("primary", cost_label(metric), partial(_test_cost, metric))
    all_measures = [primary]
    for name in other_measured(metric, cell_results):
        value = partial(_test_cost, name)
        all_measures.append(Measure("other", cost_label(name), value))
    for multiple in sorted(protocol.test_multiples):
        if multiple != 1:
            label = f"x {multiple:g}"
            at_multiple = replace(
                primary, kind="multiple", label=label, multiple=multiple
            )
            all_measures.append(at_multiple)
    for name in protocol.probes:
        all_measures.append(Measure("probe", name, partial(forgotten, name)))
    return all_measures


def _test_cost(metric: str, record: StudyRecord) -> float | None:
    """Returns the cost of a test by a measure; None if it was not measured."""
    if metric not in record["test"]:
        return None
    return cost(metric, record["test"])


def forgotten(probe: str, record: StudyRecord) -> float:
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
    with_placebo = []
    for name, method in methods.items():
        pair = (method.placebo_of, name)
        if method.placebo_of and pair not in with_baseline:
            with_placebo.append(pair)
    by_cell = {result.cell: result for result in cell_results}
    all_measures = measures(protocol, cell_results)
    compared = []
    for pairs in (with_baseline, with_placebo):
        family = []
        places = itertools.product(all_measures, pairs, protocol.models, protocol.tasks)
        for measure, (name, other), model, task in places:
            cell = Cell(model, task, name)
            comparison = _compare(protocol, by_cell, measure, cell, other)
            if comparison is not None:
                family.append(comparison)
        by_t = holm([comparison.paired.t_p for comparison in family])
        by_rank = holm([comparison.paired.wilcoxon_p for comparison in family])
        compared += [
            replace(comparison, t_holm=t, wilcoxon_holm=rank, family=len(family))
            for comparison, t, rank in zip(family, by_t, by_rank, strict=True)
        ]
    return compared


def _compare(
    protocol: Protocol,
    by_cell: Mapping[Cell, MethodResult],
    measure: Measure,
    cell: Cell,
    other: str,
) -> MethodComparison | None:
    """Returns the comparison of a method with another by one measure.

    Args:
      protocol: the study.
      by_cell: results of all cells.
      measure: by which they are compared.
      cell: of the method.
      other: name of the other method on the same task and model.

    Returns:
      The comparison over the seeds that both methods finished; None without any.
    """
    gain = training_gain(by_cell[cell._replace(method=protocol.baseline)])
    records = by_cell[cell].finite(measure.multiple)
    reference = by_cell[cell._replace(method=other)].finite(measure.multiple)
    values = []
    values_of_other = []
    for seed, record in records.items():
        if seed not in reference:
            continue
        value = measure.value(record)
        value_of_other = measure.value(reference[seed])
        if value is not None and value_of_other is not None:
            values.append(value)
            values_of_other.append(value_of_other)
    if not values:
        return None
    margin = protocol.margin or protocol.margin_share * gain
    statistics = compare_pairs(values, values_of_other, margin)
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
    falls = []
    for record in runs:
        if record["curve"]:  # the first point is of the base
            before = cost(metric, record["curve"][0])
            falls.append(before - cost(metric, record["validation"]))
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
        movement = mean_of(last_of(result.at_rate(rate), "mean_feature"))
        of_baseline = mean_of(last_of(baseline.at_rate(rate), "mean_feature"))
        ratio = None
        if of_baseline and math.isfinite(movement / of_baseline):
            ratio = movement / of_baseline
        common[rate] = (loss - reference, ratio)
    return common


def mean_of(values: Sequence[float]) -> float:
    """Returns the mean; NaN without values."""
    if not values:
        return math.nan
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Returns the sample standard deviation; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1))


def last_of(records: Iterable[StudyRecord], name: str) -> list[float]:
    """Returns the last logged value of a number in each record; records without it are left out."""
    values = []
    for record in records:
        for row in reversed(record["training"]):
            if row.get(name) is not None:
                values.append(float(row[name]))
                break
    return values
