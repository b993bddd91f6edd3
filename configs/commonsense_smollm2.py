"""One commonsense task by name: SmolLM2-135M-Instruct on ARC-Easy, and commands for other tasks.

Expected result: held-out accuracy above the base model's; the interval shows if the difference can
be chance.
Cost: minutes per task on two CPU cores, after downloads of about 250 MB.
Command: python train.py --config configs/commonsense_smollm2.py

Other tasks: boolq, piqa, socialiqa, hellaswag, arc_challenge, openbookqa, winogrande, csqa; each
also as <task>_mc, which lists the choices in the prompt and expects a letter. Long prompts (boolq)
need longer rows:

    python train.py --config configs/commonsense_smollm2.py --data.dataset boolq --data.max-length
    384 \
        --output runs/boolq
"""

from __future__ import annotations

from nalora_jax.config import DataConfig, RunConfig


def config() -> RunConfig:
    """Returns the settings for ARC-Easy, whose test split is not used."""
    return RunConfig(
        output="runs/arc_easy",
        steps=200,
        data=DataConfig(dataset="arc_easy", eval_limit=0, max_length=128),
    )
