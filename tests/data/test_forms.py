"""ShareGPT, Alpaca, OpenAI's tool calls and conversational prompts are the same examples in other
words."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from nalora_jax.config import DataConfig
from nalora_jax.data.chat_text import render_record
from nalora_jax.data.forms import form_of
from nalora_jax.data.sources import open_source
from tests.data.loss_tokens import learned

CONFIG = DataConfig()
TEMPLATE = (Path(__file__).parent / "templates" / "qwen_tools.jinja").read_text()
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which way is up?"},
    {"role": "assistant", "content": "The sky."},
]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "A city's.", "parameters": SCHEMA},
    }
]
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}
TOOL_TALK = [
    {"role": "user", "content": "Is it warm in Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": '{"celsius": 21}'},
    {"role": "assistant", "content": "It is: 21 degrees."},
]


@pytest.fixture
def with_tools(tokenizer):
    return replace(tokenizer, chat_template=TEMPLATE)


def text_of(record, tokenizer, **options):
    return render_record(record, DataConfig(**options), tokenizer, "here").text


def by_transformers(tokenizer, messages, tools=None):
    (text,), _ = render_jinja_template(
        conversations=[messages], tools=tools, chat_template=tokenizer.chat_template
    )
    return text.rstrip()


WITH_TOOLS = {"messages": TOOL_TALK, "tools": TOOLS}
FUNCTIONS = [
    {"from": "human", "value": "Is it warm in Paris?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
    {"from": "observation", "value": '{"celsius": 21}'},
    {"from": "gpt", "value": "It is: 21 degrees."},
]
SHAREGPT = "ShareGPT conversations (conversations: from, value)"
SPOKEN = [{"from": "human", "value": "Which way is up?"}, {"from": "gpt", "value": "The sky."}]
IN_PARTS = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}


@pytest.mark.parametrize(
    ("record", "same", "form"),
    [
        ({"prompt": TALK[:2], "completion": TALK[2:]}, {"messages": TALK}, "chat messages (prompt and completion)"),
        ({"system": "Be brief.", "conversations": SPOKEN}, {"messages": TALK}, SHAREGPT),
        ({"messages": [IN_PARTS, *TALK[1:]]}, {"messages": TALK}, "chat messages (messages)"),
        ({"conversations": FUNCTIONS, "tools": json.dumps(TOOLS)}, WITH_TOOLS, SHAREGPT),
    ],
)  # fmt: skip
def test_conversations_are_the_same_in_every_form(with_tools, record, same, form):
    expected = render_record(same, CONFIG, with_tools, "here")
    assert render_record(record, CONFIG, with_tools, "here") == expected
    assert form_of(record, CONFIG) == form


def test_alpaca_is_written_by_its_own_prompt_or_by_the_chat_template(tokenizer):
    record = {"instruction": "Add {input}.", "input": "2, 2", "output": "4"}
    rendered = render_record(record, CONFIG, tokenizer, "here")
    begin = "Below is an instruction that describes a task, paired with an input that"
    assert rendered.text.startswith(begin)
    end = "\n\n### Instruction:\nAdd {input}.\n\n### Input:\n2, 2\n\n### Response:\n4"
    assert rendered.text.endswith(end)
    assert [rendered.text[start:stop] for start, stop in rendered.answers] == ["4"]
    assert "nput" not in text_of(record | {"instruction": "Add.", "input": ""}, tokenizer)
    question = {"role": "user", "content": "Add {input}.\n\n2, 2"}
    same = {"messages": [question, {"role": "assistant", "content": "4"}]}
    assert text_of(record, tokenizer, chat=True) == text_of(same, tokenizer)
    assert "the chat template" in form_of(record, replace(CONFIG, chat=True))
    named = {
        "prompt_field": "instruction",
        "completion_field": "output",
    }  # fields that somebody named win
    assert text_of(record, tokenizer, **named) == "Add {input}.4"


def test_tool_calls_are_rendered_as_transformers_renders_them(with_tools):
    """Arguments and tools as objects or as JSON, with the nulls in them."""
    talk, tools = copy.deepcopy(TOOL_TALK), copy.deepcopy(TOOLS)
    arguments = {"city": "Paris", "day": None, "hours": [1, None]}
    talk[1] |= {
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}],
    }
    tools[0]["function"]["parameters"]["properties"]["day"] = {
        "default": None,
        "enum": ["today", None],
    }
    expected = by_transformers(with_tools, talk, tools)
    assert '"day": null' in expected
    assert '"default": null' in expected
    written = copy.deepcopy(talk)
    written[1]["content"] = None
    written[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(arguments)
    for messages in (talk, written):
        for given in (tools, json.dumps(tools), [json.dumps(tool) for tool in tools]):
            record = {"messages": messages, "tools": given}
            assert text_of(record, with_tools, loss_on="all") == expected
    call, answer = learned(WITH_TOOLS, with_tools, loss_on="assistant")
    assert '{"name": "weather", "arguments": {"city": "Paris"}}' in call
    assert answer == "It is: 21 degrees.<|im_end|>"


def test_what_arrow_fills_up_with_nulls_is_left_out(with_tools, tmp_path):
    paris = {"name": "weather", "arguments": {"city": "Paris"}}
    functions = paris, {"name": "stop", "arguments": {"city": None, "now": True}}
    calls = [{"type": "function", "id": "1", "function": function} for function in functions]
    talks = [
        [*TOOL_TALK[:1], {"role": "assistant", "tool_calls": [call]}, *TOOL_TALK[2:]]
        for call in calls
    ]
    table = pa.Table.from_pylist([{"messages": talk, "tools": TOOLS} for talk in talks])
    pq.write_table(table, tmp_path / "a.parquet")
    record = open_source(DataConfig(dataset=str(tmp_path / "a.parquet")), "train")[0]
    assert record["messages"][0]["tool_calls"] is None
    assert record["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "city": "Paris",
        "now": None,
    }
    same = render_record(WITH_TOOLS, CONFIG, with_tools, "x")
    assert render_record(record, CONFIG, with_tools, "x") == same


REASONING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
    "</think>{% endif %}{% if m.thinking %}[{{ m.thinking }}]{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning": "It is high."},
        {"thinking": "It is high.", "reasoning": "No.", "reasoning_content": None},
    ],
)
def test_reasoning_is_rendered_under_every_name(tokenizer, fields):
    ours, talk = replace(tokenizer, chat_template=REASONING_TEMPLATE), [*TALK[:2], TALK[2] | fields]
    rendered = render_record({"messages": talk}, CONFIG, ours, "here")
    ((start, stop),) = rendered.answers
    assert rendered.text[start:stop] == "<think>It is high.</think>[It is high.]The sky.<|im_end|>"
