"""Llama-3.1-8B on commonsense-170k, for somebody who has a GPU: planned, not run.

The data are the 170,000 training questions of eight tasks that LLM-Adapters (arXiv 2304.01933) put together, in
Alpaca's fields; three epochs as there. Both need access to the Hugging Face hub, the model also that its terms are
accepted.

Expected result: unknown; compare it with plain LoRA (--mask.kind off --step-scale.kind off) and with the abstract's
mechanisms (--mask.kind soft --step-scale.kind homogeneity).
Cost: by data sheets 20 GB and at least 0.043 s a step on each of eight H100
(nalora plan --model llama-3.1-8b --topology 8xh100 --batch 16 --seq 512 --estimate); one takes eight times as long.
Command: python train.py --config configs/commonsense_llama_8b.py

It needs the extras cuda and datasets. Then, task by task:

    nalora eval runs/commonsense_llama --tasks boolq,piqa,socialiqa,hellaswag,winogrande,arc_easy,arc_challenge
"""

from __future__ import annotations

from nalora_jax.config import DataConfig, LoRAConfig, LoRARule, OptimizerConfig, RunConfig, TrainConfig


def config() -> RunConfig:
    """Rank 32 on the feed-forward blocks, at the learning rate of LLM-Adapters, which was not tuned for this."""
    return RunConfig(
        model="meta-llama/Llama-3.1-8B",
        output="runs/commonsense_llama",
        epochs=3.0,
        lora=LoRAConfig(rules=(LoRARule("ffn/(gate|up|down)_proj", rank=32, alpha=64.0),)),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        data=DataConfig(dataset="hf:zwhe99/commonsense_170k", max_length=512),
        train=TrainConfig(batch_size=16, eval_every=1000, save_every=1000),
    )
