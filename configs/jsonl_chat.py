"""Template for chat data: a JSONL file of chat messages, loss on every assistant turn.

Expected result: a held-out loss below the base model's; the report compares samples before and
after training.
Cost: set by your data and --steps.
Command: python train.py --config configs/jsonl_chat.py --data.dataset chats.jsonl

Each line of the file is one conversation:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello! How
    can I help?"}]}

The last twentieth of the file is held out.
"""

from __future__ import annotations

from nalora_jax.config import DataConfig, LoRAConfig, LoRARule, RunConfig


def config() -> RunConfig:
    """Returns the settings: adapters on feed-forward and attention, 300 steps."""
    rules = (
        LoRARule("ffn/(gate|up|down)_proj", rank=16),
        LoRARule("attn/(q|v)_proj", rank=8),
    )
    data = DataConfig(
        dataset="chats.jsonl",
        train_split="train[:95%]",
        eval_split="train[95%:]",
        max_length=512,
        loss_on="assistant",
        too_long="truncate",
        chat=True,
    )
    return RunConfig(
        output="runs/chat", steps=300, lora=LoRAConfig(rules=rules), data=data
    )
