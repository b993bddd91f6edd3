from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from nalora_jax.config import DataConfig
from nalora_jax.data.chat import render_record
from nalora_jax.data.tokenize import Example, fit_example, tokenize
from nalora_jax.errors import NaloraError
from tests.data.loss_tokens import learned

CONFIG = DataConfig()
TALK = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Which way is up?"},
    {"role": "assistant", "content": "the sky"},
    {"role": "user", "content": "Tell me more"},
    {"role": "assistant", "content": "\n\nYes, the green hills"},
]


def test_completion_counts_with_its_end(tokenizer):
    record = {"prompt": "Question: Which way is up?\nAnswer:", "completion": " the sky"}
    assert learned(record, tokenizer) == [" the sky<|im_end|>"]
    assert learned(record, tokenizer, loss_on="all") == [record["prompt"] + " the sky<|im_end|>"]


def test_begin_of_sequence_goes_in_front(tokenizer):
    wanting = dataclasses.replace(tokenizer, add_bos=True)
    (example,) = tokenize(
        [render_record({"prompt": "up", "completion": " is"}, CONFIG, wanting, "")], wanting
    )
    assert example.ids.tolist() == [
        *wanting.encode("up"),
        *wanting.encode(" is", special=False),
        wanting.eos_id,
    ]
    (chat,) = tokenize([render_record({"messages": TALK}, CONFIG, wanting, "")], wanting)
    assert chat.ids[:2].tolist() == wanting.encode("<|im_start|>system", special=False)[:2]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("answer", ["\n\nYes, the green hills<|im_end|>"]),
        ("assistant", ["the sky<|im_end|>", "\n\nYes, the green hills<|im_end|>"]),
        ("all", ["".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK).rstrip()]),
    ],
)
def test_chat_masks_are_exact(tokenizer, loss_on, expected):
    assert learned({"messages": TALK}, tokenizer, loss_on=loss_on) == expected


def test_turn_without_special_end_gets_one(tokenizer):
    plain = dataclasses.replace(
        tokenizer,
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    assert learned({"messages": TALK[1:3]}, plain) == ["the sky<|im_end|>"]
    assert learned({"messages": TALK[1:]}, plain, loss_on="assistant")[0] == "the sky"


def called(function):
    return {"messages": [*TALK[:3], {"role": "assistant", "tool_calls": [{"function": function}]}]}


def said(role, content):
    return {"messages": [{"role": role, "content": content}, *TALK[2:]]}


REFUSED = [
    ({"body": "x"}, r"here: expected a field 'prompt' \(or 'messages'\), found 'body'; .*--data.prompt-field"),
    ({"text": 3}, "here: completion: expected a text, found a int"),
    ({"prompt": "x"}, "expected a field 'completion', found 'prompt'; .*--data.completion-field"),
    ({"prompt": "x", "completion": ""}, "here: completion: expected an answer, found an empty text"),
    ({"prompt": "\udfff", "completion": "x"}, "prompt: expected Unicode text, found half a character"),
    ({"instruction": ["x"], "output": "y"}, "instruction: expected a text, found a list"),
    ({"messages": []}, "here: messages: expected a list of chat messages, found none"),
    ({"messages": "hi"}, "found a str"),
    ({"messages": ["hi"]}, r"here: messages\[0\]: expected \{\"role\""),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]: expected a field 'content', found 'role'"),
    (said("user", [{"type": "image", "url": "x"}]), "content: expected a text, or"),
    (said("usr", "x"), r"here: messages\[0\]: role: .*found 'usr'; write 'user'"),
    (said("gpt", "x"), r"here: messages\[0\]: role: .*found 'gpt'; write 'assistant'"),
    ({"messages": TALK[:2]}, "expected an assistant's turn"),
    ({"messages": TALK[2:3]}, "expected a user's or system's message first"),
    (
        {"messages": [*TALK[:2], {"role": "assistant", "content": " \n"}]},
        "here: message 3 of 3: expected an assistant's answer, found an empty text; the model would",
    ),
    ({"messages": TALK, "tools": "no json"}, "tools: expected a JSON list of tools"),
    ({"messages": TALK, "tools": "[" * 100_000}, "tools: expected a JSON list of tools"),
    (called({"name": 1}), r"messages\[3\]: tool_calls\[0\]: expected"),
    (called({"name": "f", "arguments": "{"}), "arguments: expected a JSON object"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, r"messages\[0\]: from: expected one of human, "),
]  # fmt: skip


@pytest.mark.parametrize(("record", "message"), REFUSED)
def test_bad_records_name_the_field(tokenizer, record, message):
    with pytest.raises(NaloraError, match=message):
        render_record(record, CONFIG, tokenizer, "here")


PHI_3 = (Path(__file__).parent / "templates" / "phi_3.jinja").read_text()


def test_answers_of_phi_3_end_with_their_end_of_turn_token(tokenizer):
    """Its template writes an end-of-sequence token after the conversation, which is not part of the last turn."""
    phi = dataclasses.replace(tokenizer, chat_template=PHI_3, special_tokens={"eos_token": "<|endoftext|>"})
    rendered = render_record({"messages": TALK}, DataConfig(loss_on="assistant"), phi, "here")
    expected = ["the sky<|end|>", "\n\nYes, the green hills<|end|>"]
    assert [rendered.text[start:stop] for start, stop in rendered.answers] == expected
    assert phi.render_chat(TALK) == rendered.text + "\n<|endoftext|>"


def test_an_end_of_sequence_token_that_ends_every_turn_is_part_of_the_answer(tokenizer):
    end = "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    template = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    mistral = dataclasses.replace(
        tokenizer, chat_template=template, special_tokens={"eos_token": "<|im_end|>"}
    )
    expected = ["the sky<|im_end|>", "\n\nYes, the green hills<|im_end|>"]
    assert learned({"messages": TALK}, mistral, loss_on="assistant") == expected
    assert learned({"messages": TALK}, mistral) == expected[-1:]


def example(prompt: int, answer: int) -> Example:
    return Example(np.arange(1, prompt + answer + 1), np.arange(prompt + answer) >= prompt)


@pytest.mark.parametrize(
    ("prompt", "answer", "bos", "expected"),
    [
        (3, 2, None, [1, 2, 3, 4, 5]),  # fits: 4 inputs and the token after
        (5, 2, None, [3, 4, 5, 6, 7]),  # the prompt goes from the left
        (5, 2, 1, [1, 4, 5, 6, 7]),  # but for its begin-of-sequence id
        (3, 9, None, [3, 4, 5, 6, 7]),  # one token stays before the answer, which goes from the right
        (3, 9, 1, [1, 4, 5, 6, 7]),
        (0, 9, None, [1, 2, 3, 4, 5]),
    ],
)
def test_truncation_keeps_answers(prompt, answer, bos, expected):
    cut = fit_example(example(prompt, answer), 4, bos)
    assert cut.ids.tolist() == expected
    assert cut.answer.tolist() == [index > prompt for index in expected]
    assert cut.has_target
