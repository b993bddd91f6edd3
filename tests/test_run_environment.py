"""Whole runs with an environment: on this library's generator and on a server, masks, resumption,
pass@k, and chats as prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nalora_jax import RunConfig, run
from nalora_jax.config import OptimizerConfig, RLConfig, TrainConfig
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.record import check_run_config
from nalora_jax.kinds.rl import rollout
from nalora_jax.kinds.rl.environments import register_environment
from nalora_jax.kinds.rl.reward_evaluation import pass_at
from nalora_jax.kinds.rl.rollout import sample_batch
from nalora_jax.train.callbacks import Callback
from tests import tiny
from tests.doubles.rollout_server import serving
from tests.kinds.test_environments import TEMPLATE

pytestmark = pytest.mark.usefixtures("surroundings")

RL = RLConfig(
    environment="test_letters", samples=4, max_new_tokens=28, max_turn_tokens=7, max_turns=3
)
# Few, so that turns end often.
WORDS = ["<end>", "<unk>", *"abmqsuvwz"]
TRAIN = TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=2)
STEPS = 4


@register_environment("test_letters")
class Letters:
    """Two turns, or more for those without words; the reward is the share of words before m."""

    calls = 0
    ends_at = 0

    def start(self, record: Any) -> list[dict[str, Any]]:
        self.turns = 0
        assert record["answer"].strip() == "z"
        return [{"role": "user", "content": record["prompt"]}]

    def step(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | float:
        Letters.calls += 1
        if Letters.calls == Letters.ends_at:
            raise KeyboardInterrupt
        self.turns += 1
        words = messages[-1]["content"].split()
        if self.turns < 2 or not words:
            return [{"role": "tool", "content": " ".join(words[:2]) or "q"}]
        return sum(word < "m" for word in words) / len(words)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.on_named_devices(tmp_path_factory.mktemp("new") / "cache"):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The settings of a run on a model that ends its turns often."""
    folder = tmp_path_factory.mktemp("place")
    hf = tiny.HF | {"vocab_size": len(WORDS)}
    tiny.make_model(folder / "model", hf, tiny.word_tokenizer(WORDS, TEMPLATE))
    config = tiny.make_config(folder, rl=RL, train=TRAIN, steps=STEPS, mechanisms=())
    data = replace(config.data, max_length=0)
    return replace(config, data=data, optimizer=OptimizerConfig(learning_rate=0.05))


@pytest.fixture(scope="module")
def whole(place: RunConfig) -> RunConfig:
    """A run that was left alone."""
    run(place)
    return place


def adapter(config: RunConfig) -> dict[str, np.ndarray]:
    return load_file(Path(config.output) / "adapter/adapter_model.safetensors")


def same_run(config: RunConfig, other: RunConfig, atol: float = 0.0) -> None:
    assert tiny.logged(config.output, "reward") == tiny.logged(other.output, "reward")
    first, second = adapter(config), adapter(other)
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], rtol=0, atol=atol, err_msg=name)


def test_a_run_with_an_environment_shows_all_turns(whole: RunConfig) -> None:
    folder = Path(whole.output)
    logged = [line for line in tiny.lines(folder) if "loss" in line]
    assert all(1 <= line["turns"] <= RL.max_turns for line in logged)
    assert 0 < logged[0]["reward_test_letters"] == logged[0]["reward"]
    assert all(line["mismatch"] < 1e-4 for line in logged)  # log-probabilities of every turn
    assert {line["template_match"] for line in logged} == {1.0}  # a word is a token
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    samples = [sample for line in lines for sample in json.loads(line)["samples"]]
    several = [sample for sample in samples if len(sample["turns"]) > 1]
    assert len(several) > len(samples) / 4
    for sample in several:
        authors = [turn["author"] for turn in sample["turns"]]
        assert authors == (["model", "environment"] * 9)[: len(authors)]
        assert sample["turns"][1]["text"].startswith("w ")
        assert sample["turns"][1]["text"].endswith("<end> v")
    report = (folder / "report.html").read_text()
    assert "environment: w " in report
    assert report.count("<dt>test_letters</dt>") == len(samples)


class Recorded:
    """Keeps the samples of a run, and the batches of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[dict[str, np.ndarray]] = []
        self.samples: list[rollout.Samples] = []

        def recorded(ids: Any, samples: rollout.Samples, *rest: Any, **options: Any) -> Any:
            self.samples.append(samples)
            self.batches.append(sample_batch(ids, samples, *rest, **options))
            return self.batches[-1]

        monkeypatch.setattr("nalora_jax.kinds.rl.kind.sample_batch", recorded)


def test_messages_of_the_environment_are_never_trained_on(place, tmp_path, monkeypatch):
    recorded = Recorded(monkeypatch)
    run(replace(place, steps=2, output=str(tmp_path / "run")))
    for batch, samples in zip(recorded.batches, recorded.samples, strict=True):
        assert batch["loss_weights"].sum() == samples.written.sum() < samples.lengths.sum()
        for row, weights in enumerate(batch["loss_weights"]):
            count = samples.lengths[row]
            start = int(batch["segment_ids"][row].sum()) - count  # of the sample
            targets = batch["targets"][row]
            of_sample = slice(start - 1, start - 1 + count)
            np.testing.assert_array_equal(targets[of_sample], samples.tokens[row, :count])
            np.testing.assert_array_equal(weights[of_sample] == 0, samples.inserted[row, :count])
            assert weights.sum() == weights[of_sample].sum()
        starts = samples.inserted[:, 1:] & ~samples.inserted[:, :-1]
        assert starts.sum() == (samples.turns[:, 0] - 1).sum() > 0
        assert set(samples.tokens[:, 1:][starts].tolist()) == {WORDS.index("w")}


class EndsInUpdate(Callback):
    """Ends the process after the first step."""

    def on_log(self, step: int, record: Any) -> None:
        raise KeyboardInterrupt


def test_a_killed_run_equals_the_uninterrupted_one(whole, place, tmp_path, monkeypatch):
    """After the first step, and within a step of an environment."""
    config = replace(place, output=str(tmp_path / "run"), resume="auto")
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[EndsInUpdate()])
    monkeypatch.setattr(Letters, "ends_at", Letters.calls + 45)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(Letters, "ends_at", 0)
    run(config)
    same_run(config, whole)
    samples = [(Path(one.output) / "rollouts.jsonl").read_bytes() for one in (whole, config)]
    assert samples[0] == samples[1]


def test_a_server_draws_the_turns_and_is_asked_for_none_twice(place, tmp_path):
    with serving(Path(place.model)) as server:
        rl = replace(RL, servers=(server.url,), server_seconds=20.0)
        full = replace(place, rl=rl, output=str(tmp_path / "whole"))
        run(full)
        asked = len(server.samples)
        lines = [line for line in tiny.lines(full.output) if "loss" in line]
        turns = sum(line["turns"] for line in lines) * TRAIN.batch_size
        assert asked == round(turns) > STEPS * TRAIN.batch_size
        assert all(line["mismatch"] < 1e-4 and abs(line["weight"] - 1) < 1e-4 for line in lines)
        server.samples.clear()
        config = replace(full, output=str(tmp_path / "killed"))

        class EndsAt(Callback):
            def on_log(self, step: int, record: Any) -> None:
                if step == 3:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(config, callbacks=[EndsAt()])  # the last checkpoint is of step 2
        run(replace(config, resume=True))
        assert len(server.samples) == asked
    same_run(full, config)


def test_first_turns_are_drawn_ahead(place, tmp_path):
    with serving(Path(place.model)) as server:
        rl = replace(RL, servers=(server.url,), server_seconds=20.0, staleness=1)
        config = replace(place, rl=rl, output=str(tmp_path / "run"))
        run(config)
    steps = [line for line in tiny.lines(config.output) if "staleness" in line]
    assert steps[-1]["staleness"] == 1


def test_pass_at_k_is_the_share_of_subsets_with_a_sample_that_passes(place, tmp_path) -> None:
    for passed, samples, k in (([0, 2, 5], 5, 1), ([0, 2, 5], 5, 3), ([1], 6, 4)):
        shares = []
        for count in passed:
            subsets = list(combinations([1] * count + [0] * (samples - count), k))
            shares.append(np.mean([max(subset) for subset in subsets]))
        assert math.isclose(pass_at(np.array(passed), samples, k), np.mean(shares))
    for name, rl in (
        ("turns", replace(RL, pass_at=(1, 4), pass_reward=0.5)),
        ("turn", RLConfig(rewards=("regex:pattern=[a-h]",), samples=4, max_new_tokens=4, pass_at=(1, 4))),
    ):  # fmt: skip
        train = replace(TRAIN, eval_every=1)
        config = replace(place, steps=2, rl=rl, train=train, output=str(tmp_path / name))
        result = run(config)
        evaluations = [line["eval"] for line in tiny.lines(result.folder) if "eval" in line]
        assert len(evaluations) >= 3
        for values in evaluations:
            assert 0 <= values["pass_1"] <= values["pass_4"] <= 1
        assert evaluations[0]["pass_4"] > 0


def test_held_out_conversations_are_in_the_report(whole: RunConfig) -> None:
    evaluations = [line["eval"] for line in tiny.lines(whole.output) if "eval" in line]
    samples = [sample for values in evaluations for sample in values.get("samples", [])]
    assert samples
    for sample in samples:
        assert sample["prompt"].startswith("u ")
        assert sample["answer"].startswith("assistant:")
        assert sample["expected"] == "z"
    assert any("tool: " in sample["answer"] for sample in samples)


CHATS = {
    "messages": {"messages": [{"role": "user", "content": "a b"}], "answer": "z"},
    "prompt": {"prompt": [{"role": "user", "content": "a b"}], "completion": "z"},
    "with the answer": {
        "messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "z"}]
    },
    "text": {"prompt": "a b", "completion": "z"},
}


@pytest.mark.parametrize(
    ("form", "system"),
    [("messages", ""), ("prompt", ""), ("messages", "h"), ("with the answer", "h"), ("text", "h")],
)
def test_chats_are_prompts_after_the_system_prompt(form, system, place, tmp_path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text((json.dumps(CHATS[form]) + "\n") * 40)
    rl = RLConfig(rewards=("exact",), samples=4, max_new_tokens=3, system_prompt=system)
    options = replace(place.data, dataset=str(data), chat=form == "text")
    config = replace(place, steps=1, rl=rl, data=options, output=str(tmp_path / "run"))
    result = run(config)
    line = json.loads((result.folder / "rollouts.jsonl").read_text().splitlines()[0])
    start = "s h<end> " if system else ""
    assert line["prompt"] == f"{start}u a b<end> v "
    evaluations = [line["eval"] for line in tiny.lines(result.folder) if "eval" in line]
    assert evaluations[0]["samples"][0]["expected"] == "z"


def test_prompts_that_are_no_chats_are_named(place, tmp_path) -> None:
    system = RLConfig(rewards=("exact",), samples=4, max_new_tokens=3, system_prompt="h")
    config = replace(place, rl=system, output=str(tmp_path / "run"))
    with pytest.raises(NaloraError, match="a chat, since --rl.system-prompt .* --data.chat"):
        run(config)
    data = tmp_path / "chats.jsonl"
    record = {"messages": [{"role": "assistant", "content": "a"}]}
    data.write_text((json.dumps(record) + "\n") * 40)
    config = replace(config, data=replace(place.data, dataset=str(data)))
    with pytest.raises(NaloraError, match="expected a chat of texts with a message before"):
        run(config)


@pytest.mark.parametrize(
    ("rl", "message"),
    [
        (RLConfig(rewards=("exact",), max_turns=3), "--rl.max-turns: expected 8 with no --rl.environment"),
        (RLConfig(rewards=("exact",), max_turn_tokens=3), "--rl.max-turn-tokens: expected 0 with no"),
        (replace(RL, pass_at=(0,)), "--rl.pass-at: expected numbers of samples, at least 1"),
        (replace(RL, rewards=("exact",), reward_weights=(1.0,)), "--rl.reward-weights: expected 2, one a reward"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(rl, message, place) -> None:
    with pytest.raises(NaloraError, match=message):
        check_run_config(replace(place, rl=rl))
