"""A whole run with rewards: it learns, resumes to the bit within a rollout, and names rewards that fail."""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from nalora_jax import RunConfig, run
from nalora_jax.__main__ import main
from nalora_jax.config import DataConfig, MeshConfig, OptimizerConfig, RLConfig, TrainConfig, check
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.train.callbacks import Callback
from nalora_jax.train.kinds.rl import EarlyWarnings
from tests import tiny

RL = RLConfig(rewards=("rewards_of_a_run:letters",), samples=4, max_new_tokens=6, updates=2)
TRAIN = TrainConfig(batch_size=16, log_every=3, eval_every=0, save_every=3)


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


@pytest.fixture
def rewards(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("rewards_of_a_run")
    vars(module)["letters"] = Letters()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def config(tmp_path: Path, rewards: ModuleType) -> RunConfig:
    config = tiny.make_config(tmp_path, rl=RL, train=TRAIN, steps=8, mechanisms=("curvature_cap:warmup=2",))
    return replace(config, data=replace(config.data, max_length=0))


def lines(folder: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_rewards_learns_and_shows_its_samples(config: RunConfig, tmp_path: Path) -> None:
    with tiny.on_one_device(tmp_path / "cache"):
        rl = replace(RL, updates=1, loss="dr_grpo", beta=0.01)
        result = run(replace(config, steps=24, rl=rl, optimizer=OptimizerConfig(learning_rate=0.1)))
    assert result.after["reward"] >= result.before["reward"]  # of four prompts
    logged = [line for line in lines(result.folder) if "loss" in line]
    assert logged[-1]["reward"] > logged[0]["reward"] + 0.05  # logits of this model stay near zero
    assert (
        0 < logged[0]["mismatch_bound"] < logged[0]["mismatch"] < 1e-4
    )  # float32: generator and training agree
    figures = {"entropy", "divergence", "clipped", "length", "cut", "groups_alike", "reward_std"}
    figures |= {"reward_letters", "reward_letters_std"}
    figures |= {
        f"{phase}_{figure}"
        for phase in ("rollout", "update")
        for figure in ("seconds", "tokens_per_second")
    }
    assert all(logged[-1][name] >= 0 for name in figures)
    assert logged[-1]["divergence"] > logged[0]["divergence"]
    shown = [json.loads(line) for line in (result.folder / "rollouts.jsonl").read_text().splitlines()]
    assert {line["step"] for line in shown} == set(range(3, 25, 3))
    assert shown[0]["rewards"].keys() == {RL.rewards[0]}
    report = (result.folder / "report.html").read_text()
    assert report.count("<summary>Step ") == 8
    assert report.count("<dt>rewards_of_a_run:letters</dt>") == 8 * 4


@pytest.mark.parametrize("updates", [1, 2])
def test_a_run_that_was_killed_in_a_reward_resumes_to_the_bit(
    config: RunConfig, rewards: ModuleType, tmp_path: Path, updates: int
) -> None:
    """With two updates on a rollout, the checkpoint of step 3 is between them."""
    config = replace(config, rl=replace(RL, updates=updates))
    whole, parts = (replace(config, output=str(tmp_path / name)) for name in ("whole", "parts"))
    with tiny.on_one_device(tmp_path / "cache"):
        run(whole)
        held_out = config.data.eval_limit + config.data.select_limit
        vars(rewards)["letters"] = Letters(ends_at=held_out + 16 * (5 // updates) + 3)
        with pytest.raises(KeyboardInterrupt):
            run(parts)
        vars(rewards)["letters"] = Letters()
        run(replace(parts, resume=True))
    first, second = (
        load_file(Path(one.output) / "adapter/adapter_model.safetensors") for one in (whole, parts)
    )
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    of_steps = [
        {line["step"]: line["reward"] for line in lines(one.output) if "loss" in line}
        for one in (whole, parts)
    ]
    assert of_steps[0] == of_steps[1]
    samples = [(Path(one.output) / "rollouts.jsonl").read_bytes() for one in (whole, parts)]
    assert samples[0] == samples[1]
    assert all(
        line["divergence"] > 0
        for line in lines(parts.output)[-4:]
        if line.get("step", 0) > 3 and "loss" in line
    )


class EndsInUpdate(Callback):
    """Ends the process after the first step, whose samples are still stored."""

    def on_log(self, step: int, record: Any) -> None:
        raise KeyboardInterrupt


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew(
    config: RunConfig, tmp_path: Path
) -> None:
    train = replace(TRAIN, log_every=1)
    config = replace(config, steps=2, resume="auto", rl=replace(RL, updates=1), train=train)
    with tiny.on_one_device(tmp_path / "cache"):
        with pytest.raises(KeyboardInterrupt):
            run(config, callbacks=[EndsInUpdate()])
        run(config)
    assert len((Path(config.output) / "rollouts.jsonl").read_text().splitlines()) == 2 * 4


def test_a_run_resumes_on_another_mesh_within_float_noise(
    config: RunConfig, rewards: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On four devices, two prompts of four samples are four parts of groups."""
    train = replace(TRAIN, batch_size=8, save_every=2, log_every=1)
    config = replace(config, steps=3, rl=replace(RL, updates=1), train=train)
    whole, parts = (replace(config, output=str(tmp_path / name)) for name in ("whole", "parts"))
    with tiny.on_one_device(tmp_path / "cache"):
        run(whole)
        vars(rewards)["letters"] = Letters(
            ends_at=config.data.eval_limit + config.data.select_limit + 2 * 8 + 3
        )
        with pytest.raises(KeyboardInterrupt):
            run(parts)
    vars(rewards)["letters"] = Letters()
    make = distributed.make_mesh
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distributed, "make_mesh", lambda mesh, devices=None: make(mesh, jax.devices()[:4]))
    run(replace(parts, resume=True, mesh=MeshConfig(data=4, fsdp=1, tensor=1)))
    first, second = (
        load_file(Path(one.output) / "adapter/adapter_model.safetensors") for one in (whole, parts)
    )
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=1e-4, err_msg=name)
    assert tiny.logged(whole.output, "reward") == tiny.logged(parts.output, "reward")


def test_early_warnings_are_in_plain_words_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    warn = EarlyWarnings(100)
    usual = {"groups_alike": 0.5, "length": 20.0, "entropy": 2.0, "mismatch_bound": 0.01}
    for figures in [usual] * 12 + [usual | {"groups_alike": 1.0}] * 9 + [usual]:
        warn(figures)
    assert not caplog.records
    for _ in range(12):
        warn({"groups_alike": 1.0, "length": 81.0, "entropy": 0.1, "mismatch_bound": 0.2})
    grown, collapsed, differs, alike = (record.getMessage() for record in caplog.records)
    assert differs.startswith(
        "generator and training program differ by 0.20 in the probabilities of a token"
    )
    assert grown == "samples have grown from 20 to 81 tokens, of at most 100"
    assert collapsed.startswith("the entropy of the policy fell from 2.000 to 0.100: samples hardly differ")
    assert alike.startswith("the rewards of each group were all equal in 10 steps: nothing is learned")


def test_groups_without_a_difference_are_replaced(
    config: RunConfig, rewards: ModuleType, tmp_path: Path
) -> None:
    vars(rewards)["letters"] = lambda prompt, completion, record: float(prompt < "f")
    with tiny.on_one_device(tmp_path / "cache"):
        run(
            replace(
                config, steps=2, rl=replace(RL, updates=1, resample=2), train=replace(TRAIN, log_every=1)
            )
        )
    logged = [line for line in lines(config.output) if "loss" in line]
    assert [line["groups_replaced"] for line in logged] == [8, 8]  # every group is alike, twice
    assert [line["grad_norm"] for line in logged] == [0, 0]


def test_a_reward_that_fails_ends_the_run_with_its_record(
    config: RunConfig, rewards: ModuleType, tmp_path: Path
) -> None:
    vars(rewards)["letters"] = lambda prompt, completion, record: record["nothing"]
    with tiny.on_one_device(tmp_path / "cache"), pytest.raises(NaloraError) as raised:
        run(config)
    assert "reward rewards_of_a_run:letters of" in str(raised.value)
    assert "questions.jsonl" in str(raised.value)
    assert "'nothing'" in str(raised.value)
    calls = itertools.count(1)
    vars(rewards)["letters"] = lambda *sample: sample[2]["nothing" if next(calls) % 3 == 0 else "gold"]
    ignoring = replace(
        config, steps=2, output=str(tmp_path / "ignoring"), rl=replace(RL, ignore_reward_errors=True)
    )
    with tiny.on_one_device(tmp_path / "again"):
        result = run(ignoring)
    assert result.after["n"] == config.data.eval_limit - 1
    assert tiny.logged(result.folder, "reward") == {2: 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": TrainConfig(batch_size=6)},
            r"--train.batch-size: expected a multiple of --rl.samples \(4\), found 6",
        ),
        (
            {"rl": replace(RL, reward_weights=(1.0, 2.0))},
            "--rl.reward-weights: expected 1, one a reward, found 2",
        ),
        ({"rl": replace(RL, samples=1)}, r"--rl.samples: expected a whole number in \[2, 4096\], found 1"),
        (
            {"rl": replace(RL, rewards=("length",), beta=0.1), "adapter": "a"},
            "--rl.beta: expected 0 with --adapter",
        ),
        ({"data": DataConfig(loss_last=2.0)}, "--data.loss-last: expected 0.0 with --rl.rewards"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    config: RunConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(NaloraError, match=message):
        check(replace(config, **changes))


def test_prompts_that_leave_no_room_for_a_sample_are_named(config: RunConfig, tmp_path: Path) -> None:
    with (
        tiny.on_one_device(tmp_path / "cache"),
        pytest.raises(NaloraError, match="expected prompts of at most 1 tokens"),
    ):
        run(replace(config, data=replace(config.data, max_length=7)))


def test_a_dry_run_prints_the_rollouts(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny.write_settings(config, tmp_path / "settings.py")
    with tiny.on_one_device(tmp_path / "cache"):
        assert main(["train", "--config", str(settings), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4 samples of each of 4 prompts, at most 6 tokens, 16 rows at once with 0.00 GB" in out
    assert re.search(
        r"# memory of a device, estimated: .*\n# time of a step, estimated: \S+ s for a rollout", out
    )
