"""Chat templates render as in transformers, and cannot make texts without end."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from nalora_jax.data import chat_templates
from nalora_jax.data.chat_templates import EndlessTemplateError, render_template

CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}},
}
MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b> & kind — 東京 🙂."},
    {"role": "user", "content": "What's the weather in Paris?  \n"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": '{"celsius": 12.5}'},
    {"role": "assistant", "content": "<think>\nrain?\n</think>\n\n12.5 degrees."},
]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
# Templates of widely used models, as they were published (Qwen's without its longest branches).
TEMPLATES = {
    path.stem: path.read_text()
    for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    for tools, prompt in product((None, TOOLS), (False, True)):
        variables = {"tools": tools, "add_generation_prompt": prompt, **special}
        expected, _ = render_jinja_template(
            conversations=[MESSAGES], chat_template=TEMPLATES[name], **variables
        )
        assert [render_template(TEMPLATES[name], {"messages": MESSAGES, **variables})] == expected


HOSTILE = {
    "a repetition": ("{{ 'a' * 10**9 }}", "4,000,000 characters"),
    "a long text": (
        "{% for i in range(9999) %}{{ 'a' * 1000 }}{% endfor %}",
        "4,000,000 characters",
    ),
    "a format's width": ("{{ '%1000000000d' % 1 }}", "width"),
    "a format's width as a value": ("{{ '%*d' % (10**9, 1) }}", "width"),
    "a namespace that doubles by ~": (
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "4,000,000 characters",
    ),
    "a number that doubles its digits": (
        "{% set n = namespace(x=10) %}{% for i in range(18) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x > 1 }}",
        "number of more than 4,300 digits",
    ),
    "a power of a long number": ("{{ (10**4000) ** 4000 }}", "power above 4,300"),
    "a long number": ("{{ 10**5000 }}", "power above 4,300"),
    "no template": ("{{ x", "unexpected end"),
    "nested brackets": ("{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", "recursion"),
    "nested blocks": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "recursion|nested"),
    "foreign classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "a change of the messages": ("{{ messages.append(1) }}", "unsafe"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_an_error(name):
    template, reason = HOSTILE[name]
    with pytest.raises(Exception, match=f"(?i){reason}"):
        render_template(template, {"messages": MESSAGES})


def test_operators_of_real_templates_are_those_of_jinja():
    template = "{{ 2 ** 3 }} {{ 7 % 4 }} {{ 'ab' * 2 }} {{ 1 ~ 'b' ~ none }} {{ '%s-%d' % ('a', 2) }} {{ [1] + [2] }}"
    assert render_template(template, {}) == "8 3 abab 1bNone a-2 [1, 2]"
    values = {"x": {"a": np.float64(0.5), "b": np.arange(2)}}  # of table files
    assert render_template("{{ x | tojson }}", values) == '{"a": 0.5, "b": [0, 1]}'


# They write nothing, and end after a second without a limit, so that a fault cannot hang the test.
VALUES = "{% set values = range(3000) | list %}"
MACRO = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
ENDLESS = {
    "loops in loops": VALUES + "{% for i in values %}{% for j in values %}{% endfor %}{% endfor %}",
    "a loop's condition": VALUES
    + "{% for i in values if values | sort | length == 1 %}{% endfor %}",
    "a macro that calls itself twice": MACRO + "{{ f(18) }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_without_end_are_stopped_by_the_clock(monkeypatch, name):
    monkeypatch.setattr(chat_templates, "_MAX_SECONDS", 0.02)
    with ThreadPoolExecutor(1) as threads:  # the limit needs no signals
        rendering = threads.submit(render_template, ENDLESS[name], {})
        message = (
            "chat template: expected a text within 0.02 seconds of CPU time, found .*; use the"
        )
        with pytest.raises(EndlessTemplateError, match=message):
            rendering.result()
    assert render_template("{% for i in range(3) %}{{ i }}{% endfor %}", {}) == "012"
