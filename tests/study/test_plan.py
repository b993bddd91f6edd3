"""Which runs are wanted, from records that were made up."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nalora_jax.config import RunConfig
from nalora_jax.study.planned_runs import Cell, Run, list_pending, list_runs, tuning_grid
from nalora_jax.study.protocol import Method, Protocol, Task
from nalora_jax.study.records import StudyRecord

PROTOCOL = Protocol(
    question="?",
    models=("m",),
    baseline="a",
    rates=(1e-3, 2e-3, 4e-3),
    tuning_seeds=(0, 1),
    test_seeds=(5, 6),
    tasks={"t": Task("socialiqa")},
    methods={"a": Method(), "b": Method(reseed=1)},
    extend=2,
    path=Path("nowhere/protocol.toml"),
)
CELL = Cell("m", "t", "a")


def done(
    protocol: Protocol, loss: Callable[[Run], float], stages: tuple[str, ...] = ("tune",)
) -> dict[str, StudyRecord]:
    """Records of all runs that are wanted one after another, with these losses; infinite ones
    diverged."""
    records: dict[str, StudyRecord] = {}
    while left := [run for run in list_pending(protocol, records) if run.stage in stages]:
        value = loss(left[0])
        records[left[0].id] = {"diverged": math.isinf(value), "validation": {"loss": value}}
    return records


def test_changed_defaults_are_noticed_since_run_ids_leave_defaults_out() -> None:
    """After a new setting, renew the digest. After a changed default too, and write the former
    default into the
    protocols of unfinished studies: their earlier and later runs would have the same id."""
    defaults = json.dumps(RunConfig().to_dict(), sort_keys=True)
    assert hashlib.sha256(defaults.encode()).hexdigest()[:16] == "846e10c37762ea2b"


def test_the_rate_with_the_lowest_mean_over_seeds_is_chosen_and_tested() -> None:
    losses = {1e-3: (3.0, 3.0), 2e-3: (2.8, 2.9), 4e-3: (2.5, 3.3)}
    records = done(PROTOCOL, lambda run: losses[run.rate][run.seed])
    assert tuning_grid(PROTOCOL, CELL, records).chosen == 2e-3
    tests = list_pending(PROTOCOL, records)
    assert [(r.stage, r.cell.method, r.rate, r.seed) for r in tests] == [
        ("test", method, 2e-3, seed) for seed in (5, 6) for method in "ab"
    ]


def test_a_grid_is_extended_while_the_best_rate_is_at_its_end() -> None:
    for best, grid, at_edge in (
        (2e-3, (1e-3, 2e-3, 4e-3), False),
        (8e-3, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), False),
        (5e-4, (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), False),
        (1.0, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), True),  # two more at most
        (1e-9, (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), True),
    ):
        records = done(PROTOCOL, lambda run, best=best: abs(math.log(run.rate / best)))
        found = tuning_grid(PROTOCOL, CELL, records)
        chosen = min(grid, key=lambda rate, best=best: abs(math.log(rate / best)))
        assert (found.rates, found.at_edge, found.chosen) == (grid, at_edge, chosen)


def test_a_rate_at_which_one_seed_diverges_is_not_chosen() -> None:
    records = done(
        PROTOCOL, lambda run: math.inf if run.rate == 4e-3 and run.seed == 1 else -run.rate
    )
    assert tuning_grid(PROTOCOL, CELL, records).chosen == 2e-3
    assert all(
        run.stage == "tune" for run in list_runs(PROTOCOL, done(PROTOCOL, lambda _: math.inf))
    )


def test_a_run_id_changes_with_whatever_changes_its_result_and_with_nothing_else() -> None:
    def run(
        protocol: Protocol = PROTOCOL, stage: str = "test", rate: float = 1e-3, seed: int = 5
    ) -> str:
        return Run(protocol, stage, CELL, rate, seed).id

    assert run() == run(
        replace(PROTOCOL, question="another", test_seeds=(5, 6, 7), margin=0.1, extend=0)
    )
    others = [
        run(stage="tune"),
        run(rate=2e-3),
        run(seed=6),
        run(replace(PROTOCOL, run={"steps": 7})),
        run(replace(PROTOCOL, tasks={"t": Task("socialiqa", test_items=7)})),
        run(replace(PROTOCOL, tasks={"t": Task("socialiqa", accuracy_items=7)})),
        run(replace(PROTOCOL, methods={"a": Method(reseed=3)})),
        run(replace(PROTOCOL, evaluate_every=50)),
    ]
    assert len({run(), *others}) == len(others) + 1
    # What only a test reads does not concern a tuning run.
    tuned = run(stage="tune")
    assert tuned == run(
        replace(PROTOCOL, tasks={"t": Task("socialiqa", test_items=7)}), stage="tune"
    )
