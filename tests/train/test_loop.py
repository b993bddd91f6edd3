"""The loop's decisions, with a step and hooks that do next to nothing."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from nalora_jax.errors import TrainingDivergedError
from nalora_jax.method.step import TrainState
from nalora_jax.train.loop import FitResult, Follower, LoopEvaluation, Schedule, run_steps


class Hooks:
    """Notes what it is asked for."""

    def __init__(self, stop_at: int = 0) -> None:
        self.saved: list[tuple[int, float | None]] = []
        self.evaluated: list[int] = []
        self.logged: list[float] = []
        self.record: dict[str, Any] = {}
        self.stop_at = stop_at

    def log(self, step: int, record: Any, state: TrainState) -> None:
        self.logged.append(record["loss"])
        self.record = record

    def advance(self, step: int) -> None:
        pass

    def evaluate(self, step: int, state: TrainState) -> LoopEvaluation:
        self.evaluated.append(step)
        return LoopEvaluation(float(step), {"loss": -float(step)})

    def save(self, step: int, state: TrainState, measured: LoopEvaluation | None) -> None:
        self.saved.append((step, measured and measured.metrics["loss"]))

    def asked_to_stop(self, step: int) -> bool:
        return step == self.stop_at


def run(
    hooks: Hooks, schedule: Schedule, *, poison: str = "", at: int = 0, params: Any = None
) -> FitResult:
    """Steps whose loss is always finite; at step ``at`` the part ``poison`` of the state becomes infinite."""

    @jax.jit
    def step(params: Any, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        now = state.step + 1
        extra = jnp.where(now == at, jnp.inf, 0.0)
        parts = {"lora": state.lora, "opt_state": state.opt_state}
        if poison:
            parts[poison] = jax.tree.map(
                lambda x: x + extra.astype(x.dtype) if x.ndim else x, parts[poison]
            )
        metrics = {name: jnp.float32(1) for name in ("tokens", "grad_norm")}
        metrics |= {name: now.astype(jnp.float32) for name in ("loss", "target_tokens")}
        return state._replace(step=now, **parts), metrics | {"layers": {}}

    moments = {"mu": {"a": jnp.zeros(3)}, "count": jnp.int32(0)}
    state = TrainState(jnp.int32(0), {"a": jnp.ones(3)}, moments, jnp.zeros(2, jnp.uint32))
    batches = itertools.repeat(jnp.zeros(1))
    follower = Follower(hooks, schedule, lambda _: 0.1, state, 0, params or {}, None)
    return run_steps(step, params or {}, state, batches, follower)


def test_it_evaluates_and_saves_at_its_intervals_and_after_the_last_step() -> None:
    hooks = Hooks()
    result = run(hooks, Schedule(steps=7, log_every=2, eval_every=4, save_every=3))
    assert (result.step, result.interrupted, result.stopped_early) == (7, False, False)
    assert hooks.evaluated == [4, 7]
    assert hooks.saved == [(3, None), (4, -4.0), (6, None), (7, -7.0)]


def test_the_logged_loss_is_the_mean_over_loss_tokens() -> None:
    """Here the loss of step n is n, of n tokens."""
    hooks = Hooks()
    run(hooks, Schedule(steps=5, log_every=3, eval_every=0, save_every=0))
    assert hooks.logged == pytest.approx([(1 + 4 + 9) / 6, (16 + 25) / 9])


@pytest.mark.parametrize(
    ("patience", "scores", "last"),
    [
        (1, [3, 5, 4, 6], 3),
        (2, [3, 5, 4, 6], 4),
        (2, [5, 3, 4, 6], 3),
        (2, [5] * 4, 3),
        (0, [4, 3, 2, 1], 4),
    ],
)
def test_a_run_stops_after_evaluations_without_a_better_metric(patience, scores, last) -> None:
    class Scored(Hooks):
        def evaluate(self, step: int, state: TrainState) -> LoopEvaluation:
            return LoopEvaluation(scores[step - 1], {"loss": -scores[step - 1]})

    result = run(Scored(), Schedule(steps=4, log_every=1, eval_every=1, save_every=0, patience=patience))
    assert (result.step, result.stopped_early) == (last, last < 4)


def test_bad_numbers_of_the_base_model_are_named_as_the_reason() -> None:
    kernels = jnp.ones((4, 2, 2)).at[2, 1, 0].set(jnp.nan)
    match = r"the base model: layers/kernel\[2\]: expected finite numbers, found NaN .* in 1 of its arrays"
    params = {"layers": {"kernel": kernels, "b": kernels[0]}}
    with pytest.raises(TrainingDivergedError, match=match):
        run(Hooks(), Schedule(8, 1, 0, 2), poison="lora", at=3, params=params)


@pytest.mark.parametrize(("poison", "named"), [("lora", "lora/a"), ("opt_state", "opt_state/mu/a")])
def test_a_state_that_has_diverged_is_not_saved_though_its_loss_is_finite(poison: str, named: str) -> None:
    hooks = Hooks()
    message = rf"step 4: {named}: expected finite numbers, .*are kept"
    with pytest.raises(TrainingDivergedError, match=message):
        run(hooks, Schedule(steps=8, log_every=1, eval_every=0, save_every=2), poison=poison, at=3)
    assert [step for step, _ in hooks.saved] == [2]


def test_where_it_is_asked_to_stop_it_saves_that_step_without_evaluating_it() -> None:
    hooks = Hooks(stop_at=4)
    result = run(hooks, Schedule(steps=8, log_every=3, eval_every=4, save_every=0))
    assert (result.step, result.interrupted) == (4, True)
    assert hooks.saved == [(4, None)]
    assert hooks.evaluated == []
