"""The main job with plain LoRA: all mechanisms off, other settings equal; the baseline of NA-LoRA.

Expected result: near the main job's; only paired seeds, not one run, show which of the two is
better.
Cost: equal to the main job's.
Command: python train.py --config configs/lora_baseline.py
"""

from __future__ import annotations

from nalora_jax.config import DataConfig, RunConfig


def config() -> RunConfig:
    """Returns the main job without mechanisms."""
    return RunConfig(
        output="runs/lora", data=DataConfig(max_length=128)
    ).without_mechanisms()
