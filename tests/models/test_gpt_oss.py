"""The chat template of gpt-oss."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from nalora_jax.data.tokenizer import Tokenizer

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
