"""The main job: SmolLM2-135M-Instruct on SocialIQA, rank 8 on the FFNs, step scale by curvature.

Expected result: held-out accuracy 0.485, base model 0.403 (400 questions, seed 0; difference 0.028
to 0.135); loss 3.49, base model 6.13.
Cost: about two minutes on two quiet CPU cores (AMD EPYC Zen 4, AVX512-BF16), after downloads of
about 250 MB.
Command: python train.py --config configs/socialiqa_smollm2.py

These are the dataclasses' defaults, with the row length chosen from the data: `nalora train` alone
does the same.
"""

from __future__ import annotations

from nalora_jax.config import DataConfig, RunConfig


def config() -> RunConfig:
    """Returns the settings of the main job."""
    return RunConfig(data=DataConfig(max_length=128))
