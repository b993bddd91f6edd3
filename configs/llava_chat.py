"""LLaVA 1.5 7B on conversations about images, NA-LoRA on the FFNs and the projector.

The FFNs are the language model's.

Expected result: similar to fine-tuning LLaVA with LoRA on the same chats. Not measured, because the
weights could not be downloaded here.
Cost: 14 GB of weights in bfloat16; an image is 576 tokens, so a row of 2,048 fits at most three.

    nalora train --config configs/llava_chat.py --data.dataset chats.jsonl --output runs/llava
    nalora generate runs/llava --image cat.jpg --prompt "What is this?"

Needs `pip install 'nalora_jax[vision]'`. A line of the file is a conversation in OpenAI's form or
in LLaVA's; images are named by paths below the file's folder. To train the image tower as well:
--lora.rules "ffn:8", which matches in all parts.
"""

from __future__ import annotations

from nalora_jax.config import (
    ComputeConfig,
    DataConfig,
    LoRAConfig,
    LoRARule,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)


def config() -> RunConfig:
    """Returns the settings of the run."""
    return RunConfig(
        model="llava-hf/llava-1.5-7b-hf",
        output="runs/llava_chat",
        steps=500,
        lora=LoRAConfig(rules=(LoRARule("^layers/.*ffn", 8), LoRARule("projector", 8))),
        optimizer=OptimizerConfig(learning_rate=2e-4),
        data=DataConfig(
            "chats.jsonl",
            train_split="train[:95%]",
            eval_split="train[95%:]",
            max_length=2048,
            eval_limit=200,
            select_limit=50,
            chat=True,
            workers=4,
        ),
        train=TrainConfig(
            batch_size=16, accumulate=4, eval_every=100, save_every=100, log_every=10
        ),
        compute=ComputeConfig(remat="full"),
        vision=VisionConfig("chat"),
    )
