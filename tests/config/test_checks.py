"""Refusals of settings that need no data: the flag, and the setting that it does not go with."""

from __future__ import annotations

from typing import Any

import pytest

from nalora_jax.config import (
    AdaLoRAConfig,
    ComputeConfig,
    DataConfig,
    LoRAConfig,
    LoRARule,
    PreferenceConfig,
    RLConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.record import check_run_config

REWARDS = {"rl": RLConfig(rewards=("exact",), samples=8)}
DPO = {"preference": PreferenceConfig(loss="dpo")}
ADAPTER = {"adapter": "an/adapter"}
TABLES = ("embed_tokens", "lm_head")


def lora(**settings: Any) -> dict[str, LoRAConfig]:
    return {"lora": LoRAConfig(**settings)}


def rule(*values: Any) -> dict[str, LoRAConfig]:
    return lora(rules=(LoRARule(*values),))


def data(**settings: Any) -> dict[str, DataConfig]:
    return {"data": DataConfig(**settings)}


# Settings, and the start of the message.
REFUSED: list[tuple[dict[str, Any], str]] = [
    # Rewards.
    (REWARDS | DPO, "--preference.loss: expected none with --rl.rewards, found dpo"),
    (REWARDS | lora(init="lora_ga"), "--lora.init: expected default or zero_a or pissa with"),
    (REWARDS | lora(dropout=0.1), "--lora.dropout: expected 0.0 with --rl.rewards"),
    (
        REWARDS | {"adalora": AdaLoRAConfig(target_rank=1)},
        "--adalora.target-rank: expected 0 with --rl.rewards",
    ),
    (
        {"rl": RLConfig(rewards=("exact",), samples=8, beta=0.1), **lora(init="pissa")},
        "--lora.init: expected default or zero_a with --rl.rewards, found pissa",
    ),
    (
        {"rl": RLConfig(rewards=("exact",), samples=3)},
        "--train.batch-size: expected a multiple of --rl.samples (3), found 8",
    ),
    # Kinds that are named without the settings that they need.
    ({"kind": "rl"}, "--rl.rewards: expected at least one, or --rl.environment, found none"),
    ({"kind": "images"}, "--vision.task: expected \"chat\", found ''"),
    ({"kind": "dual"}, '--vision.task: expected "classify" or "contrast", found \'\''),
    # Weights that are trained themselves.
    (
        {"tune": ("full", "norm")},
        "--tune: expected full alone, or patterns, found full norm",
    ),
    (
        {"tune": ("full",), "compute": ComputeConfig(quantize="int8")},
        "--compute.quantize: expected none with --tune, found int8; a base in floats",
    ),
    ({"tune": ("norm",)} | lora(init="pissa"), "--lora.init: expected default or zero_a with"),
    (
        {"tune": ("full",)} | lora(modules_to_save=("lm_head",)),
        "--lora.modules-to-save: expected () with --tune full",
    ),
    (DPO | {"tune": ("norm",)}, "--tune: expected () with --preference.loss, found ('norm',)"),
    (REWARDS | {"tune": ("norm",)}, "--tune: expected () with --rl.rewards, found ('norm',)"),
    # Preferences.
    (DPO | lora(init="pissa"), "--lora.init: expected default or zero_a with --preference.loss"),
    (
        {"preference": PreferenceConfig("dpo", gamma=1.0)},
        "--preference.gamma: expected 0.5 with --preference.loss dpo, which does not read it",
    ),
    (
        {"preference": PreferenceConfig("ipo", per_token=True)},
        "--preference.per-token: expected False with --preference.loss ipo",
    ),
    (
        {"preference": PreferenceConfig("orpo", nll_weight=1.0)},
        "--preference.nll-weight: expected 0.0 with --preference.loss orpo",
    ),
    (
        {"preference": PreferenceConfig("orpo", label_smoothing=0.1)},
        "--preference.label-smoothing: expected 0.0 with --preference.loss orpo",
    ),
    (
        {"kind": "preference"},
        "--preference.loss: expected dpo or robust or ipo or simpo or orpo or kto with preference",
    ),
    (DPO | data(loss_last=4), "--data.loss-last: expected 0 with --preference.loss"),
    (DPO | data(too_long="split"), "--data.too-long: expected drop or truncate or error with"),
    (
        DPO | {"vision": VisionConfig("chat")},
        "--vision.task: expected a language model with --preference.loss",
    ),
    # A run that continues an adapter.
    (ADAPTER | lora(init="zero_a"), "--lora.init: expected default with --adapter"),
    (ADAPTER | DPO, "--preference.loss: expected none with --adapter, found dpo"),
    # Tables that are trained.
    (
        lora(modules_to_save=TABLES, init="pissa"),
        "--lora.init: expected default or zero_a with --lora.modules-to-save",
    ),
    (
        lora(trainable_token_indices=(1, 2)) | DPO,
        "--preference.loss: expected none with --lora.trainable-token-indices",
    ),
    (lora(trainable_token_indices=(1, 1)), "--lora.trainable-token-indices: expected token ids"),
    (
        lora(trainable_token_indices=(1,), trainable_token_modules=()),
        "--lora.trainable-token-modules: expected embed_tokens, lm_head or both, found none",
    ),
    (
        lora(trainable_token_indices=(1,), modules_to_save=("embed_tokens",)),
        "--lora.trainable-token-modules: expected tables that --lora.modules-to-save does not",
    ),
    (data(add_tokens=("a", " ")), "--data.add-tokens: expected texts, none empty or named twice"),
    (data(add_special_tokens=("a", "a")), "--data.add-special-tokens: expected texts, none empty"),
    (
        data(add_tokens=("a",), add_special_tokens=("a",)),
        "--data.add-tokens: expected no token of --data.add-special-tokens, found 'a'",
    ),
    (
        data(add_tokens=("a",)),
        "--lora.modules-to-save: expected embed_tokens lm_head beside added tokens",
    ),
    # Initialization, quantization and the kind of model.
    (
        lora(init="pissa") | {"compute": ComputeConfig(quantize="int8")},
        '--compute.quantize: expected none with --lora.init "pissa"',
    ),
    (
        lora(init="lora_ga", gradient_weights="slope"),
        '--lora.gradient-weights: expected ones with --lora.init "lora_ga"',
    ),
    (
        {"rope_scaling": "linear:factor=2", "vision": VisionConfig("classify")},
        "--vision.task: expected a language model or chat with --model.rope-scaling",
    ),
    (
        {"vision": VisionConfig("classify"), "compute": ComputeConfig(quantize="int8")},
        "--compute.quantize: expected none with --vision.task classify",
    ),
    ({"vision": VisionConfig(image_size=32)}, "--vision.image-size: expected 0 with any"),
    # Single settings.
    (data(loss_last=2.5), "--data.loss-last: expected whole tokens, or a share below 1"),
    ({"vision": VisionConfig(templates=())}, "--vision.templates: expected at least one prompt"),
    ({"rope_scaling": "linear"}, "--model.rope-scaling linear: expected a factor, as in"),
    ({"output": " "}, "--output: expected a path whose parts have 1 to 255 bytes"),
    ({"output": "x" * 256}, "--output: expected a path whose parts have 1 to 255 bytes"),
    ({"adapter": "a\0b"}, "--adapter: expected a path whose parts have 1 to 255 bytes"),
    (data(dataset="d" * 256), "--data.dataset: expected a path whose parts have 1 to 255 bytes"),
    (lora(rules=()), "--lora.rules: expected at least one rule, found none"),
    (rule("ffn", -1), "--lora.rules: expected a rank that is a whole number in [0, 65536]"),
    (rule("ffn", 4, 0.0), "--lora.rules: expected an alpha that is a number in (0, 1e6]"),
    (rule("ffn(", 4), "--lora.rules: expected a pattern, found 'ffn('"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[row[1] for row in REFUSED])
def test_settings_that_do_not_fit_are_refused_by_flag(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(NaloraError) as caught:
        check_run_config(RunConfig(**settings))
    assert str(caught.value).startswith(message)


def test_settings_that_fit_are_accepted() -> None:
    for settings in (
        REWARDS | lora(init="pissa"),
        DPO | lora(init="zero_a"),
        {"preference": PreferenceConfig("simpo", gamma=1.0, nll_weight=0.5)} | lora(init="pissa"),
        {"preference": PreferenceConfig("orpo")} | ADAPTER,
        ADAPTER | {"train": TrainConfig(batch_size=4)},
        data(add_tokens=("a",)) | lora(modules_to_save=TABLES),
        data(loss_last=0.5),
    ):
        config = RunConfig(**settings)
        assert check_run_config(config) is config


def test_a_config_of_another_type_is_refused() -> None:
    config: Any = {"steps": 3}
    with pytest.raises(NaloraError, match="config: expected a RunConfig, found a dict"):
        check_run_config(config)
