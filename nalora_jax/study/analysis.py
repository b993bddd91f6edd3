"""What the records of a study say, before anybody formats it: cells, their tests, and the comparisons between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nalora_jax.errors import NaloraError
from nalora_jax.study.plan import Cell, Tuning, cells, cost, test_runs, tuning, tuning_runs
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

    def held(self, multiple: float = 1.0) -> dict[int, Record]:
        """Tests that did not diverge, by seed."""
        return {s: one for (s, m), one in self.tests.items() if m == multiple and not one["diverged"]}

    def losses(self, multiple: float = 1.0) -> list[float]:
        """Test costs (`nalora_jax.study.plan.cost`) of those, in the order of their seeds."""
        return [cost(self.metric, one["test"]) for one in self.held(multiple).values()]

    def measured(self, name: str) -> list[float]:
        """One measure of the test items at the chosen rate, in the order of the seeds; [] where there is none."""
        return [float(one["test"][name]) for one in self.held().values() if one["test"].get(name) is not None]

    def diverged(self, multiple: float = 1.0) -> int:
        """Tests that did."""
        return sum(m == multiple and bool(one["diverged"]) for (_, m), one in self.tests.items())


@dataclass(frozen=True)
class MethodComparison:
    """One method against another on one task."""

    cell: Cell
    other: str
    paired: Paired
    adjusted_p: float  # of the signed-rank test, by Holm over the tasks and models of this pair of methods


def results(protocol: Protocol, records: Mapping[str, Record]) -> list[MethodResult]:
    """Every cell of the study, in the order of the file."""
    found = []
    for cell in cells(protocol):
        grid = tuning(protocol, cell, records)
        tuned = [records[run.id] for run in tuning_runs(protocol, cell, grid.rates) if run.id in records]
        runs = test_runs(protocol, cell, grid.chosen) if grid.chosen else []
        tests = {(run.seed, run.multiple): records[run.id] for run in runs if run.id in records}
        found.append(MethodResult(cell, grid, tuple(tuned), tests, protocol.metric))
    return found


Value = Callable[[Record], float | None]


def tested(metric: str) -> Value:
    """The cost (`nalora_jax.study.plan.cost`) of a measure of the test items; None where it was not taken."""
    return lambda record: cost(metric, record["test"]) if metric in record["test"] else None


def comparisons(
    protocol: Protocol, found: Sequence[MethodResult], value: Value | None = None, *, multiple: float = 1.0
) -> list[MethodComparison]:
    """Every method against the baseline, then every method against its placebos; only seeds that both finished.

    Args:
      protocol, found: of the study.
      value: what is compared, of a record; small is good. By default the protocol's metric of the test items.
      multiple: of the chosen rates.
    """
    value = value or tested(protocol.metric)
    others = [(name, protocol.baseline) for name in protocol.methods if name != protocol.baseline]
    others += [(method.placebo_of, name) for name, method in protocol.methods.items() if method.placebo_of]
    by_cell = {result.cell: result for result in found}
    made: list[MethodComparison] = []
    for method, other in dict.fromkeys(others):
        raw = []
        for model in protocol.models:
            for task in protocol.tasks:
                cell = Cell(model, task, method)
                sides = (by_cell[cell].held(multiple), by_cell[Cell(model, task, other)].held(multiple))
                one = _paired(*sides, protocol.margin, value)
                raw += [] if one is None else [(cell, one)]
        adjusted = holm([one.wilcoxon_p for _, one in raw])
        made += [MethodComparison(cell, other, one, p) for (cell, one), p in zip(raw, adjusted, strict=True)]
    return made


def _paired(mine: Mapping[int, Record], theirs: Mapping[int, Record], margin: float, value: Value) -> Paired | None:
    pairs = [(record, theirs[seed]) for seed, record in mine.items() if seed in theirs]
    values = [(value(one), value(other)) for one, other in pairs]
    both = [(first, second) for first, second in values if first is not None and second is not None]
    if not both:
        return None
    _require_pairs(pairs)
    return paired([first for first, _ in both], [second for _, second in both], margin)


def _require_pairs(pairs: Sequence[tuple[Record, Record]]) -> None:
    """The seeds are pairs only if data order and items agree, which the records say themselves."""
    for one, other in pairs:
        mine, theirs = ((record["data"], record["items"]["test"]) for record in (one, other))
        if mine != theirs:
            raise NaloraError(
                f"record {one['id']}, the pair of {other['id']}",
                expected=f"the data order and items of the other, {theirs}",
                found=mine,
                remedy="the data changed between the runs: begin a new study",
            )


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN of fewer than two."""
    if len(values) < 2:
        return math.nan
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def last(record: Record, name: str) -> float | None:
    """A number of the record's last log step."""
    rows = [row for row in record["training"] if row.get(name) is not None]
    return float(rows[-1][name]) if rows else None
