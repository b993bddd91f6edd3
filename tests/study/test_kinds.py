"""Studies of preference pairs, with methods on different numbers of devices, and of runs with
rewards."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from nalora_jax.__main__ import main
from nalora_jax.evaluate.generate import Generator
from nalora_jax.kinds import preference
from nalora_jax.kinds.rl import kind, rewards
from nalora_jax.models.decoder import Decoder
from nalora_jax.study.planned_runs import list_runs
from nalora_jax.study.protocol import read_protocol
from nalora_jax.study.records import Records
from nalora_jax.study.resources import Resources
from nalora_jax.study.study_report import render_results
from tests.study.conftest import assert_starts_alone, write_study

FEW_RUNS = """
models = [BASE]
extend = 0
tuning_seeds = [0]
test_seeds = [1]
evaluate_every = 4
"""
PAIRS = """
question = "Does the adapter prefer z?"
baseline = "b_zero"
rates = [2e-2]

[run]
steps = 4
preference.loss = "dpo"
SETTINGS
[methods.b_zero]

[methods.b_zero_2]
about = "on two devices"
settings.mesh.data = 2
"""


def test_a_study_of_preference_pairs_compares_initializations_and_numbers_of_devices(
    base: Path, questions: Path, tmp_path: Path
) -> None:
    folder = write_study(tmp_path, base, questions, FEW_RUNS + PAIRS)
    assert main(["study", "run", str(folder), "--together", "4"]) == 0
    protocol, records = read_protocol(folder), Records(folder).read()
    by = {(r["stage"], r["method"]): r for r in records.values()}
    assert len(by) == 4
    for record in by.values():
        assert record["curve"][0] == {
            "step": 0,
            "loss": pytest.approx(math.log(2)),
            "accuracy": 0.0,
        }
        assert abs(record["validation"]["loss"] - math.log(2)) > 1e-4
    for stage in ("tune", "test"):  # the same pairs on one and on two devices
        losses = {m: by[stage, m]["training"][-1]["loss"] for m in protocol.methods}
        assert losses["b_zero_2"] == pytest.approx(losses["b_zero"], rel=1e-5)
        assert len({by[stage, m]["data"] for m in protocol.methods}) == 1
    assert by["tune", "b_zero"]["data"] != by["test", "b_zero"]["data"]
    assert len({record["source"] for record in by.values()}) == 1
    text = render_results(protocol, records)
    assert "nats per pair" in text
    assert "1 - accuracy" in text
    tuned = next(run for run in list_runs(protocol, records) if run.cell.method == "b_zero")
    assert_starts_alone(preference, tuned, Resources(protocol))


EARLY_WORDS = """
from nalora_jax.kinds.rl.rewards import register_reward
from tests.study.test_kinds import early_words

register_reward("early_words")(lambda prompt, completion, record: early_words(completion))
"""
WITH_REWARDS = """
question = "Does the model name letters before m?"
baseline = "lora"
rates = [1e-2]
metric = "reward"
imports = ["early_words.py"]

[run]
steps = 8
rl = {rewards = ["early_words"], samples = 2, max_new_tokens = 4, updates = 2}
SETTINGS
PROBE
[methods.lora]
"""


def early_words(answer: str) -> float:
    """The share of words before m."""
    words = answer.split()
    return sum(word < "m" for word in words) / max(len(words), 1)


def test_a_study_of_rewards_trains_and_measures_as_a_run_does(
    base: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        rewards._REWARDS, "_values", dict(rewards._REWARDS._values)
    )  # forgets early_words
    (tmp_path / "early_words.py").write_text(EARLY_WORDS)
    folder = write_study(tmp_path, base, questions, FEW_RUNS + WITH_REWARDS)
    assert main(["study", "run", str(folder)]) == 0
    protocol, records = read_protocol(folder), Records(folder).read()
    first, resources = list_runs(protocol, {})[0], Resources(protocol)
    assert_starts_alone(kind, first, resources)
    loaded, items = (
        resources.subject(first.config).model(first.config),
        resources.validation_items(first),
    )
    generator = Generator(Decoder(loaded.config), {"params": loaded.params}, loaded.tokenizer)
    answers = generator.generate([prompt.ids for prompt in items.asked], max_new_tokens=4)
    tuned, tested = (
        next(r for r in records.values() if r["stage"] == stage) for stage in ("tune", "test")
    )
    assert tuned["curve"][0]["reward"] == pytest.approx(
        np.mean([early_words(answer) for answer in answers])
    )
    assert tuned["validation"]["n"] == len(answers) == 20
    measured = tested["test"]
    assert measured["loss"] == pytest.approx(1 - measured["reward"])
    assert 0 <= measured["pass_1"] <= measured["pass_8"] <= 1
    assert measured["divergence"] > 0
    assert tested["probes"]["z_again"]["loss"] != tested["probes"]["z_again"]["before"]
    assert "1 - reward" in render_results(protocol, records)
