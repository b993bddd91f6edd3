"""Which runs do not share a program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nalora_jax.config import (
    AdaLoRAConfig,
    LoRAConfig,
    LoRARule,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from nalora_jax.models.adapters import adapter_spec
from nalora_jax.models.config import ModelConfig
from nalora_jax.planner.abstract_step import CONFIGS
from nalora_jax.study.sweeps.values import group_by_key, program_key

BASE = ModelConfig.from_hf(CONFIGS["llama-3.1-8b"])
CONFIG = RunConfig(
    mechanisms=("soft", "curvature_cap"), optimizer=OptimizerConfig(learning_rate=1e-3)
)


def _key(config: RunConfig) -> str:
    return program_key(config, adapter_spec(config, BASE))


def test_runs_that_need_different_programs_are_in_different_groups() -> None:
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


def test_runs_that_differ_in_a_setting_that_cannot_be_traced_are_in_different_groups() -> None:
    """The hard mask rounds its share to a number of channels, with which it calls `top_k`."""
    rules = [f"hard:keep={keep},decay={decay}" for keep in (0.5, 0.25) for decay in (0.9, 0.8)]
    keeps = [replace(CONFIG, mechanisms=(rule,)) for rule in rules]
    assert [len(group) for group in group_by_key(keeps, _key)] == [2, 2]
