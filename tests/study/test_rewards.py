"""Studies of runs with rewards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nalora_jax.__main__ import main
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate import Generator
from nalora_jax.models.decoder import Decoder
from nalora_jax.study.plan import wanted
from nalora_jax.study.progress import RunInProgress
from nalora_jax.study.protocol import read_protocol
from nalora_jax.study.records import Records
from nalora_jax.study.report import render_results
from nalora_jax.study.resources import Resources
from nalora_jax.train import rewards
from nalora_jax.train.kinds import rl
from tests.study.conftest import assert_starts_alone, write_study

REWARD = """
from nalora_jax.train.rewards import register_reward
from tests.study.test_rewards import early_words

register_reward("early_words")(lambda prompt, completion, record: early_words(completion))
"""


def early_words(answer: str) -> float:
    """The share of words before m."""
    words = answer.split()
    return sum(word < "m" for word in words) / max(len(words), 1)


PROTOCOL = """
question = "Does the model name letters before m?"
models = [BASE]
baseline = "lora"
rates = [1e-2]
extend = 0
tuning_seeds = [0]
test_seeds = [1]
metric = "reward"
evaluate_every = 4
imports = ["early_words.py"]

[run]
steps = 8
rl = {rewards = ["early_words"], samples = 2, max_new_tokens = 4, updates = 2}
SETTINGS
PROBE
[methods.lora]
"""


@pytest.fixture
def rewards_study(base: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rewards._REWARDS, "_values", dict(rewards._REWARDS._values))  # forgets early_words
    (tmp_path / "early_words.py").write_text(REWARD)
    return write_study(tmp_path, base, questions, PROTOCOL)


def test_a_study_of_rewards_trains_and_measures_as_a_run_does(rewards_study: Path) -> None:
    assert main(["study", "run", str(rewards_study)]) == 0
    protocol = read_protocol(rewards_study)
    records = Records(rewards_study).read()
    tuned, tested = (next(r for r in records.values() if r["stage"] == stage) for stage in ("tune", "test"))
    config = protocol.config(
        *[tuned[name] for name in ("model", "task", "method")], tuned["rate"], tuned["seed"]
    )
    first, resources = wanted(protocol, {})[0], Resources(protocol)
    assert_starts_alone(rl, first, resources)
    loaded, items = resources.subject(config).model(config), resources.validation_items(first)
    generator = Generator(Decoder(loaded.config), {"params": loaded.params}, loaded.tokenizer)
    answers = generator.generate([prompt.ids for prompt in items.asked], max_new_tokens=4)
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


def test_a_policy_equal_to_the_base_has_no_divergence(rewards_study: Path) -> None:
    protocol = read_protocol(rewards_study)
    first = wanted(protocol, {})[0]
    resources = Resources(protocol)
    progress = RunInProgress(first, resources, rewards_study / "x.npz")
    values = progress._measured(resources.start(first, progress.data).lora, "validation", whole=True)
    assert values["divergence"] == pytest.approx(0, abs=1e-9)


def test_evaluations_within_a_rollout_are_refused(rewards_study: Path) -> None:
    path = rewards_study / "protocol.toml"
    path.write_text(path.read_text().replace("evaluate_every = 4", "evaluate_every = 3"))
    with pytest.raises(NaloraError, match=r"evaluate_every: expected a multiple of rl.updates, 2"):
        read_protocol(path)
