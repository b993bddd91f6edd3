"""Runs that continue an adapter on disk, of PEFT or of an earlier run."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from nalora_jax.__main__ import main
from nalora_jax.cli import training
from nalora_jax.config import LoRAConfig, LoRARule, OptimizerConfig, RunConfig, TrainConfig
from nalora_jax.train.adapted import load
from nalora_jax.train.run import RunResult
from tests import tiny

pytestmark = pytest.mark.filterwarnings("default")  # of torch, transformers and PEFT

# DoRA, ranks of single layers, and trained rows of the embedding.
ADAPTER = {
    "r": 4,
    "lora_alpha": 6,
    "use_dora": True,
    "rank_pattern": {"up_proj": 2, "layers.1.mlp.down_proj": 3},
    "alpha_pattern": {"up_proj": 5},
    "target_modules": ["gate_proj", "up_proj", "down_proj", "o_proj"],
    "trainable_token_indices": {"embed_tokens": [3, 27]},
}
TENSORS = "adapter_model.safetensors"
TOKENS = np.array([[2, 9, 27, 0, 4, 8, 27, 0]])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("adapters")
    with tiny.on_named_devices(folder / "cache"):
        yield tiny.make_config(
            folder,
            steps=20,
            lora=LoRAConfig(),
            mechanisms=(),
            optimizer=OptimizerConfig(learning_rate=5e-3),
            train=TrainConfig(batch_size=8, log_every=10, eval_every=0, save_every=0),
        )


def test_an_adapter_goes_from_peft_to_a_run_and_back(config: RunConfig, tmp_path: Path) -> None:
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))

    def their_base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)

    def assert_equal_logits(ours: str, theirs: Any) -> None:
        model = load(ours, dtype="float32")
        logits = np.asarray(tiny.logits_of(model.module, model.variables, jnp.asarray(TOKENS)))
        with torch.no_grad():
            expected = theirs(torch.tensor(TOKENS)).logits.numpy()
        np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)

    torch.manual_seed(0)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **ADAPTER)
    theirs = peft.get_peft_model(their_base(), settings)
    theirs.save_pretrained(tmp_path / "theirs")
    run = replace(config, adapter=str(tmp_path / "theirs"), output=str(tmp_path / "run"))
    assert_equal_logits(run.adapter, theirs)
    result = training.run(run)
    assert result.after["loss"] < result.before["loss"]
    back = peft.PeftModel.from_pretrained(their_base(), str(result.adapter), is_trainable=True)
    assert_equal_logits(run.output, back)
    shapes = [
        {name: tensor.shape for name, tensor in load_file(folder / TENSORS).items()}
        for folder in (tmp_path / "theirs", result.adapter)
    ]
    assert shapes[0] == shapes[1]


@pytest.fixture(scope="module")
def earlier(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run of this library, which others continue."""
    lora = LoRAConfig((LoRARule("gate_proj", 4), LoRARule("ffn", 2, 8.0)), dropout=0.1)
    folder = str(tmp_path_factory.mktemp("earlier") / "run")
    return training.run(replace(config, steps=4, lora=lora, output=folder))


def test_a_run_resumes_from_its_checkpoint_though_its_adapter_has_changed(
    config, earlier, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "nalora_jax")
    shutil.copytree(earlier.folder, tmp_path / "earlier")
    train = TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=3)
    run = replace(config, steps=6, train=train, adapter=str(tmp_path / "earlier"))
    run = replace(run, output=str(tmp_path / "run"))
    whole = training.run(run)
    # It starts where the earlier run ended.
    np.testing.assert_allclose(whole.before["loss"], earlier.after["loss"], rtol=1e-6)
    trained = load_file(whole.adapter / TENSORS)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    tensors = tmp_path / "earlier" / "adapter" / TENSORS
    tensors.write_bytes(tensors.read_bytes() + b" ")
    resumed = training.run(replace(run, resume=True))
    assert "has changed since the run started from it (SHA-256" in caplog.text
    assert resumed.before == whole.before
    found = load_file(resumed.adapter / TENSORS)
    assert all(np.array_equal(found[name], trained[name]) for name in trained)


def test_words_of_the_command_line_about_an_adapter(config, earlier, capsys):
    """Each in one line, with a way on that exists."""
    adapter, data = str(earlier.adapter), ["--data.dataset", config.data.dataset]
    for words, expected in (
        (["--resume", adapter], f"an adapter, not a run: continue it with --adapter {adapter} and a new"),
        (["--model", adapter, *data], f"found an adapter, or a run with one; train it with --adapter {adapter}"),
        (["--model", str(earlier.folder), *data], f"train it with --adapter {earlier.folder}"),
        (["--adaptor", adapter], "did you mean --adapter?"),
        (["--adapter", adapter, "--lora.no-dora", "--lora.rules", "ffn:8"], "--lora.rules: expected rank 2"),
        (["--adapter", adapter, "--lora.rslora"], "--lora.rslora: expected False, as in the adapter"),
    ):  # fmt: skip
        assert main(["train", *words]) == 2
        assert expected in capsys.readouterr().err
    more = ["--lora.dropout", "0", "--data.train-split", "train[:80%]", "--data.eval-split", "train[80%:]"]
    assert main(["train", "--dry-run", "--adapter", str(earlier.folder), *data, *more, "--all"]) == 0
    printed = capsys.readouterr().out
    assert "dropout: 0.0" in printed
    assert r"- ^layers/\d+/(ffn/gate_proj)$:4:8" in printed
