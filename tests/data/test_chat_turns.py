"""Text between turns: tokens and masks equal transformers' rendering, and templates that rewrite
earlier turns are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import models
from transformers.utils.chat_template_utils import render_jinja_template

from nalora_jax.data.chat_turns import CallForm, call_form, require_fixed_turns, text_after_turn
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError

FOLDER = Path(__file__).parent / "templates"
PARAMETERS = {"type": "object", "properties": {"k": {"type": "integer", "description": "k"}}}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": PARAMETERS}}
]
PROMPT = [{"role": "user", "content": "hi"}]
STOPS = {
    "chatml": ["<|im_end|>"],
    "gemma": ["<eos>", "<end_of_turn>"],
    "llama_3": ["<|eot_id|>", "<|end_of_text|>"],
    "phi_3": ["<|endoftext|>", "<|end|>"],
    "deepseek_r1_distill": ["<｜end▁of▁sentence｜>"],
    "glm_4_5": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "gpt_oss": ["<|return|>", "<|call|>"],
    "qwen3_5": ["<|im_end|>", "<|endoftext|>"],
    "qwen_tools": ["<|im_end|>", "<|endoftext|>"],
}


def released(name: str) -> Tokenizer:
    """A tokenizer with a published template and its stop tokens; only its template matters."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.add_special_tokens(STOPS[name])
    ids = tuple(backend.token_to_id(stop) for stop in STOPS[name])
    special = {"bos_token": "<s>", "eos_token": STOPS[name][0]}
    template = (FOLDER / f"{name}.jinja").read_text()
    return Tokenizer(backend, None, ids[0], ids[0], ids, template, special_tokens=special)


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama_3", "phi_3", "qwen_tools"])
def test_turns_and_inserted_texts_are_transformers_rendering(name: str) -> None:
    """Three turns of the model, one message after the first and two after the second."""
    tokenizer = released(name)
    messages: list[dict[str, Any]] = list(PROMPT)
    text = tokenizer.render_chat(messages, add_generation_prompt=True)
    replies = [[{"role": "user", "content": "more  words\n"}], [{"role": "user", "content": "y"}]]
    for number, reply in enumerate(replies):
        messages.append({"role": "assistant", "content": f"turn {number}"})
        text += f"turn {number}" + STOPS[name][name in ("gemma", "phi_3")]
        text += text_after_turn(tokenizer, messages, reply)
        messages += reply
        special = tokenizer.special_tokens or {}
        (expected,), _ = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.chat_template,
            add_generation_prompt=True,
            **special,
        )
        assert text == expected


def test_masks_are_those_of_transformers(tokenizer: Tokenizer) -> None:
    """Its mask of ChatML covers what the model writes, with the end of each turn."""
    messages: list[dict[str, Any]] = list(PROMPT)
    ids = tokenizer.encode(
        tokenizer.render_chat(messages, add_generation_prompt=True), special=False
    )
    mask = [0] * len(ids)
    for content in ("the sky", "hills", "up"):
        turn = tokenizer.encode(content + "<|im_end|>", special=False)
        ids += turn
        mask += [1] * len(turn)
        messages.append({"role": "assistant", "content": content})
        if content != "up":
            reply = [
                {"role": "tool", "content": "12 <b>"},
                {"role": "user", "content": f"and {content}?"},
            ]
            inserted = tokenizer.encode(text_after_turn(tokenizer, messages, reply), special=False)
            ids += inserted
            mask += [0] * len(inserted)
            messages += reply
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    template = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '
' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '
' }}{% else %}{{ m['content'] + '<|im_end|>' + '
' }}{% endif %}{% endfor %}"""
    output = theirs.apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    assert output["input_ids"][: len(ids)] == ids
    np.testing.assert_array_equal(output["assistant_masks"][: len(ids)], mask)
    # The template writes the end of the line after the last turn, too.
    assert tokenizer.decode(output["input_ids"][len(ids) :]) == "\n"


def test_what_the_model_wrote_does_not_change_the_inserted_text() -> None:
    tokenizer = released("qwen_tools")
    for words in ("y", "xz0000zx"):
        texts = []
        for content in ("x", "<think>a</think>  b ", "xz0000zx", "<|im_end|>"):
            chat = [*PROMPT, {"role": "assistant", "content": content}]
            texts.append(text_after_turn(tokenizer, chat, [{"role": "user", "content": words}]))
        expected = f"\n<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n"
        assert set(texts) == {expected}


@pytest.mark.parametrize(
    ("name", "removes"),
    [
        ("chatml", False),
        ("gemma", False),
        ("llama_3", False),
        ("phi_3", False),
        ("deepseek_r1_distill", True),
        ("glm_4_5", True),
        ("qwen3_5", True),
        ("qwen_tools", True),
    ],
)
def test_templates_that_remove_thoughts_are_stated(name: str, removes: bool) -> None:
    assert require_fixed_turns(released(name), PROMPT) == removes


def with_template(text: str) -> Tokenizer:
    return replace(released("chatml"), chat_template=text)


CHATML = (FOLDER / "chatml.jinja").read_text()


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: require_fixed_turns(released("gpt_oss"), PROMPT), "stop token after it"),
        # Only the last turn is written.
        (
            lambda: require_fixed_turns(
                with_template(CHATML.replace("in messages", "in messages[-1:]")), PROMPT
            ),
            "writes each turn of the assistant",
        ),
        # Turns are numbered from the end.
        (
            lambda: require_fixed_turns(
                with_template(CHATML.replace("+ '<|im", "~ loop.revindex ~ '<|im")), PROMPT
            ),
            "earlier turns as they were written",
        ),
        # Tools are before the last message.
        (
            lambda: require_fixed_turns(
                with_template(
                    CHATML.replace("%}{{", "%}{% if loop.last %}{{ tools }}{% endif %}{{", 1)
                ),
                PROMPT,
                TOOLS,
            ),
            "earlier turns as they were written",
        ),
        (lambda: call_form(released("chatml"), PROMPT, TOOLS), "writes tools, and calls of them as JSON"),
        (lambda: call_form(released("qwen3_5"), PROMPT, TOOLS), "writes tools, and calls of them as JSON"),
    ],
)  # fmt: skip
def test_templates_that_cannot_keep_turns_are_refused(
    check: Callable[[], Any], message: str
) -> None:
    with pytest.raises(NaloraError, match=message):
        check()


MISTRAL = """{% if tools %}[TOOLS]{{ tools }}{% endif %}{% for m in messages %}
{%- if m.tool_calls %}[CALLS][{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": {#
#}{{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}{% endfor %}]<|im_end|>
{%- else %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endif %}{% endfor %}"""
LLAMA = """{% if tools %}{{ tools }}{% endif %}{% for m in messages %}<{{ m.role }}>
{%- if m.tool_calls %}{% set call = m.tool_calls[0].function -%}
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}
{%- else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.mark.parametrize(
    ("template", "form", "text", "content", "calls"),
    [
        (
            (FOLDER / "qwen_tools.jinja").read_text(),
            CallForm("<tool_call>", "name", "arguments"),
            'so\n<tool_call>\n{"name": "f", "arguments": {"k": 2}}\n</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
            "so",
            [("f", {"k": 2}), ("g", {})],
        ),
        (
            MISTRAL,
            CallForm("[CALLS]", "name", "arguments"),
            '[CALLS][{"name": "f", "arguments": {"k": 2}}, {"name": "g", "arguments": {}}]',
            "",
            [("f", {"k": 2}), ("g", {})],
        ),
        (
            LLAMA,
            CallForm("", "name", "parameters"),
            ' {"name": "f", "parameters": {"k": "a"}}',
            "",
            [("f", {"k": "a"})],
        ),
    ],
)
def test_calls_are_parsed_in_the_templates_form(template, form, text, content, calls) -> None:
    tokenizer = with_template(template)
    assert call_form(tokenizer, PROMPT, TOOLS) == form
    words, parsed = form.parse(text)
    assert words == content
    functions = [call["function"] for call in parsed]
    assert [(each["name"], each["arguments"]) for each in functions] == calls
    assert [call["id"] for call in parsed] == ["call00000", "call00001"][: len(calls)]
    for damaged in (text.replace("{", "(", 1), "no call", '{"name": 3}', "[1]", text[:-30]):
        assert len(form.parse(damaged)[1]) < len(calls)


def test_results_of_tools_are_inserted_in_the_templates_form() -> None:
    tokenizer = released("qwen_tools")
    form = call_form(tokenizer, PROMPT, TOOLS)
    written = '<tool_call>{"name":"f","arguments":{"k":1}}</tool_call>'  # not as it is rendered
    content, calls = form.parse(written)
    chat = [*PROMPT, {"role": "assistant", "content": content, "tool_calls": calls}]
    reply = [{"role": "tool", "name": "f", "tool_call_id": calls[0]["id"], "content": "7"}]
    inserted = text_after_turn(tokenizer, chat, reply, TOOLS)
    rendered = tokenizer.render_chat([*chat, *reply], add_generation_prompt=True, tools=TOOLS)
    assert rendered.endswith("<|im_end|>" + inserted)
    assert "<tool_response>\n7\n</tool_response>" in inserted
    assert require_fixed_turns(tokenizer, PROMPT, TOOLS)
