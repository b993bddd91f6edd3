"""Which runs share a program, and the widest adapters of a program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nalora_jax.cli.planning.program import CONFIGS
from nalora_jax.config import AdaLoRAConfig, LoRAConfig, LoRARule, OptimizerConfig, RunConfig, TrainConfig
from nalora_jax.models.adapters import adapter_spec
from nalora_jax.models.config import ModelConfig
from nalora_jax.study.sweeps.values import grouped, program_key, widest

BASE = ModelConfig.from_hf(CONFIGS["llama-3.1-8b"])
CONFIG = RunConfig(mechanisms=("soft", "curvature_cap"), optimizer=OptimizerConfig(learning_rate=1e-3))
_SOFT = "soft:power=1.5,low=0.1,high=3,decay=0.9,warmup=2,permute=1"
RULE = LoRAConfig(rules=(LoRARule("ffn", 4, 5.0),))


def _key(config: RunConfig) -> str:
    return program_key(config, adapter_spec(config, BASE))


def test_values_do_not_need_another_program() -> None:
    decay = OptimizerConfig("adamw", 2e-3, "linear", weight_decay=0.1, b1=0.8, b2=0.9, clip_norm=2.0)
    values: list[dict[str, Any]] = [
        {"seed": 3, "steps": 7, "output": "runs/other"},
        {"optimizer": decay},
        {"lora": RULE},
        {"mechanisms": (_SOFT, "curvature_cap:tau=0.3")},
        {"train": TrainConfig(log_every=3, patience=2)},
    ]
    assert {_key(replace(CONFIG, **changes)) for changes in values} == {_key(CONFIG)}


def test_other_programs_are_other_groups() -> None:
    others: list[dict[str, Any]] = [
        {"optimizer": OptimizerConfig("lion", 1e-3)},
        {"optimizer": OptimizerConfig(learning_rate=1e-3, clip_norm=0.0)},
        {"lora": LoRAConfig(rules=(LoRARule("ffn/gate", 8),))},
        {"lora": LoRAConfig(init="pissa")},
        {"lora": LoRAConfig(plus_ratio=4.0)},
        {"mechanisms": ("hard", "curvature_cap")},
        {"mechanisms": ("curvature_cap", "soft")},
        {"mechanisms": ()},
        {"adalora": AdaLoRAConfig(target_rank=2)},
        {"train": TrainConfig(batch_size=16)},
    ]
    keys = {_key(replace(CONFIG, **changes)) for changes in ({}, *others)}
    assert len(keys) == len(others) + 1


def test_a_setting_that_a_rule_cannot_trace_is_a_group() -> None:
    """The hard mask rounds its share to a number of channels, with which it calls `top_k`."""
    rules = [f"hard:keep={keep},decay={decay}" for keep in (0.5, 0.25) for decay in (0.9, 0.8)]
    keeps = [replace(CONFIG, mechanisms=(rule,)) for rule in rules]
    assert [len(group) for group in grouped(keeps, _key)] == [2, 2]


def test_the_widest_adapters_keep_the_scales_of_the_first() -> None:
    first, second = (adapter_spec(replace(CONFIG, lora=lora), BASE) for lora in (RULE, LoRAConfig()))
    joined = widest([first, second])
    path = "layers/ffn/gate_proj"
    assert joined.target(path).rank == 8
    assert joined.scales(path)[0] == first.scales(path)[0] == pytest.approx(5.0 / 4)
