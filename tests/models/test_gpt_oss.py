"""gpt-oss with adapters on every projection: gradients against PEFT's, and its chat template."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from nalora_jax.common.trees import unflatten
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from tests.models.family_fields import YARN

CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "swiglu_limit": 1.5,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": YARN | {"truncate": False},
}
RANK, ALPHA = 3, 5.0


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**CONFIG)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (1.0 if "embed" in name else 0.3) + float("norm" in name)
            )
    return model


def adapters(config: ModelConfig) -> tuple[dict[str, Any], AdapterSpec]:
    rng, leaves, shapes = np.random.default_rng(0), {}, projection_shapes(config)
    for path, (*lead, d_in, d_out) in shapes.items():
        leaves[f"{path}/a"] = rng.normal(0, 0.3, (config.n_layers, *lead, d_in, RANK)).astype(np.float32)
        leaves[f"{path}/b"] = rng.normal(0, 0.3, (config.n_layers, *lead, RANK, d_out)).astype(np.float32)
    target = TargetSpec((RANK,) * config.n_layers, (ALPHA,) * config.n_layers)
    return unflatten(leaves), AdapterSpec(tuple((path, target) for path in sorted(shapes)))


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Looks the weather up.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its name", "enum": ["Rome", "Oslo"]},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ASKED = {"role": "user", "content": "Hello?"}
CHATS: dict[str, tuple[list[dict[str, Any]], bool, list[dict[str, Any]] | None]] = {
    "system": ([{"role": "system", "content": "Be brief."}, ASKED], True, None),
    "thoughts": ([ASKED, {"role": "assistant", "thinking": "greet", "content": "Hi."}, ASKED], True, None),
    "answer": ([ASKED, {"role": "assistant", "thinking": "greet", "content": "Hi."}], False, None),
    "tools": (
        [
            ASKED,
            {"role": "assistant", "thinking": "ask", "tool_calls": [CALL]},
            {"role": "tool", "content": "{}"},
        ],
        True,
        [WEATHER],
    ),
}


@pytest.mark.trl  # whose package contains the released template
@pytest.mark.parametrize("chat", CHATS)
def test_harmony_is_rendered_as_by_transformers(chat: str) -> None:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    template = (Path(spec.origin).parent / "chat_templates" / "gptoss.jinja").read_text()
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    ours = Tokenizer(backend, None, 0, 0, (0,), chat_template=template, special_tokens=special)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    messages, prompt, tools = CHATS[chat]
    options: dict[str, Any] = {"add_generation_prompt": prompt, "tools": tools}
    want = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    assert ours.render_chat(messages, **options) == want
    assert "<|start|>" in want
