"""The main job: SmolLM2-135M-Instruct on SocialIQA, rank 8 on the feed-forward blocks, step scale by curvature.

Expected result: held-out accuracy 0.485 after 0.403 (400 questions, seed 0; difference 0.028 to 0.135), loss 3.49 after
6.13.
Cost: some two minutes on two quiet CPU cores (AMD EPYC Zen 4, AVX512-BF16), after downloads of about 250 MB.
Command: python train.py --config configs/socialiqa_smollm2.py

These are the dataclasses' defaults, with the row length that the data give: `nalora train` alone does the same.
"""

from __future__ import annotations

from nalora_jax.config import DataConfig, RunConfig


def config() -> RunConfig:
    """The settings of the main job."""
    return RunConfig(data=DataConfig(max_length=128))
