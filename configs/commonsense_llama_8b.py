"""Llama-3.1-8B on commonsense-170k, for GPUs: planned, not run.

The data are the 170,000 training examples of eight tasks that LLM-Adapters (arXiv 2304.01933)
combined, in Alpaca's fields, trained for three epochs as there. Model and data need access to the
Hugging Face hub; the model's terms must be accepted.

Expected result: unknown; compare it with plain LoRA (--mechanisms none) and
with the abstract's mechanisms (--mechanisms soft:power=2 homogeneity).
Cost: by data sheets 20 GB and at least 0.043 s a step on each of eight H100 (nalora plan --model
llama-3.1-8b --topology 8xh100 --batch 16 --seq 512 --estimate); one H100 takes eight times as long.
Command: python train.py --config configs/commonsense_llama_8b.py

It needs the extras cuda and datasets. To evaluate each task:

    nalora eval runs/commonsense_llama --tasks
    boolq,piqa,socialiqa,hellaswag,winogrande,arc_easy,arc_challenge
"""

from __future__ import annotations

from nalora_jax.config import (
    DataConfig,
    LoRAConfig,
    LoRARule,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)


def config() -> RunConfig:
    """Returns the settings: rank 32 on the FFNs, at LLM-Adapters' learning rate, not tuned here."""
    return RunConfig(
        model="meta-llama/Llama-3.1-8B",
        output="runs/commonsense_llama",
        epochs=3.0,
        lora=LoRAConfig(
            rules=(LoRARule("ffn/(gate|up|down)_proj", rank=32, alpha=64.0),)
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        data=DataConfig(dataset="hf:zwhe99/commonsense_170k", max_length=512),
        train=TrainConfig(batch_size=16, eval_every=1000, save_every=1000),
    )
