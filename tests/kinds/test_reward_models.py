"""Reward models as rewards of samples: transformers' scores, resumption, forms of texts, errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from nalora_jax.cli.training import run
from nalora_jax.config import DataConfig, RLConfig, TrainConfig
from nalora_jax.data.tokenize import tokenize
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.rl.reward_evaluation import metric_names
from nalora_jax.kinds.rl.reward_models import ModelReward
from nalora_jax.kinds.rl.rewards import make_reward
from nalora_jax.train.callbacks import Callback
from nalora_jax.weights.peft_config import TENSORS_NAME
from tests import tiny

CHAT = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"


def train_reward_model(folder, **data):
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(60):
        prompt = " ".join(rng.choice(list("abcdefgh"), 2))
        lines.append(json.dumps({"prompt": prompt, "chosen": " z", "rejected": " y x"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    splits = {"train_split": "train[:80%]", "eval_split": "train[80%:]"}
    config = tiny.make_config(
        folder,
        steps=6,
        kind="reward",
        output=str(folder / f"reward{len(data)}"),
        data=DataConfig(
            str(folder / "pairs.jsonl"), max_length=24, eval_limit=6, select_limit=4, **splits, **data
        ),
        train=TrainConfig(batch_size=8, log_every=3, eval_every=0, save_every=0),
    )  # fmt: skip
    run(config)
    return config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The settings of a finished run of a reward model."""
    folder = tmp_path_factory.mktemp("model")
    tiny.make_model(folder / "model", tokenizer=tiny.word_tokenizer(chat_template=CHAT))
    with tiny.on_named_devices(folder / "cache"):
        yield train_reward_model(folder)


def policy_config(model, folder):
    """A run whose samples are scored by the model and by their length."""
    rewards = (f"model:{model.output}", "length:limit=2")
    rl = RLConfig(rewards=rewards, samples=4, max_new_tokens=6, updates=2)
    train = TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=3)
    config = tiny.make_config(folder, model=model.model, rl=rl, train=train, steps=6, mechanisms=())
    return replace(config, data=replace(config.data, max_length=0))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A run that was left alone."""
    config = policy_config(model, tmp_path_factory.mktemp("whole"))
    return config, run(config)


@pytest.mark.filterwarnings("default")  # of torch, transformers and PEFT
def test_rewards_of_a_run_are_those_of_transformers_and_peft(model, whole):
    import peft
    import transformers

    config, result = whole
    adapter = Path(model.output) / "adapter"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        model.model, num_labels=1, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.model)
    lines = map(json.loads, (result.folder / "rollouts.jsonl").read_text().splitlines())
    values = []
    for line in lines:
        for sample in line["samples"]:
            text = line["prompt"] + sample["completion"]
            ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                expected = theirs(torch.tensor([ids])).logits.item()
            value = sample["rewards"][config.rl.rewards[0]]
            assert value == pytest.approx(expected, abs=1e-5)
            values.append(value)
    assert len(values) >= 24
    assert np.std(values) > 1e-3
    logged = next(line for line in tiny.lines(result.folder) if "loss" in line)
    assert logged["reward_model_std"] > 0
    assert "reward_length" in logged
    assert "reward_model" in result.after


class EndsInUpdate(Callback):
    """Ends the process after the first step."""

    def on_log(self, step, record):
        raise KeyboardInterrupt


def test_a_killed_run_resumes_to_the_bit(model, whole, tmp_path):
    config, result = whole
    config = replace(config, output=str(tmp_path / "run"), resume="auto")
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[EndsInUpdate()])
    again = run(config)
    ours = load_file(again.adapter / TENSORS_NAME)
    for name, value in load_file(result.adapter / TENSORS_NAME).items():
        np.testing.assert_array_equal(ours[name], value)
    assert (again.folder / "rollouts.jsonl").read_bytes() == (
        result.folder / "rollouts.jsonl"
    ).read_bytes()


def test_a_reward_does_not_depend_on_other_samples(model):
    reward = ModelReward(model.output)
    completions = [" z", " y x", " z " * 18, " q r s"]
    prompts = ["a b", "c", "d", "e f"]
    together = reward.score_samples(prompts, completions, [{}] * 4, ["r"] * 4)
    for row in range(4):
        (alone,) = reward.score_samples([prompts[row]], [completions[row]], [{}], ["r"])
        assert alone == together[row]


def test_samples_are_read_in_the_form_of_the_training(model, tmp_path, monkeypatch):
    """Chats by the model's template: of records, of several turns, and of a model that was trained
    on prompts as chats."""
    seen = []

    def keep(texts, tokenizer, *, end):
        seen.extend(text.text for text in texts)
        return tokenize(texts, tokenizer, end=end)

    module = "nalora_jax.kinds.rl.reward_models"

    monkeypatch.setattr(f"{module}.tokenize", keep)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    reward = ModelReward(model.output)
    reward.score_samples(["u a"], ["c"], [{"messages": turns}], ["r"])
    reward.score_samples(["u a"], ["c"], [{}], ["r"], [[*turns, {"role": "user", "content": "d"}]])
    reward.score_samples(["a "], ["c"], [{"prompt": "ignored"}], ["r"])
    chats = train_reward_model(Path(model.output).parent, chat=True)
    ModelReward(chats.output).score_samples(["u a a "], [" c"], [{"prompt": "a"}], ["r"])
    assert seen == ["u a a c ", "u a a b u d ", "a c", "u a a c "]


def test_a_folder_without_a_reward_model_is_refused(model, whole, tmp_path):
    with pytest.raises(NaloraError, match="nothing: expected a folder with adapter_config.json"):
        make_reward(f"model:{tmp_path / 'nothing'}")
    _, result = whole
    with pytest.raises(NaloraError, match="an adapter with a reward head"):
        ModelReward(str(result.folder)).score_samples(["a"], ["b"], [{}], ["r"])


def test_a_sample_beyond_the_context_names_its_record(model):
    with pytest.raises(NaloraError, match=r"record 3: expected at most 64 tokens.*found 81"):
        ModelReward(model.output).score_samples(["a"], [" b" * 79], [{}], ["record 3"])


def test_its_metric_has_no_path():
    rl = RLConfig(rewards=("model:runs/a=b/reward", "model:other"))
    assert metric_names(rl) == ["reward_model", "reward_model_2"]
