"""Settings of TRL: every value that changes a run is carried over, TRL's defaults too, or named in a comment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nalora_jax.__main__ import main
from nalora_jax.cli.config_files import load_config, settings_of
from nalora_jax.config import LoRARule, OptimizerConfig, RunConfig, check
from nalora_jax.errors import NaloraError
from nalora_jax.train.optimizers import make_schedule
from nalora_jax.weights.trl_settings import DEFAULTS, LORA, RATES, TRL, from_trl, trainer_of
from tests.weights.settings_tables import table_of

DOCS = Path(__file__).parents[2] / "docs"
QV = (LoRARule("attn/q_proj", 16, 32.0), LoRARule("attn/v_proj", 16, 32.0))


def converted(values: dict[str, Any]) -> tuple[RunConfig, str]:
    """The run's config, and all notes."""
    settings, notes = from_trl(values)
    return check(settings_of(settings, Path("mine.yaml"))), "\n".join(notes)


@pytest.mark.trl
def test_every_own_field_of_trl_is_in_the_table() -> None:
    import dataclasses

    import transformers
    import trl

    common = {one.name for one in dataclasses.fields(transformers.TrainingArguments)}
    kinds = (trl.SFTConfig, trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments)
    assert {one.name for kind in kinds for one in dataclasses.fields(kind)} - common <= set(TRL)


@pytest.mark.trl
def test_defaults_are_those_of_trl(tmp_path: Path) -> None:
    import trl

    sft, dpo = trl.SFTConfig(str(tmp_path), bf16=False), trl.DPOConfig(str(tmp_path), bf16=False)
    assert {name: getattr(sft, name) for name in DEFAULTS} == DEFAULTS
    shared = DEFAULTS.keys() - {"packing"}
    assert {name: getattr(dpo, name) for name in shared} == {name: DEFAULTS[name] for name in shared}
    assert {"sft": sft.learning_rate, "dpo": dpo.learning_rate} == RATES
    model = trl.ModelConfig()
    assert {name: getattr(model, name) for name in LORA} == LORA
    same = {
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
    }
    ours = OptimizerConfig()
    assert {name: getattr(sft, name) for name in same} == same
    assert (ours.weight_decay, ours.b1, ours.b2, ours.eps, ours.clip_norm) == tuple(same.values())
    assert (dpo.beta, dpo.disable_dropout, sft.warmup_steps) == (RunConfig().preference.beta, True, 0)


def test_the_page_holds_the_table() -> None:
    assert "\n".join(table_of(TRL)) in (DOCS / "from_trl.md").read_text(encoding="utf-8")


def test_a_file_without_settings_gets_the_defaults_of_trl() -> None:
    config, notes = converted({"model_name_or_path": "a/b", "use_peft": True})
    assert (config.epochs, config.seed, config.data.max_length, config.data.pack) == (3.0, 42, 1024, False)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.final_ratio) == (2e-5, "linear", 0.0)
    assert (optimizer.warmup_share, optimizer.warmup_steps, optimizer.warmup_from_zero) == (0.0, 0, True)
    assert (config.train.batch_size, config.train.accumulate, config.train.eval_every) == (8, 1, 0)
    assert (config.lora.rules, config.lora.dropout, config.preference.loss) == (QV, 0.05, "none")
    for part in (
        "lora_target_modules is not set",
        "data.loss_on is answer",
        "TRL does not evaluate",
        "in float32",
    ):
        assert part in notes


def test_rank_and_alpha_without_modules_are_those_of_pefts_default_modules() -> None:
    config, notes = converted({"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
    assert config.lora.rules == (LoRARule("attn/q_proj", 4, 8.0), LoRARule("attn/v_proj", 4, 8.0))
    assert config.lora.dropout == 0.0
    assert "PEFT's default for most models is q_proj and v_proj" in notes


def test_training_of_all_weights_is_named_as_not_carried_over() -> None:
    config, notes = converted({"max_steps": 5})
    assert (config.lora.rules, config.steps, config.epochs) == (RunConfig().lora.rules, 5, 0.0)
    assert "without use_peft TRL trains all weights" in notes


def test_a_dpo_config_becomes_a_preference_run() -> None:
    values = {
        "use_peft": True,
        "beta": 0.3,
        "loss_type": "sigmoid",
        "max_length": 512,
        "label_smoothing": 0.1,
    }
    config, notes = converted(values)
    assert (config.preference.loss, config.preference.beta, config.preference.per_token) == (
        "dpo",
        0.3,
        False,
    )
    assert (config.preference.label_smoothing, config.data.max_length, config.lora.dropout) == (
        0.0,
        1024,
        0.0,
    )
    assert (config.optimizer.learning_rate, config.epochs) == (1e-6, 3.0)
    assert "label_smoothing is left out: TRL's sigmoid ignores it" in notes
    assert "data.max_length is twice max_length" in notes
    assert "disable_dropout" in notes
    config, _ = converted({"loss_type": ["sigmoid_norm"], "use_peft": True, "disable_dropout": False})
    assert (config.preference.per_token, config.preference.beta, config.lora.dropout) == (True, 0.1, 0.05)


@pytest.mark.parametrize(
    ("values", "trainer"),
    [
        ({}, "sft"),
        ({"loss_type": "nll"}, "sft"),
        ({"loss_type": ["sigmoid"]}, "dpo"),
        ({"precompute_ref_log_probs": False}, "dpo"),
    ],
)
def test_the_trainer_is_told_by_the_fields(values: dict[str, Any], trainer: str) -> None:
    assert trainer_of(values) == trainer


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fp16": True}, "fp16 = True"),
        ({"loss_type": "dft"}, "loss_type = 'dft' .losses are nll"),
        ({"loss_type": ["sigmoid", "sft"]}, "one at a time"),
        ({"beta": 0.1, "loss_type": "ipo"}, "DPOConfig: .* loss_type = 'ipo'"),
        ({"beta": 0.1, "desirable_weight": 1.0}, "of a trainer that is not implemented here"),
        ({"num_generations": 8}, "of a trainer that is not implemented here"),
        ({"lr_scheduler_kwargs": {"min_lr": 1e-6}}, "schedules have no further settings"),
        ({"warmup_steps": "ten"}, "warmup_steps = 'ten'"),
        ({"per_device_train_batch_size": "8"}, "per_device_train_batch_size: expected a number"),
        ({"beta": 0.1, "max_length": None}, "max_length: expected a number of tokens, for pairs"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(values: dict[str, Any], message: str) -> None:
    with pytest.raises(NaloraError, match=message):
        converted(values)


def test_precision_and_evaluation_are_carried_over() -> None:
    config, notes = converted({"bf16": False, "eval_strategy": "steps", "logging_steps": 25})
    assert (config.compute.dtype, config.train.eval_every, config.data.eval_split) == (
        "float32",
        25,
        "test",
    )
    assert "in float32" not in notes
    assert "TRL keeps the last one" in notes
    values = yaml.safe_load("eval_strategy: no\nsave_strategy: no\nlearning_rate: null\nmax_length: null")
    config, _ = converted(values | {"dtype": "bfloat16", "dataset_test_split": "held"})
    assert (config.train.save_every, config.optimizer.learning_rate) == (0, 2e-5)
    assert (config.compute.dtype, config.train.eval_every, config.data.eval_split) == (
        "bfloat16",
        0,
        "held",
    )
    assert config.data.max_length == 0


STEPS = 23


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(
    "warmup", [{}, {"warmup_steps": 1}, {"warmup_steps": 7}, {"warmup_steps": 30}, {"share": 0.1}]
)
def test_learning_rates_are_those_of_transformers_step_by_step(kind: str, warmup: dict[str, float]) -> None:
    import torch
    import transformers

    share = {"warmup_ratio": warmup["share"]} if "share" in warmup else {}
    values = {"lr_scheduler_type": kind, "learning_rate": 1e-3, "max_steps": STEPS, **(share or warmup)}
    ours = make_schedule(converted(values)[0].optimizer, STEPS)

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    arguments = {"warmup_steps": warmup.get("share", warmup.get("warmup_steps", 0))}
    count = transformers.TrainingArguments("unused", **arguments).get_warmup_steps(STEPS)
    theirs = transformers.get_scheduler(kind, optimizer, num_warmup_steps=count, num_training_steps=STEPS)
    for step in range(STEPS):
        np.testing.assert_allclose(float(ours(step)), theirs.get_last_lr()[0], rtol=1e-5, atol=1e-10)
        optimizer.step()
        theirs.step()


def test_settings_of_trl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(
        "model_name_or_path: Qwen/Qwen3-0.6B\ndataset_name: trl-lib/Capybara\ndataset_config: small\n"
        "learning_rate: 2.0e-4\nnum_train_epochs: 2\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 8\n"
        "max_length: 1024\npacking: true\nassistant_only_loss: true\nlogging_steps: 25\neval_strategy: steps\n"
        "eval_steps: 100\nwarmup_ratio: 0.1\nlr_scheduler_type: cosine\nreport_to: [wandb]\nbf16: true\n"
        "use_peft: true\nlora_r: 32\nlora_alpha: 16\nlora_target_modules: [q_proj, v_proj]\nload_in_4bit: true\n"
        "gradient_checkpointing: true\noutput_dir: Qwen3-SFT\nsomething_new: 3\n"
    )
    assert main(["from-peft", str(path), "--output", str(tmp_path / "ours.yaml")]) == 0
    config = load_config(tmp_path / "ours.yaml")
    assert (config.model, config.output, config.epochs) == ("Qwen/Qwen3-0.6B", "Qwen3-SFT", 2.0)
    assert config.data.dataset == "hf:trl-lib/Capybara:small"
    assert (config.data.max_length, config.data.loss_on, config.callbacks) == (
        1024,
        "assistant",
        ("wandb",),
    )
    assert (config.train.batch_size, config.train.accumulate, config.train.eval_every) == (16, 8, 100)
    assert (config.data.pack, config.data.too_long, config.data.eval_split) == (True, "truncate", "test")
    assert (config.optimizer.learning_rate, config.optimizer.warmup_share) == (2e-4, 0.1)
    assert (config.optimizer.final_ratio, config.optimizer.warmup_from_zero) == (0.0, True)
    assert [rule.pattern for rule in config.lora.rules] == ["attn/q_proj", "attn/v_proj"]
    assert config.compute.quantize == "nf4"
    text = (tmp_path / "ours.yaml").read_text()
    assert "# something_new is not known here: left out" in text
    assert "# gradient_checkpointing is left out" in text
    assert main(["from-peft", str(path), "--output", str(tmp_path / "ours.yaml")]) == 2
    assert "expected a new file" in capsys.readouterr().err


def test_the_trainer_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dpo.yaml").write_text("model_name_or_path: m\nuse_peft: true\n")
    assert main(["from-peft", str(tmp_path / "dpo.yaml"), "--trainer", "dpo"]) == 0
    assert "preference:\n  loss: dpo\n" in capsys.readouterr().out
