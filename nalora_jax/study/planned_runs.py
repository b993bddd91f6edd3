"""The runs of a study: a pure function of protocol and records, so any process can take part.

For each model, task and method (a cell), the tuning seeds run a grid of learning rates. While the
best rate is at an end of the grid, the grid grows there. The test seeds then run the best rate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from nalora_jax.common.buckets import is_url
from nalora_jax.common.digests import json_digest
from nalora_jax.config import MeshConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.loading.initial_adapter import take_adapter_settings
from nalora_jax.study.locations import locate_settings
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import StudyRecord

Stage = Literal["tune", "test"]
# Measures of items in records.
MEASURES = (
    "loss",
    "accuracy",
    "recall",
    "image_to_text_recall_1",
    "image_to_text_recall_5",
    "text_to_image_recall_1",
    "text_to_image_recall_5",
    "reward",
    "pass_1",
    "pass_8",
    "divergence",
)
COSTS = ("loss", "divergence")  # measures of which less is better


def others_of(metric: str) -> list[str]:
    """Returns the names of all measures other than the metric."""
    excluded = {metric}
    if metric == "reward":
        excluded.add("loss")  # 1 minus the reward
    return [name for name in MEASURES if name not in excluded]


class Cell(NamedTuple):
    """A method on a task with a model; each cell has its learning rate."""

    model: str
    task: str
    method: str


@dataclass(frozen=True)
class Run:
    """A run of a study; runs with the same id are the same run."""

    protocol: Protocol
    stage: Stage
    cell: Cell
    rate: float
    seed: int
    multiple: float = 1.0  # of the cell's chosen rate, which ``rate`` includes
    # Devices that replace the protocol's choice; a run on other devices is the same run.
    mesh: MeshConfig | None = field(default=None, compare=False)

    @cached_property
    def config(self) -> RunConfig:
        """Returns the settings of the run, with paths relative to the current folder.

        If the run starts from an adapter, they include the adapter's settings.
        """
        settings = locate_settings(self._settings, self.protocol.folder)
        if settings.adapter:
            path = settings.adapter
            if not is_url(path):
                path = str(self.protocol.folder / path)
            settings = take_adapter_settings(
                replace(settings, adapter=path), named={"model"}
            )
        if self.mesh is None:
            return settings
        return replace(settings, mesh=self.mesh)

    @property
    def _settings(self) -> RunConfig:
        """Returns the settings of the run as the protocol gives them."""
        return self.protocol.config(*self.cell, self.rate, self.seed)

    @cached_property
    def config_hash(self) -> str:
        """Returns the digest of the settings and of the names of the measured items.

        Settings at their default are left out, so that records stay valid when settings are added.
        """
        settings = _changed_settings(self._settings, RunConfig())
        protocol = self.protocol
        task = self.protocol.tasks[self.cell.task]
        measured: dict[str, Any] = {"evaluate_every": protocol.evaluate_every}
        if self.stage == "test":
            probes = {name: asdict(probe) for name, probe in protocol.probes.items()}
            items = [task.test, task.test_items]
            if task.accuracy_items:
                items.append(task.accuracy_items)
            measured |= {"test": items, "probes": probes}
        reseed = protocol.methods[self.cell.method].reseed
        return _hash({"settings": settings, "measured": measured, "reseed": reseed})

    @cached_property
    def id(self) -> str:
        """Returns the name of the run in the records."""
        return _hash([self.stage, *self.cell, self.multiple, self.config_hash])

    def __str__(self) -> str:
        """Returns the run's stage, cell, rate and seed as text for messages."""
        place = f"{self.stage} {' '.join(self.cell)}"
        rate = f"rate {self.rate:g}"
        if self.multiple != 1:
            rate += f" ({self.multiple:g} x chosen)"
        return f"{place}, {rate}, seed {self.seed}"


@dataclass(frozen=True)
class Tuning:
    """The current grid of a cell."""

    # Mean final `cost` of the validation items by rate, ascending, including added rates: infinite
    # if a run diverged, None if one is missing.
    costs: Mapping[float, float | None]
    at_edge: bool = False  # the best rate is at an end of the grid, which cannot grow

    @property
    def rates(self) -> tuple[float, ...]:
        """Returns the learning rates."""
        return tuple(self.costs)

    @property
    def chosen(self) -> float | None:
        """Returns a complete grid's best rate, the lowest of ties; None if all rates diverged."""
        finite = {}
        for rate, loss in self.costs.items():
            if loss is None:
                return None
            if loss < math.inf:
                finite[rate] = loss
        if not finite:
            return None
        return min(finite, key=finite.__getitem__)


def tuning_grid(
    protocol: Protocol, cell: Cell, records: Mapping[str, StudyRecord]
) -> Tuning:
    """Returns the grid of ``cell``, extended as the records require.

    While the best rate of a complete grid is at one of its ends, a rate is added there, up to
    ``protocol.extend`` rates at each end.
    """
    rates = [rounded_rate(rate) for rate in protocol.rates]
    added = {"low": 0, "high": 0}
    while True:
        costs = {rate: _mean_cost(protocol, cell, rate, records) for rate in rates}
        grid = Tuning(costs)
        if grid.chosen is None or len(rates) == 1:
            return grid
        if grid.chosen == rates[0]:
            end = "low"
            neighbour = rates[1]
        elif grid.chosen == rates[-1]:
            end = "high"
            neighbour = rates[-2]
        else:
            return grid
        if added[end] == protocol.extend:
            return replace(grid, at_edge=True)
        added[end] += 1
        # continues with the ratio of the two rates at that end
        rates.append(rounded_rate(grid.chosen**2 / neighbour))
        rates.sort()


def cost(metric: str, measured: Mapping[str, Any]) -> float:
    """Returns a loss or divergence, or 1 minus another measure, so that smaller is better.

    Raises:
      NaloraError: the metric was not measured.
    """
    if measured.get(metric) is None:
        raise NaloraError(
            f"records: {metric}",
            expected="a number",
            found="none",
            remedy="restore the record file",
        )
    value = float(measured[metric])
    if metric in COSTS:
        return value
    return 1.0 - value


def rounded_rate(rate: float) -> float:
    """Returns a rate with three digits, so that computed rates equal written ones."""
    return float(f"{rate:.3g}")


def tuning_runs(protocol: Protocol, cell: Cell, rates: Sequence[float]) -> list[Run]:
    """Returns the runs that choose the rate of ``cell``."""
    places = itertools.product(protocol.tuning_seeds, rates)
    return [Run(protocol, "tune", cell, rate, seed) for seed, rate in places]


def test_runs(protocol: Protocol, cell: Cell, chosen: float) -> list[Run]:
    """Returns the runs of ``cell`` that read the test items."""
    runs = []
    for seed in protocol.test_seeds:
        for multiple in protocol.test_multiples:
            rate = rounded_rate(chosen * multiple)
            runs.append(Run(protocol, "test", cell, rate, seed, multiple))
    return runs


def cells(protocol: Protocol) -> list[Cell]:
    """Returns all cells, in the order of the file."""
    places = itertools.product(protocol.models, protocol.tasks, protocol.methods)
    return [Cell(model, task, method) for model, task, method in places]


def list_runs(protocol: Protocol, records: Mapping[str, StudyRecord]) -> list[Run]:
    """Returns every known run of the study, done or not, in the order in which they should be done.

    Each seed is completed for all methods before the next, so a study that stops early has equally
    many seeds per method. Tests of a cell appear when its grid is complete.
    """
    order_of_cells = cells(protocol)
    order_of_seeds = [*protocol.tuning_seeds, *protocol.test_seeds]
    tunes: list[Run] = []
    tests: list[Run] = []
    for cell in order_of_cells:
        grid = tuning_grid(protocol, cell, records)
        tunes += tuning_runs(protocol, cell, grid.rates)
        if grid.chosen:
            tests += test_runs(protocol, cell, grid.chosen)

    def by_seed(run: Run) -> tuple[Any, ...]:
        """Returns the key by which runs are sorted."""
        return (
            order_of_seeds.index(run.seed),
            run.cell.model,
            run.cell.task,
            run.multiple,
            order_of_cells.index(run.cell),
            run.rate,
        )

    return sorted(tunes, key=by_seed) + sorted(tests, key=by_seed)


def list_pending(protocol: Protocol, records: Mapping[str, StudyRecord]) -> list[Run]:
    """Returns the runs of `list_runs` that have no record yet."""
    return [run for run in list_runs(protocol, records) if run.id not in records]


def _mean_cost(
    protocol: Protocol, cell: Cell, rate: float, records: Mapping[str, StudyRecord]
) -> float | None:
    """Returns the mean cost of a rate over the tuning seeds.

    It is infinite if a run diverged, and None if a run is missing.
    """
    runs = tuning_runs(protocol, cell, [rate])
    finished = [records[run.id] for run in runs if run.id in records]
    if len(finished) < len(runs):
        return None
    if any(record["diverged"] for record in finished):
        return math.inf
    costs = [cost(protocol.metric, record["validation"]) for record in finished]
    return sum(costs) / len(costs)


def _changed_settings(settings: Any, defaults: Any) -> Any:
    """Returns the settings that differ from their defaults, groups as dicts."""
    if not is_dataclass(settings):
        return settings
    changed = {}
    for each in fields(settings):
        value = getattr(settings, each.name)
        default = getattr(defaults, each.name)
        if value != default:
            changed[each.name] = _changed_settings(value, default)
    return changed


def _hash(value: Any) -> str:
    """Returns 16 digits of the SHA-256 of a value as JSON."""
    return json_digest(value, sort_keys=True, default=asdict)[:16]
