"""The main job with the mechanisms of the paper's abstract: mask, step scale by homogeneity.

Expected result: near the main job's, with 11% less selection misalignment (0.227 instead of 0.256
over six seeds, studies/full_ffn_table); docs/studies.md summarizes the paired studies.
Cost: equal to the main job's.
Command: python train.py --config configs/nalora.py
"""

from __future__ import annotations

from nalora_jax.config import DataConfig, RunConfig


def config() -> RunConfig:
    """Returns the main job with a soft squared slope mask and the step scale by homogeneity."""
    data = DataConfig(max_length=128)
    return RunConfig(
        output="runs/nalora", data=data, mechanisms=("soft:power=2", "homogeneity")
    )
