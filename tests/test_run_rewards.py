"""A whole run with rewards: it learns, resumes to the bit within a rollout, and names rewards that
fail."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file

from nalora_jax import RunConfig, run
from nalora_jax.__main__ import main
from nalora_jax.config import DataConfig, MeshConfig, OptimizerConfig, RLConfig, TrainConfig
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.record import check_run_config
from nalora_jax.kinds.rl.kind import EarlyWarnings
from nalora_jax.train.callbacks import Callback
from tests import tiny

pytestmark = pytest.mark.usefixtures("surroundings")

RL = RLConfig(rewards=("rewards_of_a_run:letters",), samples=4, max_new_tokens=6, updates=2)
TRAIN = TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=3)


class Letters:
    """The share of words before m in a completion; may end the process at a given call."""

    def __init__(self, ends_at: int = 0) -> None:
        self.calls, self.ends_at = 0, ends_at

    def __call__(self, prompt: str, completion: str, record: Any) -> float:
        self.calls += 1
        if self.calls == self.ends_at:
            raise KeyboardInterrupt
        assert record["answer"].strip() == "z"
        words = completion.split()
        return sum(word < "m" for word in words) / max(len(words), 1)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One device, a cache of this module's own, and the module of the reward."""
    module = ModuleType("rewards_of_a_run")
    vars(module)["letters"] = Letters()
    folder = tmp_path_factory.mktemp("new")
    with tiny.on_named_devices(folder / "cache"), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        yield


@pytest.fixture
def rewards(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Replaces the reward."""
    return lambda reward: monkeypatch.setattr("rewards_of_a_run.letters", reward)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny.make_config(
        folder, rl=RL, train=TRAIN, steps=8, mechanisms=("curvature_cap:warmup=2",)
    )
    config = replace(config, data=replace(config.data, max_length=0))
    run(config)
    return config


@pytest.fixture
def config(whole: RunConfig, tmp_path: Path) -> RunConfig:
    """The settings of a run of the test's own."""
    return replace(whole, output=str(tmp_path / "run"))


def same_samples(config: RunConfig, whole: RunConfig, *, atol: float = 0.0) -> None:
    """Equal adapters and rewards of all steps."""
    adapters = [Path(one.output) / "adapter/adapter_model.safetensors" for one in (whole, config)]
    first, second = map(load_file, adapters)
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=0, atol=atol, err_msg=name)
    assert tiny.logged(whole.output, "reward") == tiny.logged(config.output, "reward")


def test_a_run_with_rewards_learns_and_shows_its_samples(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    rl = replace(RL, updates=1, loss="dr_grpo", beta=0.01)
    train = replace(TRAIN, batch_size=16, log_every=3)
    optimizer = OptimizerConfig(learning_rate=0.1)
    callback = mock.Mock(spec=Callback, required=False)
    config = replace(config, steps=24, rl=rl, train=train, optimizer=optimizer)
    result = run(config, callbacks=[callback])
    assert result.after["reward"] >= result.before["reward"]  # of four prompts
    logged = [line for line in tiny.lines(result.folder) if "loss" in line]
    assert logged[-1]["reward"] > logged[0]["reward"] + 0.05  # logits of this model stay near zero
    # float32: generator and training agree
    assert 0 < logged[0]["mismatch_bound"] < logged[0]["mismatch"] < 1e-4
    figures = "entropy clipped length cut groups_alike reward_std reward_letters reward_letters_std"
    figures += " rollout_seconds rollout_tokens_per_second update_seconds update_tokens_per_second"
    assert all(logged[-1][name] >= 0 for name in figures.split())
    assert logged[-1]["divergence"] > logged[0]["divergence"]
    shown = [
        json.loads(line) for line in (result.folder / "rollouts.jsonl").read_text().splitlines()
    ]
    assert {line["step"] for line in shown} == set(range(3, 25, 3))
    told = [call.args for call in callback.on_samples.call_args_list]
    assert [step for step, _ in told] == list(range(3, 25, 3))
    assert [group for _, groups in told for group in groups] == shown
    group = shown[0]["samples"]
    assert len(group) == RL.samples
    values = np.array([sample["rewards"][RL.rewards[0]] for sample in group])
    advantages = [sample["advantage"] for sample in group]
    np.testing.assert_allclose(advantages, values - values.mean(), atol=1e-6)  # of "dr_grpo"
    report = (result.folder / "report.html").read_text()
    assert report.count("<summary>Step ") == 8
    assert report.count("<dt>rewards_of_a_run:letters</dt>") == len(shown) * RL.samples
    line = capsys.readouterr().out.partition("step 3/24")[2].partition("\n")[0]
    assert f"reward {logged[0]['reward']:.3f}" in line
    assert "misalignment" not in line


class EndsInUpdate(Callback):
    """Ends the process after the first step, whose samples are still stored."""

    def on_log(self, step: int, record: Any) -> None:
        raise KeyboardInterrupt


def test_a_run_that_was_killed_twice_is_the_uninterrupted_run_to_the_bit(config, whole, rewards):
    """Before its first checkpoint, and in a reward; the checkpoint of step 3 is between two updates
    on a rollout."""
    config = replace(config, resume="auto")
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[EndsInUpdate()])
    held_out = config.data.eval_limit + config.data.select_limit
    rewards(Letters(ends_at=held_out + 8 * 2 + 3))
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert [path.name for path in (Path(config.output) / "checkpoints").iterdir()] == ["3"]
    rewards(Letters())
    run(config)
    same_samples(config, whole)
    samples = [(Path(one.output) / "rollouts.jsonl").read_bytes() for one in (whole, config)]
    assert samples[0] == samples[1]
    divergences = tiny.logged(config.output, "divergence")
    assert min(divergences[step] for step in (4, 6, 8)) > 0


def test_a_run_resumes_on_another_mesh_within_float_noise(whole: RunConfig, tmp_path: Path) -> None:
    """On four devices, two prompts of four samples are four parts of groups."""
    moved = replace(whole, output=str(shutil.copytree(whole.output, tmp_path / "run")), resume=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    run(replace(moved, mesh=MeshConfig(data=4, fsdp=1, tensor=1)))
    same_samples(moved, whole, atol=1e-4)


def test_early_warnings_are_in_plain_words_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn = EarlyWarnings(100)
    usual = {"groups_alike": 0.5, "length": 20.0, "entropy": 2.0, "mismatch_bound": 0.01}
    for figures in [usual] * 12 + [usual | {"groups_alike": 1.0}] * 9 + [usual]:
        warn(figures)
    assert not caplog.records
    for _ in range(12):
        warn({"groups_alike": 1.0, "length": 81.0, "entropy": 0.1, "mismatch_bound": 0.2})
    expected = (
        "samples have grown from 20 to 81 tokens, of at most 100",
        "the entropy of the policy fell from 2.000 to 0.100: samples hardly differ",
        "generator and training program differ by 0.20 in the probabilities of a token",
        "the rewards of each group were all equal in 10 steps: nothing is learned",
    )
    for record, start in zip(caplog.records, expected, strict=True):
        assert record.getMessage().startswith(start)


def test_groups_without_a_difference_are_replaced(config, rewards):
    rewards(lambda prompt, completion, record: float(prompt < "f"))
    run(replace(config, steps=1, rl=replace(RL, updates=1, resample=2)))
    assert tiny.logged(config.output, "groups_replaced") == {1: 4}  # every group is alike, twice
    assert tiny.logged(config.output, "grad_norm") == {1: 0}


def test_rewards_that_fail_are_left_out_where_that_is_asked_for(config, rewards):
    calls = itertools.count(1)
    rewards(lambda *sample: sample[2]["nothing" if next(calls) % 3 == 0 else "gold"])
    result = run(replace(config, steps=2, rl=replace(RL, ignore_reward_errors=True)))
    assert result.after["n"] == config.data.eval_limit - 1
    assert tiny.logged(result.folder, "reward") == {1: 1.0, 2: 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": TrainConfig(batch_size=6)}, "--train.batch-size: expected a multiple of --rl.samples .4.,"),
        ({"rl": replace(RL, reward_weights=(1.0, 2.0))}, "--rl.reward-weights: expected 1, one a reward, found 2"),
        ({"rl": replace(RL, beta=0.1), "adapter": "a"}, "--rl.beta: expected 0 with --adapter"),
        ({"rl": replace(RL, staleness=1)}, "--rl.staleness: expected 0 with no --rl.servers, found 1"),
        ({"rl": replace(RL, server_path="/a")}, "--rl.server-path: expected none with no --rl.servers"),
        ({"rl": replace(RL, servers=("localhost:80",))}, "--rl.servers: expected addresses such as"),
        ({"rl": replace(RL, importance_tokens=(2.0, 1.0))}, "--rl.importance-tokens: expected LOW HIGH"),
        ({"rl": replace(RL, importance_samples=(1.0,))}, "--rl.importance-samples: expected LOW HIGH"),
        ({"data": DataConfig(loss_last=2.0)}, "--data.loss-last: expected 0.0 with --rl.rewards"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(config, changes, message) -> None:
    with pytest.raises(NaloraError, match=message):
        check_run_config(replace(config, **changes))


def test_prompts_that_leave_no_room_for_a_sample_are_named(config: RunConfig) -> None:
    with pytest.raises(NaloraError, match="expected prompts of at most 1 tokens"):
        run(replace(config, data=replace(config.data, max_length=7)))


def test_a_dry_run_prints_the_rollouts(config, tmp_path, capsys):
    settings = tiny.write_settings(config, tmp_path / "settings.py")
    assert main(["train", "--config", str(settings), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4 samples of each of 2 prompts, at most 6 tokens, 8 rows at once with 0.00 GB" in out
    assert re.search(
        r"# memory of a device, estimated: .*\n# time of a step, estimated: \S+ s for a rollout",
        out,
    )
