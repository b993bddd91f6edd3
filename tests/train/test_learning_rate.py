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
from nalora_jax.train.optimizers import make_schedule, with_learning_rate

LEFT = RunConfig(optimizer=OptimizerConfig(learning_rate=0.0))


def rules(*given: LoRARule, **more: object) -> dict[str, LoRAConfig]:
    return {"lora": LoRAConfig(rules=given, **more)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "width", "rate"),
    [
        # What studies chose, which falls with the width.
        ({}, 576, 0.004),
        ({}, 2048, 0.0011),
        ({}, 64, 0.004),
        ({}, 0, 0.001),
        # It falls with the root of a large alpha, and does not rise.
        (rules(LoRARule("ffn", 16)), 576, 0.0028),
        (rules(LoRARule("ffn", 64, alpha=16.0)), 576, 0.004),
        (
            rules(LoRARule("ffn", 64, alpha=16.0), rslora=True),
            576,
            0.0014,
        ),  # its scale is that of alpha 128
        (rules(LoRARule("gate", 0, alpha=99.0), LoRARule("up", 2), LoRARule("attn", 16)), 576, 0.0028),
        (rules(LoRARule("ffn", 2)), 576, 0.004),
        # Two rates that multiply, losses of pairs, adapters that start large, and those that start slowly.
        ({"lora": LoRAConfig(plus_ratio=16.0)}, 576, 0.001),
        ({"preference": PreferenceConfig("dpo")}, 576, 0.0005),
        ({"lora": LoRAConfig(init="lora_ga")}, 576, 0.0005),
        ({"lora": LoRAConfig(init="pissa")}, 576, 0.001),
        ({"adalora": AdaLoRAConfig(target_rank=4)}, 576, 0.016),
        (rules(LoRARule("ffn", 64), init="gradient"), 576, 0.00071),
    ],
)
def test_the_automatic_rate_falls_with_the_width_and_follows_the_method(changes, width, rate) -> None:
    assert with_learning_rate(replace(LEFT, **changes), width).optimizer.learning_rate == rate


def test_a_rate_that_is_named_stays_and_others_than_adam_need_one() -> None:
    named = replace(LEFT, optimizer=OptimizerConfig(name="sgd", learning_rate=0.3))
    assert with_learning_rate(named, 4096) is named
    with pytest.raises(NaloraError, match="expected a learning rate with lion, found auto"):
        with_learning_rate(replace(LEFT, optimizer=OptimizerConfig(name="lion")), 576)
    with pytest.raises(
        NaloraError, match=r"--optimizer.learning-rate: expected a number above 0, found auto"
    ):
        make_schedule(LEFT.optimizer, 10)
