"""Rollouts: keys, stored groups, and agreement of generator and training program."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from nalora_jax.assembly.program import next_token
from nalora_jax.config import ComputeConfig, PreferenceConfig, RLConfig
from nalora_jax.data.prompts import PromptRecord
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate.programs import NO_TOKEN
from nalora_jax.kinds.rl.policy import Policy
from nalora_jax.kinds.rl.rollout import Sampler, Samples, _read_stored, sample_batch
from nalora_jax.ops.policy_losses import PolicyLoss
from tests import tiny
from tests.kinds.test_preference import BASE, assembled

SAMPLES, LIMIT = 4, 5
TEXTS = ("a b c", "d", "e f g h", "i j", "k l")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_folder(tiny.make_model(tmp_path_factory.mktemp("model") / "base"))


class Counting:
    """A reward that counts its calls, and fails at a given one."""

    def __init__(self, fails_at: int = 0) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, prompt, completion, record) -> float:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return length_reward(prompt, completion, record)


def length_reward(prompt, completion, record) -> float:
    return len(completion) + record["answer"] / 100


@pytest.fixture(scope="module")
def assembly():
    return assembled(PreferenceConfig("none"))


@pytest.fixture(scope="module")
def lora(assembly):
    return assembly[1].lora


@pytest.fixture(scope="module")
def sampler(assembly, tokenizer) -> Sampler:
    made, _ = assembly
    rewards = (f"{__name__}:length_reward",)
    rl = RLConfig(samples=SAMPLES, max_new_tokens=LIMIT, temperature=0.9, rewards=rewards)
    options = {"prompts": len(TEXTS), "seed": 3, "longest": 6, "rows": 8}
    return Sampler(rl, made.eval_model, made.params, tokenizer, made.mesh, **options)


@pytest.fixture(scope="module")
def asked(tokenizer) -> list[PromptRecord]:
    return [
        PromptRecord(tokenizer.encode(t), t, {"answer": i}, f"file:{i}")
        for i, t in enumerate(TEXTS)
    ]


def test_log_probabilities_of_generator_and_training_agree(sampler, asked, lora) -> None:
    samples = sampler(lora, 0, asked)
    assert samples.tokens.shape == (len(asked) * SAMPLES, LIMIT)
    ids = [prompt.ids for prompt in asked for _ in range(SAMPLES)]
    batch = sample_batch(ids, samples, 6 + LIMIT)
    assert batch["loss_weights"].sum() == samples.lengths.sum()
    text = next_token(BASE, sampler.model, ComputeConfig(dtype="float32"))
    objective = Policy(text, PolicyLoss("grpo", 0.2, 0.2, LIMIT), 0.9)
    variables = {"params": sampler.params, "lora": lora}
    found = objective.log_probs(variables, sampler.params, batch, jax.random.key(0))
    np.testing.assert_allclose(found, batch["sampled"], atol=2e-4)
    assert np.abs(batch["sampled"]).max() > 1


def test_a_rollout_is_a_function_of_seed_step_and_adapter(sampler, tokenizer, asked, lora) -> None:
    first = sampler(lora, 7, asked)
    again = replace(sampler, rows=16)(lora, 7, asked)  # more prompts in a program
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.rewards, again.rewards)
    others = [sampler(lora, 8, asked), sampler(lora, 7, asked, attempt=1)]
    for other in (*others, replace(sampler, seed=4)(lora, 7, asked)):
        assert (first.tokens != other.tokens).mean() > 0.2
    texts = [tokenizer.decode(row[row != NO_TOKEN].tolist()) for row in first.tokens]
    expected = [len(text) + row // SAMPLES / 100 for row, text in enumerate(texts)]
    np.testing.assert_allclose(first.rewards[:, 0], expected)


def test_groups_that_are_complete_are_not_sampled_again(
    sampler, asked, lora, tmp_path, monkeypatch
) -> None:
    """A run is interrupted in the reward of the second program's third sample."""
    folder, whole = tmp_path / "rollouts", sampler(lora, 2, asked)

    def stored(reward: Counting, lora=lora) -> Samples:
        of_step = replace(sampler, folder=folder)
        monkeypatch.setattr(of_step._scorer, "_rewards", [reward])
        return of_step(lora, 2, asked)

    with pytest.raises(KeyboardInterrupt):
        stored(Counting(fails_at=2 * SAMPLES + 3))
    resumed = stored(reward := Counting())
    assert reward.calls == 3 * SAMPLES
    for name in ("tokens", "log_probs", "rewards"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    stored(Counting())  # a damaged file
    stored(reward := Counting(), jax.tree.map(lambda leaf: leaf + 1e-3, lora))  # another adapter
    assert reward.calls == len(asked) * SAMPLES
    assert len(list(folder.iterdir())) == 1


def test_a_damaged_file_of_samples_counts_as_absent(tmp_path):
    file = tmp_path / "step.npz"
    arrays = {"0-tokens": np.arange(40, dtype=np.int32), "0-rewards": np.ones((4, 1))}
    np.savez(file, **arrays)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(whole)
        for place in rng.integers(len(whole), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        file.write_bytes(
            bytes(damaged[: rng.integers(1, len(whole)) if rng.random() < 0.3 else None])
        )
        for name, array in _read_stored(file).items():
            if name in arrays:
                np.testing.assert_array_equal(array, arrays[name])
    assert _read_stored(tmp_path / "absent.npz") == {}


def test_prompts_and_samples_fit_into_the_context_and_before_the_switch_of_longrope(sampler):
    config = sampler.model.config
    for changed in (
        {"max_positions": 6 + LIMIT},
        {"ropes": (replace(config.ropes[0], kind="longrope", max_positions=6 + LIMIT),)},
    ):
        model = sampler.model.clone(config=replace(config, **changed))
        fits = replace(sampler, model=model)
        with pytest.raises(NaloraError, match=f"--rl.max-new-tokens: expected at most {LIMIT - 1}"):
            replace(fits, longest=7)


def test_samples_that_the_limit_cut_can_be_left_out() -> None:
    tokens = np.array([[5, 6, NO_TOKEN], [5, 6, 7]], np.int32)
    samples = Samples.of_one_turn(
        tokens, np.zeros((2, 3), np.float32), np.zeros((2, 1)), np.array([False, True]), np.zeros(2)
    )
    batch = sample_batch([[1, 2], [3]], samples, 6, masks_cut=True)
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 5, 6, 0, 0], [3, 5, 6, 7, 0, 0]])
    np.testing.assert_array_equal(batch["loss_weights"], [[0, 1, 1, 0, 0, 0], [0] * 6])
    assert sample_batch([[1, 2], [3]], samples, 6)["loss_weights"].sum() == 5
