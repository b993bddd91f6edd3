"""Runs that continue an adapter on disk: PEFT trains, this library continues, PEFT continues."""

from __future__ import annotations

import json
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

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
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


def their_base(config: RunConfig) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)


def our_logits(folder: str) -> np.ndarray:
    model = load(folder, dtype="float32")
    return np.asarray(tiny.logits_of(model.module, model.variables, jnp.asarray(TOKENS)))


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def their_steps(model: Any, config: RunConfig, steps: int, rate: float = 5e-3) -> list[float]:
    """Trains PEFT's model on the training questions; returns the loss before each step and at the end."""
    lines = Path(config.data.dataset).read_text().splitlines()[:48]
    ids = {word: index for index, word in enumerate(tiny.WORDS)}
    words = [[*(json.loads(line)["prompt"] + " z").split(), "<end>"] for line in lines]
    tokens = torch.tensor([[ids[word] for word in row] for row in words])
    labels = tokens.clone()
    labels[:, :2] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    losses = []
    for _ in range(steps + 1):
        loss = model(tokens, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if len(losses) <= steps:
            optimizer.step()
    return losses


def test_an_adapter_goes_from_peft_to_a_run_and_back(config: RunConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **ADAPTER)
    theirs = peft.get_peft_model(their_base(config), settings)
    first = their_steps(theirs, config, 5)
    theirs.save_pretrained(tmp_path / "theirs")
    # ---------------------------------------------------------------- from PEFT
    run = replace(config, adapter=str(tmp_path / "theirs"), output=str(tmp_path / "run"))
    np.testing.assert_allclose(our_logits(run.adapter), their_logits(theirs), rtol=2e-4, atol=2e-4)
    # ---------------------------------------------------------------- steps here
    result = training.run(run)
    # ---------------------------------------------------------------- back to PEFT
    back = peft.PeftModel.from_pretrained(their_base(config), str(result.adapter), is_trainable=True)
    np.testing.assert_allclose(our_logits(run.output), their_logits(back), rtol=2e-4, atol=2e-4)
    files = [load_file(f / TENSORS) for f in (tmp_path / "theirs", result.adapter)]
    assert files[0].keys() == files[1].keys()
    assert {n: t.shape for n, t in files[0].items()} == {n: t.shape for n, t in files[1].items()}
    then = their_steps(back, config, 5, 1e-3)
    assert first[0] > first[-1] > then[0] > then[-1]


@pytest.fixture(scope="module")
def earlier(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run of this library, which others continue."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    rules = (LoRARule("gate_proj", 4), LoRARule("ffn", 2, 8.0))
    lora = LoRAConfig(rules, dropout=0.1)
    return training.run(replace(config, steps=4, lora=lora, output=str(folder)))


def test_a_run_resumes_from_its_checkpoint_though_its_adapter_has_changed(
    config: RunConfig, earlier: RunResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nalora_jax")
    shutil.copytree(earlier.folder, tmp_path / "earlier")
    train = TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=3)
    run = replace(
        config, steps=6, train=train, adapter=str(tmp_path / "earlier"), output=str(tmp_path / "run")
    )
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


def test_words_of_the_command_line_about_an_adapter(
    config: RunConfig, earlier: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
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
