"""Adapters on all modules: per-module ranks by ordered rules, rsLoRA scaling, LoRA+ learning rates.

Expected result: near the main job's accuracy; more trained parameters do not have to help on a
small task.
Cost: somewhat above the main job's.
Command: python train.py --config configs/wide_attention.py
"""

from __future__ import annotations

from nalora_jax.config import DataConfig, LoRAConfig, LoRARule, RunConfig


def config() -> RunConfig:
    """Returns the settings: rank 16 on gates, 8 on the block's other modules, 4 on attention."""
    rules = (
        LoRARule("gate_proj", rank=16),
        LoRARule("ffn/", rank=8),
        LoRARule("attn/", rank=4),
    )
    data = DataConfig(max_length=128)
    return RunConfig(
        output="runs/wide",
        lora=LoRAConfig(rules=rules, rslora=True, plus_ratio=4.0),
        data=data,
    )
