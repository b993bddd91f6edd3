"""The main job: SmolLM2-135M-Instruct on SocialIQA, NA-LoRA of rank 8 on the feed-forward blocks.

Expected result: held-out accuracy well above the 0.40 of the base model, with intervals that do not overlap.
Cost: minutes on two CPU cores, after downloads of about 250 MB.
Command: python train.py --config configs/socialiqa_smollm2.py

These are the dataclasses' defaults, so that `nalora train` alone does the same from a wheel.
"""

from __future__ import annotations

from nalora_jax.config import RunConfig


def config() -> RunConfig:
    """The settings of the main job."""
    return RunConfig()
