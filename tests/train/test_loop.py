"""The loop's decisions, with a step and hooks that do next to nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.assembly.schedule import Schedule
from nalora_jax.errors import TrainingDivergedError
from nalora_jax.method.step import TrainState
from nalora_jax.train import loop
from nalora_jax.train.loop import FitResult, Follower, LoopEvaluation, run_steps
from nalora_jax.train.profile import Profile


def make_hooks(scores: Sequence[float] = range(1, 100)) -> mock.Mock:
    """Hooks that measure these held-out scores, by step."""

    def evaluate(step: int, state: TrainState) -> LoopEvaluation:
        return LoopEvaluation(scores[step - 1], {"loss": -scores[step - 1]})

    return mock.Mock(**{"evaluate.side_effect": evaluate, "asked_to_stop.return_value": False})


def run(
    hooks: mock.Mock, schedule: Schedule, *, diverges_at: int = 0, params: Any = None
) -> FitResult:
    """Steps whose loss is finite, also after a moment of the optimizer has become infinite."""

    @jax.jit
    def step(params: Any, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        now = state.step + 1
        moments = {"mu": state.opt_state["mu"] + jnp.where(now == diverges_at, jnp.inf, 0.0)}
        metrics = {name: jnp.float32(1) for name in ("tokens", "grad_norm")}
        metrics |= {name: now.astype(jnp.float32) for name in ("loss", "target_tokens")}
        return state._replace(step=now, opt_state=moments), metrics | {"layers": {}}

    state = TrainState(
        jnp.int32(0), {"a": jnp.ones(3)}, {"mu": jnp.zeros(3)}, jnp.zeros(2, jnp.uint32)
    )
    batches = itertools.repeat(jnp.zeros(1))
    follower = Follower(hooks, schedule, lambda count: count / 10, state, 0, params or {}, None)
    return run_steps(step, params or {}, state, batches, follower)


def test_it_evaluates_and_saves_at_its_intervals_and_after_the_last_step() -> None:
    hooks = make_hooks()
    result = run(hooks, Schedule(steps=7, log_every=2, eval_every=4, save_every=3))
    assert (result.step, result.interrupted, result.stopped_early) == (7, False, False)
    assert [call.args[0] for call in hooks.evaluate.call_args_list] == [4, 7]
    saved = [
        (step, measured and measured.score) for (step, _, measured), _ in hooks.save.call_args_list
    ]
    assert saved == [(3, None), (4, 4), (6, None), (7, 7)]


def test_the_logged_loss_is_the_mean_over_loss_tokens() -> None:
    """Here the loss of step n is n, of n tokens."""
    hooks = make_hooks()
    run(hooks, Schedule(steps=5, log_every=3, eval_every=0, save_every=0))
    losses = [call.args[1]["loss"] for call in hooks.log.call_args_list]
    assert losses == pytest.approx([(1 + 4 + 9) / 6, (16 + 25) / 9])


def test_a_log_line_has_the_speed_of_its_steps(monkeypatch) -> None:
    """Steps of one token take half a second; the first one, which may compile, is not timed."""
    hooks = make_hooks()
    clock = itertools.count()
    now = [0.0]
    hooks.advance.side_effect = lambda step: now.__setitem__(0, next(clock) / 2)
    monkeypatch.setattr(loop, "time", mock.Mock(perf_counter=lambda: now[0]))
    run(hooks, Schedule(steps=5, log_every=3, eval_every=0, save_every=0))
    records = [call.args[1] for call in hooks.log.call_args_list]
    assert [record["tokens_per_second"] for record in records] == [2.0, 2.0]
    assert [record["seconds"] for record in records] == [1.0, 1.0]


def test_a_log_line_has_the_learning_rate_of_its_last_step() -> None:
    """The rate of a step is the schedule's value after the steps before it."""
    hooks = make_hooks()
    run(hooks, Schedule(steps=5, log_every=3, eval_every=0, save_every=0))
    rates = [call.args[1]["learning_rate"] for call in hooks.log.call_args_list]
    assert rates == [0.2, 0.4]


@pytest.mark.parametrize(
    ("patience", "scores", "last"),
    [
        (1, [3, 5, 4, 6], 3),
        (2, [3, 5, 4, 6], 4),
        (2, [5] * 4, 3),
        (0, [4, 3, 2, 1], 4),
    ],
)
def test_a_run_stops_after_evaluations_without_a_better_metric(patience, scores, last) -> None:
    schedule = Schedule(steps=4, log_every=1, eval_every=1, save_every=0, patience=patience)
    result = run(make_hooks(scores), schedule)
    assert (result.step, result.stopped_early) == (last, last < 4)


def test_a_state_that_has_diverged_is_not_saved_though_its_loss_is_finite() -> None:
    hooks, schedule = make_hooks(), Schedule(steps=8, log_every=1, eval_every=0, save_every=2)
    message = r"step 4: opt_state/mu: expected finite numbers, .*are kept"
    with pytest.raises(TrainingDivergedError, match=message):
        run(hooks, schedule, diverges_at=3)
    assert [call.args[0] for call in hooks.save.call_args_list] == [2]
    kernels = jnp.ones((4, 2, 2)).at[2, 1, 0].set(jnp.nan)
    message = r"the base model: layers/kernel\[2\]: expected finite numbers, found NaN .* in 1 of its arrays"
    params = {"layers": {"kernel": kernels, "b": kernels[0]}}
    with pytest.raises(TrainingDivergedError, match=message):
        run(hooks, schedule, diverges_at=3, params=params)


def test_steps_run_without_hidden_transfers() -> None:
    """`tests/conftest.py` guards the steps of all runs in tests."""
    with (
        pytest.raises(Exception, match="Disallowed host-to-device transfer"),
        Profile().step(1, None),
    ):
        jax.jit(jnp.sin)(np.zeros(1))
