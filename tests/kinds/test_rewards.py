"""Rewards: values of those built in, and errors that name reward and record."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nalora_jax.config import RLConfig
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.rl import rewards
from nalora_jax.kinds.rl.reward_evaluation import metric_names
from nalora_jax.kinds.rl.rewards import Scorer, make_reward
from nalora_jax.kinds.rl.sampling_step import forget_samples

CHOICES = {"choices": ["a red fox", "no one", "an owl"], "gold": 2, "answer": "an owl"}


@pytest.mark.parametrize(
    ("name", "completion", "record", "value"),
    [
        ("exact", " The Owl.\n", {"answer": "owl"}, 1),
        ("exact", "owls", {"answer": "owl"}, 0),
        ("number", "3 + 4 is 7, so 1,007.50", {"answer": "#### 1007.5"}, 1),
        ("number", "42", {"answer": "#### -42"}, 0),
        ("number", "no number", {"answer": "none"}, 0),
        ("number", "7 or 8", {"answer": "7"}, 0),
        ("choice", "The answer is C.", CHOICES, 1),
        ("choice", "an owl, not a red fox", CHOICES, 1),
        ("choice", "a red fox, not an owl", CHOICES, 0),
        ("choice", "A bird: an owl", CHOICES, 1),
        ("choice", "(B)", {"answer": "b"}, 1),
        ("regex:pattern=^\\d+$", "42", {}, 1),
        ("regex:pattern=^\\d+$", "42 ", {}, 0),
        ("format", "<think>two\nlines</think> 7", {}, 1),
        ("format", "<think></think> 7", {}, 0),
        ("format", "<think>a</think>", {}, 0),
        ("format:tag=plan", "<plan>a</plan>b", {}, 1),
        ("length:limit=4", "1234", {}, 0),
        ("length:limit=4", "123456", {}, -0.5),
        ("length:limit=4", "1234567890", {}, -1),
    ],
)
def test_values_of_built_in_rewards(name, completion, record, value) -> None:
    assert make_reward(name)("a prompt", completion, record) == value


def _module(**functions: Any) -> None:
    module = ModuleType("rewards_of_a_test")
    vars(module).update(functions)
    sys.modules[module.__name__] = module


def test_functions_of_modules_are_rewards() -> None:
    _module(twice=lambda prompt, completion, record: 2 * len(completion))
    scorer = Scorer(RLConfig(rewards=("rewards_of_a_test:twice", "exact")))
    values = scorer(["p"] * 2, ["ab", "c"], [{"answer": "c"}] * 2, ["file:1", "file:2"])
    np.testing.assert_array_equal(values, [[4, 0], [2, 1]])
    with pytest.raises(NaloraError, match="MODULE:FUNCTION that can be imported, found .*once"):
        make_reward("rewards_of_a_test:once")
    # Other tests of the process may have registered rewards of their own between these.
    built_in = ("choice", "exact", "format", "length", "number", "reasoning_gym", "regex")
    with pytest.raises(NaloraError, match="expected one of .*" + ".*, ".join(built_in)):
        make_reward("nmber")


def test_metrics_of_rewards_have_names_of_their_own() -> None:
    names = ("number", "judges:first", "judges:second", "other:first", "judges:std")
    patterns = ("regex:pattern=a", "regex:pattern=b", "judges:first_std", "judges:regex_2")
    assert metric_names(RLConfig(rewards=(*names, *patterns))) == [
        *("reward_number", "reward_first", "reward_second", "reward_first_2", "reward_std_2"),
        *("reward_regex", "reward_regex_2", "reward_first_std_2", "reward_regex_2_2"),
    ]


def test_the_reward_of_the_page_is_registered_by_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = {
        name: reward for name, reward in rewards._REWARDS._values.items() if name != "short"
    }
    monkeypatch.setattr(rewards._REWARDS, "_values", registered)
    page = (Path(__file__).parents[2] / "docs" / "rl.md").read_text(encoding="utf-8")
    exec(page.split('title="my_rewards.py"\n')[1].split("```")[0], {"__name__": "my_rewards"})
    reward = make_reward("short")
    assert reward("a prompt", "x" * 50, {"answer": "y"}) == -0.5


def _raises(prompt: str, completion: str, record: Any) -> float:
    return record["missing"]


@pytest.mark.parametrize(
    ("reward", "found"),
    [
        (_raises, "missing"),
        (lambda *_: time.sleep(5), "no value after 0.05 s"),
        (lambda *_: float("nan"), "the value nan"),
        (lambda *_: float("-inf"), "the value -inf"),
        (lambda *_: "x", "x"),
    ],
)
def test_a_reward_that_fails_names_itself_and_the_record_or_is_nan(reward: Any, found: str) -> None:
    _module(judge=reward)
    arguments = ["p", "p"], ["ok", "ok"], [{}, {}], ["train.jsonl:7", "train.jsonl:8"]
    rl = RLConfig(rewards=("rewards_of_a_test:judge",), reward_seconds=0.05)
    with pytest.raises(
        NaloraError, match=f"judge of train.jsonl:7: expected a finite number .*{found}"
    ):
        Scorer(rl)(*arguments)
    assert np.isnan(Scorer(replace(rl, ignore_reward_errors=True))(*arguments)).all()


@pytest.mark.parametrize("reward", [lambda *_: 1.0, _raises])
def test_the_timer_of_a_reward_is_stopped_when_the_reward_ends(reward: Any) -> None:
    _module(judge=reward)
    rl = RLConfig(rewards=("rewards_of_a_test:judge",), reward_seconds=600)
    handler = signal.getsignal(signal.SIGALRM)
    Scorer(replace(rl, ignore_reward_errors=True))(["p"], ["ok"], [{}], ["train.jsonl:1"])
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, 0)  # a timer would end pytest itself
    assert remaining == 0
    assert signal.getsignal(signal.SIGALRM) is handler


def test_a_regular_expression_that_backtracks_is_stopped() -> None:
    rl = RLConfig(rewards=("regex:pattern=^(a+)+$",), reward_seconds=0.2)
    with pytest.raises(NaloraError, match="no value after"):
        Scorer(rl)(["p"], ["a" * 40 + "b"], [{}], ["r"])


def test_damaged_lines_of_shown_samples_are_dropped_on_resume(tmp_path, caplog):
    file = tmp_path / "rollouts.jsonl"
    lines = [b'{"step": 1, "samples": []}', b'{"step": 2, "samples": []}', b'{"step": 9}']
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(lines[0])
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        file.write_bytes(b"\n".join([bytes(damaged), *lines[1:]]) + b'\n{"step": 1')
        forget_samples(file, 2)
        assert lines[1] in file.read_bytes().splitlines()
        assert lines[2] not in file.read_bytes()
        assert file.read_bytes().endswith(b"\n")
    file.write_bytes(b'\xff{"step": 1}\n[]\n' + lines[0] + b"\n")
    caplog.clear()
    forget_samples(file, 2)
    assert file.read_bytes() == lines[0] + b"\n"
    assert "dropped 2 lines that cannot be read" in caplog.text
