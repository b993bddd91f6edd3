"""Reward models: a whole run, PEFT's model, TRL's loss on the exported rewards, and its errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from nalora_jax.__main__ import main
from nalora_jax.cli.training import run
from nalora_jax.config import DataConfig, PreferenceConfig, RunConfig, TrainConfig
from nalora_jax.data.pooled_texts import held_out_texts, pooled_data
from nalora_jax.data.source import RecordsSource
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.pooled_evaluation import RewardPairEvaluator
from nalora_jax.kinds import reward
from nalora_jax.kinds.record import check_run_config
from nalora_jax.loading.adapted import load
from nalora_jax.weights.peft_config import TENSORS_NAME
from tests import tiny

FORM = reward.PairTexts(PreferenceConfig(), "margin")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on pairs whose chosen answer is always z, some with a margin."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(80):
        prompt = " ".join(rng.choice(list("abcdefgh"), 2))
        record = {"prompt": prompt, "chosen": " z", "rejected": " y x"}
        if number % 2:
            record["margin"] = 0.5
        lines.append(json.dumps(record))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    splits = {"train_split": "train[:80%]", "eval_split": "train[80%:]"}
    config = tiny.make_config(
        folder,
        steps=12,
        kind="reward:center=0.01",
        data=DataConfig(
            str(folder / "pairs.jsonl"), max_length=16, eval_limit=8, select_limit=4, **splits
        ),
        train=TrainConfig(batch_size=8, log_every=1, eval_every=6, save_every=6),
    )
    with tiny.on_named_devices(folder / "cache"):
        yield config, run(config)


def test_a_run_learns_which_answer_is_preferred(finished):
    _, result = finished
    first, *_, last = (line for line in tiny.lines(result.folder) if "loss" in line)
    assert last["loss"] < first["loss"]
    assert last["margin"] > first["margin"]
    assert result.after["accuracy"] == 1.0
    assert result.after["margin"] > result.before["margin"]


def test_eval_repeats_the_result(finished, tmp_path):
    _, result = finished
    out = tmp_path / "values.json"
    assert main(["eval", str(result.folder), "--output", str(out)]) == 0
    values = json.loads(out.read_text())
    assert values["margin"] == pytest.approx(result.after["margin"], rel=1e-6)


def test_a_stopped_run_resumes_to_the_bit(finished, tmp_path):
    config, whole = finished
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "12")
    resumed = run(replace(config, output=str(folder), resume="auto"))
    ours = load_file(resumed.adapter / TENSORS_NAME)
    for name, value in load_file(whole.adapter / TENSORS_NAME).items():
        np.testing.assert_array_equal(ours[name], value)


@pytest.mark.filterwarnings("default")  # of torch, transformers and PEFT
def test_rewards_and_losses_are_those_of_peft_s_model_by_trl_s_formula(finished):
    import peft
    import transformers

    config, result = finished
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        config.model, num_labels=1, dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(base, result.adapter).eval()
    records = [
        {"prompt": "a b", "chosen": " z", "rejected": " y x", "margin": 0.5},
        {"prompt": "c", "chosen": " y x", "rejected": " z"},
    ]
    source = RecordsSource("pairs", records)
    ours = load(config.model, adapter=result.adapter, dtype="float32")
    tokenizer = ours.base.tokenizer
    data = pooled_data(source, DataConfig(max_length=16), tokenizer, FORM, batch_size=1)
    np.testing.assert_array_equal(data.labels, [[0.5], [0.0]])
    items = held_out_texts(RecordsSource("pairs", records * 2), DataConfig(), tokenizer, FORM, 64)[
        0
    ]
    evaluated = RewardPairEvaluator(ours.module, items, "last")
    for item, record in zip(items, evaluated.records(ours.base.params, ours.lora), strict=True):
        assert all(ids[-1] == tokenizer.eos_id for ids in item.ids)
        with torch.no_grad():
            chosen, rejected = (
                model(torch.tensor(ids[None]).long()).logits[0, 0] for ids in item.ids
            )
        assert record["reward_of_chosen"] == pytest.approx(chosen.item(), abs=1e-5)
        assert record["reward_of_rejected"] == pytest.approx(rejected.item(), abs=1e-5)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected - float(item.labels[0]))
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_a_model_without_a_reward_head_is_not_evaluated(finished):
    config, _ = finished
    with pytest.raises(NaloraError, match="an adapter with a reward head"):
        reward.KIND.evaluate(load(config.model, dtype="float32"), config, None, False)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a", "chosen": " b"}, "a field 'rejected'"),
        ({"prompt": "a", "chosen": " b", "rejected": " b"}, "two answers that differ"),
        ({"prompt": "a", "chosen": " b", "rejected": " c", "margin": "x"}, "margin: expected a number"),
    ],
)  # fmt: skip
def test_broken_pairs_name_their_record(record, said):
    good = {"prompt": "a", "chosen": " b", "rejected": " c"}
    source = RecordsSource("pairs", [good, record])
    with pytest.raises(NaloraError, match=f"pairs, record 1.*{said}"):
        pooled_data(source, DataConfig(max_length=16), tiny.word_tokenizer(), FORM, batch_size=1)


def test_a_preference_loss_is_refused():
    config = RunConfig(kind="reward", preference=PreferenceConfig("dpo"))
    with pytest.raises(NaloraError, match="--preference.loss.*--kind reward"):
        check_run_config(config)
