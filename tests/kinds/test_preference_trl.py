"""The preference loss beside TRL's trainer, on the same batch (TRL is no part of the extra
`test`)."""

from __future__ import annotations

from string import ascii_lowercase

import jax
import numpy as np
import pytest

from nalora_jax.assembly.objectives import NextToken
from nalora_jax.config import DataConfig, LoRARule, PreferenceConfig
from nalora_jax.data.preference_pairs import pair_data
from nalora_jax.data.source import RecordsSource
from nalora_jax.kinds.preference import Preference
from nalora_jax.loading.adapted import load
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.losses import Head
from tests import tiny

trl = pytest.importorskip("trl", reason="TRL is not installed (it is in the extra `bench`)")
pytestmark = pytest.mark.filterwarnings("default")  # of torch, transformers and TRL


def records():
    rng = np.random.default_rng(0)

    def text(low, high):
        return " ".join(rng.choice(list(ascii_lowercase), rng.integers(low, high)))

    sizes = {"prompt": (2, 6), "chosen": (1, 6), "rejected": (1, 6)}
    return [
        {name: " " * (name != "prompt") + text(*size) for name, size in sizes.items()}
        for _ in range(8)
    ]


# Losses of DPOTrainer and the same settings here.
SETTINGS = {
    "sigmoid": {"loss": "dpo"},
    "sigmoid_norm": {"loss": "dpo", "per_token": True},
    "robust": {"loss": "robust", "label_smoothing": 0.2},
    "ipo": {"loss": "ipo"},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_loss_and_rewards_are_trl_s_on_the_same_batch(tmp_path, kind):
    import datasets
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny.make_model(tmp_path / "base")
    adapter = tiny.make_adapter(tmp_path / "adapter", base, [LoRARule("", 4)], shift=0.4)
    model = load(base, adapter=adapter, dtype="float32")

    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    settings = {
        "output_dir": str(tmp_path / "trl"),
        "loss_type": [kind],
        "beta": 0.7,
        "max_length": None,
        "label_smoothing": SETTINGS[kind].get("label_smoothing", 0.0),
    }
    settings |= {"per_device_train_batch_size": 8, "use_cpu": True, "bf16": False, "report_to": []}
    trainer = trl.DPOTrainer(
        model=policy.merge_and_unload(),
        ref_model=AutoModelForCausalLM.from_pretrained(base),
        args=trl.DPOConfig(**settings),
        train_dataset=datasets.Dataset.from_list(records()),
        processing_class=tokenizer,
    )
    (theirs,) = trainer.get_train_dataloader()
    trainer.model.eval()
    expected = float(trainer.compute_loss(trainer.model, theirs))
    logged = trainer._metrics["eval"]

    config = PreferenceConfig(beta=0.7, **SETTINGS[kind])
    source = RecordsSource("pairs", records())
    data = pair_data(source, DataConfig(max_length=64), config, model.base.tokenizer, batch_size=2)
    ids = [row[row != tokenizer.pad_token_id].tolist() for row in theirs["input_ids"].numpy()]
    store = data.store
    mine = [
        store.tokens[a:b].tolist()
        for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)
    ]
    # Without the end token, which is the padding there.
    assert sorted(ids) == sorted(row[:-1] for row in mine)

    # All pairs in one batch of two rows, in one call.
    rows = data.rows_per_epoch
    batches = [data.batch_at(i) for i in range(0, rows, 2)]
    batch = {
        name: np.concatenate([each[name] for each in batches], axis=1)[0][:rows]
        for name in batches[0]
    }
    assert batch["pairs"].sum() == 8
    objective = Preference(NextToken(model.module, Head(transposed=True), Numerics()), config)
    found = objective.loss(model.variables, model.base.params, batch, jax.random.key(0))
    np.testing.assert_allclose(float(found.loss) / 8, expected, rtol=1e-5)
    if not config.per_token:
        for name in ("chosen", "rejected"):
            mean = float(found.measured[f"rewards_{name}"]) / 8
            np.testing.assert_allclose(
                mean, np.mean(logged[f"rewards/{name}"]), rtol=1e-4, atol=1e-5
            )
