from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from nalora_jax.config import DataConfig
from nalora_jax.data.chat import render_record
from nalora_jax.data.tokenize import Example, fit_example, tokenize
from nalora_jax.errors import NaloraError

CONFIG = DataConfig()
TALK = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Which way is up?"},
    {"role": "assistant", "content": "the sky"},
    {"role": "user", "content": "Tell me more"},
    {"role": "assistant", "content": "\n\nYes, the green hills"},
]


def answers(record, tokenizer, **options):
    """What the loss sees of a record: the text of each run of target tokens."""
    config = dataclasses.replace(CONFIG, **options)
    (example,) = tokenize([render_record(record, config, tokenizer, "here")], tokenizer)
    runs, ids = [], []
    for token, counts in zip(example.ids, example.answer, strict=True):
        if counts:
            ids.append(token)
        elif ids:
            runs.append(tokenizer.decode(ids, skip_special=False))
            ids = []
    return [*runs, tokenizer.decode(ids, skip_special=False)] if ids else runs


def test_completion_counts_with_its_end(tokenizer):
    record = {"prompt": "Question: Which way is up?\nAnswer:", "completion": " the sky"}
    assert answers(record, tokenizer) == [" the sky<|im_end|>"]
    assert answers(record, tokenizer, loss_on="all") == [record["prompt"] + " the sky<|im_end|>"]


def test_boundary_is_that_of_separate_texts(tokenizer):
    # Also where one token would span it: the prompt's tokens are what the model reads when it answers.
    for prompt, completion in [
        ("Answer:", " Paris"),
        ("Yes\n", "\n\nNo"),
        ("the capit", "al of"),
        ("", "Paris"),
    ]:
        (example,) = tokenize(
            [render_record({"prompt": prompt, "completion": completion}, CONFIG, tokenizer, "")], tokenizer
        )
        cut = len(tokenizer.encode(prompt))
        assert example.ids.tolist() == [
            *tokenizer.encode(prompt),
            *tokenizer.encode(completion),
            tokenizer.eos_id,
        ]
        assert example.answer.tolist() == [index >= cut for index in range(len(example.ids))]


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
    assert answers({"messages": TALK}, tokenizer, loss_on=loss_on) == expected


def test_turn_without_special_end_gets_one(tokenizer):
    plain = dataclasses.replace(
        tokenizer,
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    assert answers({"messages": TALK[1:3]}, plain) == ["the sky<|im_end|>"]
    assert answers({"messages": TALK[1:]}, plain, loss_on="assistant")[0] == "the sky"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"body": "x"},
            r"here: expected a field 'prompt' \(or 'messages'\), found 'body'; .*--data.prompt-field",
        ),
        ({"text": 3}, "here: completion: expected a text, found a int"),
        ({}, "found no field"),
        ({"prompt": "x"}, "expected a field 'completion', found 'prompt'; .*--data.completion-field"),
        ({"prompt": 3, "completion": "x"}, "here: prompt: expected a text, found a int"),
        ({"prompt": "x", "completion": ""}, "here: completion: expected an answer, found an empty text"),
        ({"messages": []}, "here: messages: expected a list of chat messages, found none"),
        ({"messages": "hi"}, "found a str"),
        ({"messages": {"role": "user", "content": "hi"}}, "a list of chat messages, found a dict"),
        ({"prompt": "\udfff", "completion": "x"}, "prompt: expected Unicode text, found half a character"),
        ({"messages": ["hi"]}, r"here: messages\[0\]: expected \{\"role\""),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: expected a field 'content', found 'role'"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]: content: expected a text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "expected an assistant's turn"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "expected a user's or system's message first",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " \n"}]},
            "here: message 2 of 2: expected an assistant's answer, found an empty text; the model would",
        ),
    ],
)
def test_bad_records_name_the_field(tokenizer, record, message):
    with pytest.raises(NaloraError, match=message):
        render_record(record, CONFIG, tokenizer, "here")


PHI_3 = (Path(__file__).parent / "templates" / "phi_3.jinja").read_text()


@pytest.mark.parametrize("loss_on", ["answer", "assistant"])
def test_answers_of_phi_3_end_with_their_end_of_turn_token(tokenizer, loss_on):
    """Its template writes an end-of-sequence token after the conversation, which is not part of the last turn."""
    phi = dataclasses.replace(tokenizer, chat_template=PHI_3, special_tokens={"eos_token": "<|endoftext|>"})
    rendered = render_record({"messages": TALK}, DataConfig(loss_on=loss_on), phi, "here")
    expected = ["the sky<|end|>", "\n\nYes, the green hills<|end|>"]
    assert [rendered.text[start:stop] for start, stop in rendered.answers] == expected[
        -1 if loss_on == "answer" else 0 :
    ]
    whole = phi.render_chat(TALK)
    assert whole == rendered.text + "\n<|endoftext|>"


def test_an_end_of_sequence_token_that_ends_every_turn_is_part_of_the_answer(tokenizer):
    end = "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    template = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    mistral = dataclasses.replace(
        tokenizer, chat_template=template, special_tokens={"eos_token": "<|im_end|>"}
    )
    expected = ["the sky<|im_end|>", "\n\nYes, the green hills<|im_end|>"]
    assert answers({"messages": TALK}, mistral, loss_on="assistant") == expected
    assert answers({"messages": TALK}, mistral) == expected[-1:]


@pytest.mark.parametrize(
    ("role", "meant"),
    [("usr", "user"), ("User", "user"), ("human", "user"), ("asistant", "assistant"), ("gpt", "assistant")],
)
def test_misspelt_roles_are_refused_with_a_suggestion(tokenizer, role, meant):
    talk = [{"role": role, "content": "Which way is up?"}, *TALK[2:]]
    with pytest.raises(NaloraError, match=rf"here: messages\[0\]: role: .*found '{role}'; write '{meant}'"):
        render_record({"messages": talk}, CONFIG, tokenizer, "here")


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
