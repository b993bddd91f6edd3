"""The main job with the two mechanisms of the paper's abstract: temporal-importance mask and step scale by homogeneity.

Expected result: near the main job's, with 15 to 27% less selection misalignment; docs/when.md says what paired studies
found that to be worth.
Cost: that of the main job.
Command: python train.py --config configs/nalora.py
"""

from __future__ import annotations

from nalora_jax.config import DataConfig, MaskConfig, RunConfig, StepScaleConfig


def config() -> RunConfig:
    """The main job with a soft squared slope mask and the step scale by homogeneity."""
    data = DataConfig(max_length=128)
    return RunConfig(
        output="runs/nalora", data=data, mask=MaskConfig("soft"), step_scale=StepScaleConfig("homogeneity")
    )
