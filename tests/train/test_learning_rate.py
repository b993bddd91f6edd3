"""The learning rate of a run that names none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nalora_jax.config import (
    AdaLoRAConfig,
    LoRAConfig,
    LoRARule,
    OptimizerConfig,
    PreferenceConfig,
    RunConfig,
)
from nalora_jax.errors import NaloraError
from nalora_jax.train.learning_rate import with_learning_rate
from nalora_jax.train.optimizers import make_schedule

LEFT = RunConfig(optimizer=OptimizerConfig(learning_rate=0.0))


def rate_of(config: RunConfig, width: int = 576) -> float:
    return with_learning_rate(config, width).optimizer.learning_rate


@pytest.mark.parametrize(
    ("width", "rate"),
    [
        (576, 0.004),
        (960, 0.0024),
        (2048, 0.0011),
        (4096, 0.00056),
        (8192, 0.00028),
        (64, 0.004),
        (0, 0.001),
    ],
)
def test_it_is_what_studies_chose_and_falls_with_the_width(width: int, rate: float) -> None:
    assert rate_of(LEFT, width) == rate


@pytest.mark.parametrize(
    ("rules", "rslora", "rate"),
    [
        ([LoRARule("ffn", 8)], False, 0.004),
        ([LoRARule("ffn", 16)], False, 0.0028),
        ([LoRARule("ffn", 64)], False, 0.0014),
        ([LoRARule("ffn", 2, alpha=16.0)], False, 0.004),
        ([LoRARule("ffn", 64, alpha=16.0)], False, 0.004),
        ([LoRARule("ffn", 64, alpha=16.0)], True, 0.0014),  # its scale is that of alpha 128
        ([LoRARule("gate", 0, alpha=99.0), LoRARule("up", 2), LoRARule("attn", 16)], False, 0.0028),
        ([LoRARule("ffn", 2)], False, 0.004),  # it does not rise
    ],
)
def test_it_falls_with_the_root_of_a_large_alpha(rules: list[LoRARule], rslora: bool, rate: float) -> None:
    config = replace(LEFT, lora=LoRAConfig(rules=tuple(rules), rslora=rslora))
    assert rate_of(config) == rate
    assert rate_of(config, width=0) == 0.001  # encoders were measured at rank 8 only
    assert rate_of(replace(config, adalora=AdaLoRAConfig(target_rank=1))) == 0.016


def test_a_rate_that_is_named_stays() -> None:
    named = replace(LEFT, optimizer=OptimizerConfig(name="sgd", learning_rate=0.3))
    assert with_learning_rate(named, 4096) is named


def test_it_is_lower_where_two_rates_multiply_and_where_losses_are_of_pairs() -> None:
    assert rate_of(replace(LEFT, lora=LoRAConfig(plus_ratio=16.0))) == 0.001
    assert rate_of(replace(LEFT, preference=PreferenceConfig("dpo"))) == 0.0005


def test_it_is_lower_where_adapters_start_large_and_higher_where_they_start_slowly() -> None:
    assert rate_of(replace(LEFT, lora=LoRAConfig(init="lora_ga"))) == 0.0005
    assert rate_of(replace(LEFT, lora=LoRAConfig(init="pissa"))) == 0.001
    assert rate_of(replace(LEFT, adalora=AdaLoRAConfig(target_rank=4))) == 0.016
    assert rate_of(replace(LEFT, lora=LoRAConfig(init="gradient"))) == 0.004
    wide = LoRAConfig(rules=(LoRARule("ffn", 64),), init="gradient")  # alpha 128
    assert rate_of(replace(LEFT, lora=wide)) == 0.00071


@pytest.mark.parametrize("name", ["sgd", "lion"])
def test_there_is_none_for_optimizers_whose_steps_are_of_another_size(name: str) -> None:
    config = replace(LEFT, optimizer=OptimizerConfig(name=name))  # type: ignore[arg-type]
    with pytest.raises(NaloraError, match=f"expected a learning rate with {name}, found auto"):
        with_learning_rate(config, 576)


def test_a_schedule_is_not_made_of_a_rate_that_nobody_decided() -> None:
    with pytest.raises(
        NaloraError, match=r"--optimizer.learning-rate: expected a number above 0, found auto"
    ):
        make_schedule(LEFT.optimizer, 10)
