"""One task of the commonsense suite, by name: SmolLM2-135M-Instruct on ARC-Easy, and how to run the others.

Expected result: held-out accuracy above the base model's; the interval says whether that is more than luck.
Cost: minutes on two CPU cores a task, after downloads of about 250 MB.
Command: python train.py --config configs/commonsense_smollm2.py

Other tasks: boolq, piqa, socialiqa, hellaswag, arc_challenge, openbookqa, winogrande, csqa; each also as <task>_mc,
which lists the choices in the question and asks for a letter. Long questions (boolq) want longer rows:

    python train.py --config configs/commonsense_smollm2.py --data.dataset boolq --data.max-length 384 \
        --output runs/boolq
"""

from __future__ import annotations

from nalora_jax.config import DataConfig, RunConfig


def config() -> RunConfig:
    """ARC-Easy; its test split stays untouched."""
    return RunConfig(
        output="runs/arc_easy", steps=200, data=DataConfig(dataset="arc_easy", eval_limit=0, max_length=128)
    )
