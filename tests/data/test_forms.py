"""ShareGPT, Alpaca, OpenAI's tool calls and conversational prompts are the same examples in other words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nalora_jax.config import DataConfig
from nalora_jax.data.chat import render
from nalora_jax.data.forms import form_of
from nalora_jax.data.questions import eval_examples
from nalora_jax.data.sources import open_source
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError

CONFIG = DataConfig()
TEMPLATE = (Path(__file__).parent / "templates" / "qwen_tools.jinja").read_text()
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which way is up?"},
    {"role": "assistant", "content": "The sky."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOL_TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Is it warm in Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": '{"celsius": 21}'},
    {"role": "assistant", "content": "It is: 21 degrees."},
]


@pytest.mark.parametrize(
    ("record", "form"),
    [
        ({"messages": TALK}, "chat messages (messages)"),
        ({"prompt": TALK[:2], "completion": TALK[2:]}, "chat messages (prompt and completion)"),
        (
            {
                "system": "Be brief.",
                "conversations": [
                    {"from": "human", "value": "Which way is up?"},
                    {"from": "gpt", "value": "The sky."},
                ],
            },
            "ShareGPT conversations (conversations: from, value)",
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                    *TALK[1:],
                ]
            },
            "chat messages (messages)",
        ),
    ],
)
def test_conversations_are_the_same_in_every_form(
    tokenizer: Tokenizer, record: dict[str, Any], form: str
) -> None:
    assert render(record, CONFIG, tokenizer, "here") == render(
        {"messages": TALK}, CONFIG, tokenizer, "here"
    )
    assert form_of(record, CONFIG) == form


def test_alpaca_is_written_by_its_own_prompt_or_by_the_chat_template(tokenizer: Tokenizer) -> None:
    record = {"instruction": "Add {input}.", "input": "2, 2", "output": "4"}
    rendered = render(record, CONFIG, tokenizer, "here")
    assert rendered.text.startswith(
        "Below is an instruction that describes a task, paired with an input that provides"
    )
    assert rendered.text.endswith(
        "\n\n### Instruction:\nAdd {input}.\n\n### Input:\n2, 2\n\n### Response:\n4"
    )
    assert [rendered.text[start:stop] for start, stop in rendered.answers] == ["4"]
    short = render(record | {"input": ""}, CONFIG, tokenizer, "here").text
    assert "### Input" not in short
    chat = replace(CONFIG, chat=True)
    same = {
        "messages": [
            {"role": "user", "content": "Add {input}.\n\n2, 2"},
            {"role": "assistant", "content": "4"},
        ]
    }
    assert render(record, chat, tokenizer, "here") == render(same, chat, tokenizer, "here")
    assert "the chat template" in form_of(record, chat)
    named = replace(CONFIG, prompt_field="instruction", completion_field="output")
    assert (
        render(record, named, tokenizer, "here").text == "Add {input}.4"
    )  # fields that somebody named win


def test_tool_calls_are_rendered_as_transformers_renders_them(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, chat_template=TEMPLATE
    )
    objects = json.loads(json.dumps(TOOL_TALK))
    objects[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Paris"}
    objects[1]["content"] = ""
    expected = theirs.apply_chat_template(objects, tools=TOOLS, tokenize=False)
    assert "weather" in expected
    assert "<tool_call>" in expected
    ours = replace(tokenizer, chat_template=TEMPLATE)
    for tools in (TOOLS, json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS]):
        rendered = render(
            {"messages": TOOL_TALK, "tools": tools}, replace(CONFIG, loss_on="all"), ours, "here"
        )
        assert rendered.text == expected.rstrip()
    turns = render(
        {"messages": TOOL_TALK, "tools": TOOLS}, replace(CONFIG, loss_on="assistant"), ours, "here"
    )
    call, answer = (turns.text[start:stop] for start, stop in turns.answers)
    assert '{"name": "weather", "arguments": {"city": "Paris"}}' in call
    assert answer == "It is: 21 degrees.<|im_end|>"


def test_a_call_can_be_the_answer_that_is_scored(
    tokenizer: Tokenizer, write_jsonl: Any, tmp_path: Path
) -> None:
    path = write_jsonl(*[{"messages": TOOL_TALK[:2], "tools": TOOLS}] * 3)
    ours = replace(tokenizer, chat_template=TEMPLATE)
    config = DataConfig(dataset="unread.jsonl", eval_split=path)
    item = eval_examples(config, ours, split=path)[0]
    assert item.completion.startswith("<tool_call>")
    assert item.completion.endswith("</tool_call>")


def test_functions_of_sharegpt_are_tool_calls(tokenizer: Tokenizer) -> None:
    ours = replace(tokenizer, chat_template=TEMPLATE)
    record = {
        "conversations": [
            {"from": "human", "value": "Is it warm in Paris?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
            {"from": "observation", "value": '{"celsius": 21}'},
            {"from": "gpt", "value": "It is: 21 degrees."},
        ],
        "tools": json.dumps(TOOLS),
    }
    assert render(record, CONFIG, ours, "x") == render(
        {"messages": TOOL_TALK, "tools": TOOLS}, CONFIG, ours, "x"
    )


def test_what_arrow_fills_up_with_nulls_is_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "stop", "arguments": {"city": None, "now": True}}}
    objects = [{**call, "id": "1"} for call in (CALL, other)]
    objects[0] = {**objects[0], "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    talks = [
        [*TOOL_TALK[:1], {"role": "assistant", "tool_calls": [call]}, *TOOL_TALK[2:]] for call in objects
    ]
    pq.write_table(
        pa.Table.from_pylist([{"messages": talk, "tools": TOOLS} for talk in talks]), tmp_path / "a.parquet"
    )
    record = open_source(DataConfig(dataset=str(tmp_path / "a.parquet")), "train")[0]
    assert record["messages"][0]["tool_calls"] is None
    assert record["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris", "now": None}
    ours = replace(tokenizer, chat_template=TEMPLATE)
    assert render(record, CONFIG, ours, "x") == render(
        {"messages": TOOL_TALK, "tools": TOOLS}, CONFIG, ours, "x"
    )


NULLS: dict[str, Any] = {
    "messages": [
        *TOOL_TALK[:1],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {
                        "name": "weather",
                        "arguments": {"city": "Paris", "day": None, "hours": [1, None]},
                    },
                }
            ],
        },
        *TOOL_TALK[2:],
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "parameters": {
                    "type": "object",
                    "properties": {"day": {"default": None, "enum": ["today", None]}},
                },
            },
        }
    ],
}


@pytest.mark.parametrize("text", [False, True], ids=["objects", "JSON in texts"])
def test_nulls_in_arguments_and_schemas_are_rendered_as_transformers_renders_them(
    tokenizer: Tokenizer, text: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, chat_template=TEMPLATE
    )
    expected = theirs.apply_chat_template(NULLS["messages"], tools=NULLS["tools"], tokenize=False)
    assert '"day": null' in expected
    assert '"default": null' in expected
    record = json.loads(json.dumps(NULLS))
    if text:
        function = record["messages"][1]["tool_calls"][0]["function"]
        function["arguments"] = json.dumps(function["arguments"])
        record["tools"] = json.dumps(record["tools"])
    ours = replace(tokenizer, chat_template=TEMPLATE)
    assert render(record, replace(CONFIG, loss_on="all"), ours, "here").text == expected.rstrip()


REASONING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
    "</think>{% endif %}{% if m.thinking %}[{{ m.thinking }}]{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "It is high."},
        {"reasoning": "It is high."},
        {"thinking": "It is high."},
        {"thinking": "It is high.", "reasoning": "No.", "reasoning_content": None},
    ],
    ids=", ".join,
)
def test_reasoning_is_rendered_under_every_name_as_in_transformers(
    tokenizer: Tokenizer, fields: dict
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, chat_template=REASONING_TEMPLATE
    )
    talk = [*TALK[:2], TALK[2] | fields]
    expected = theirs.apply_chat_template(talk, tokenize=False)
    assert "<think>It is high.</think>" in expected
    ours = replace(tokenizer, chat_template=REASONING_TEMPLATE)
    rendered = render({"messages": talk}, CONFIG, ours, "here")
    assert rendered.text == expected.rstrip()
    ((start, stop),) = rendered.answers
    assert rendered.text[start:stop] == "<think>It is high.</think>[It is high.]The sky.<|im_end|>"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            r"messages\[0\]: from: expected one of human, ",
        ),
        ({"instruction": ["x"], "output": "y"}, "instruction: expected a text, found a list"),
        ({"messages": TALK, "tools": "no json"}, "tools: expected a JSON list of tools"),
        ({"messages": TALK, "tools": "[" * 100_000}, "tools: expected a JSON list of tools"),
        (
            {"messages": [*TALK[:2], {"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]},
            r"messages\[2\]: tool_calls\[0\]: expected",
        ),
        (
            {
                "messages": [
                    *TALK[:2],
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                ]
            },
            "arguments: expected a JSON object",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "content: expected a text, or",
        ),
    ],
)
def test_bad_records_are_named(tokenizer: Tokenizer, record: dict[str, Any], said: str) -> None:
    with pytest.raises(NaloraError, match=said):
        render(record, CONFIG, tokenizer, "here")
