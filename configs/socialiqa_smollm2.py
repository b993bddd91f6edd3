"""The main job: SmolLM2-135M-Instruct on SocialIQA, NA-LoRA of rank 8 on the feed-forward blocks.

Expected result: held-out accuracy 0.485 after 0.400 (400 questions, seed 0; difference 0.033 to 0.138), loss 3.62 after
6.13.
Cost: 2 min 37 s on two CPU cores (AMD EPYC, avx512_bf16), after downloads of about 250 MB.
Command: python train.py --config configs/socialiqa_smollm2.py

These are the dataclasses' defaults, so that `nalora train` alone does the same from a wheel.
"""

from __future__ import annotations

from nalora_jax.config import RunConfig


def config() -> RunConfig:
    """The settings of the main job."""
    return RunConfig()
