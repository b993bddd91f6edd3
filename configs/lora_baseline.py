"""The main job with plain LoRA: all mechanisms off, everything else equal. The run to compare NA-LoRA with.

Expected result: near the main job's; which of the two is better is a question for paired seeds, not for one run.
Cost: that of the main job.
Command: python train.py --config configs/lora_baseline.py
"""

from __future__ import annotations

from nalora_jax.config import DataConfig, RunConfig


def config() -> RunConfig:
    """The main job without mechanisms."""
    return RunConfig(output="runs/lora", data=DataConfig(max_length=128)).without_mechanisms()
