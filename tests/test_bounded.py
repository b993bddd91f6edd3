"""Strangers' programs: the same results as jinja2 and ``re``, and an error instead of a machine at its end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from nalora_jax import bounded
from nalora_jax.bounded import BoundedError, matches, render
from nalora_jax.errors import NaloraError
from nalora_jax.path_rules import match_rules
from nalora_jax.tokenizer import Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b> & kind — 東京 🙂."},
    {"role": "user", "content": "What's the weather in Paris?  \n"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}}}
        ],
    },
    {"role": "tool", "name": "weather", "content": '{"celsius": 12.5}'},
    {"role": "assistant", "content": "<think>\nrain?\n</think>\n\n12.5 degrees."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
# Templates of widely used models, as they were published (Qwen's without its longest branches).
TEMPLATES = {
    path.stem: path.read_text() for path in sorted((Path(__file__).parent / "data/templates").iterdir())
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_templates_render_as_in_transformers(name: str, tools: Any) -> None:
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    for prompt in (False, True):
        variables = {"messages": MESSAGES, "tools": tools, "add_generation_prompt": prompt, **settings}
        expected, _ = render_jinja_template(
            conversations=[MESSAGES],
            tools=tools,
            chat_template=TEMPLATES[name],
            add_generation_prompt=prompt,
            **settings,
        )
        assert render(TEMPLATES[name], [variables]) == expected


def test_several_texts_and_templates_in_turn() -> None:
    for _ in range(2):
        assert render("{{ x }}!", [{"x": 1}, {"x": "b"}, {"x": None}]) == ["1!", "b!", "None!"]
        assert render("{{ x | tojson }}", [{"x": np.float64(0.5)}, {"x": np.arange(2)}]) == [
            "0.5",
            "[0, 1]",
        ]
        with pytest.raises(BoundedError, match="TemplateSyntaxError"):
            render("{{ x", [{"x": 1}])


HOSTILE = {
    "a constant of a gigabyte, folded when it is compiled": ("{{ 'a' * 10**9 }}", "memory"),
    "a long text": ("{{ 'a' * 10**7 }}", "65,536 characters"),
    "a long text beside the messages": (
        "{{ 'a ' * 1500000 }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "65,536",
    ),
    "a format's width": ("{{ '%1000000000d' % 1 }}", "memory"),
    "a formatted width": ("{{ '{:>1000000000}'.format(1) }}", "memory"),
    "center": ("{{ 'a' | center(10**9) }}", "memory"),
    "indented JSON": ("{{ messages | tojson(indent=10**9) }}", "memory"),
    "a namespace that doubles": (
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "memory",
    ),
    "a long number": ("{{ 10**5000 }}", "4300 digits"),
    "break outside a loop": ("{% break %}", "SyntaxError"),
    "nested brackets": ("{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", "RecursionError"),
    "nested blocks": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "RecursionError"),
    "foreign classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_an_error(name: str) -> None:
    template, reason = HOSTILE[name]
    with pytest.raises(BoundedError, match=reason):
        render(template, [{"messages": MESSAGES}])
    assert render("{{ x }}", [{"x": "alive"}]) == ["alive"]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A helper of this test's own, with half a second for each call."""
    helper = bounded._Helper()
    monkeypatch.setattr(bounded, "SECONDS", 0.5)
    monkeypatch.setattr(bounded, "_HELPER", helper)
    yield helper
    helper.stop()


def test_endless_loops_end(impatient: Any) -> None:
    nested = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(BoundedError, match=r"more than 0\.5 seconds"):
        render(nested, [{}])
    assert render("{{ 1 }}", [{}]) == ["1"]


def test_all_texts_of_a_template_have_a_budget_together(
    impatient: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "_TOTAL_SECONDS", 0.02)
    monkeypatch.setattr(bounded, "_TEXT_SECONDS", 0.0)
    slow = "{% for a in range(99999) %}{% endfor %}{{ x }}"
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = Tokenizer(backend, None, 0, 0, (0,), chat_template=slow, add_bos=False)

    def many() -> None:
        for _ in range(100):
            tokenizer.render_chat(MESSAGES)

    with pytest.raises(
        NaloraError, match=r"chat template: .* found \d+\.\d seconds for \d+ texts of one template"
    ):
        many()
    assert render("{{ x }}", [{"x": "another template"}]) == ["another template"]


def test_the_budget_grows_with_the_texts() -> None:
    helper = bounded._Helper()
    helper.charge("slow to begin with", 1, 9.0)
    helper.charge("slow to begin with", 1000, 50.0)
    helper.charge("another", 1, 9.0)
    with pytest.raises(BoundedError, match=r"69\.0 seconds for 1,101 texts"):
        helper.charge("slow to begin with", 100, 10.0)


def test_a_text_may_be_as_long_as_what_it_is_made_of_needs() -> None:
    assert render("{{ x }}{{ x }}", [{"x": "a" * 100_000}, {"x": "b" * 10}]) == ["a" * 200_000, "b" * 20]
    with pytest.raises(BoundedError, match="of more than 320,288 characters"):
        render("{% for i in range(33) %}{{ x }}{% endfor %}", [{"x": "a" * 10_000}])


def test_expressions_that_backtrack_for_ever_end(impatient: Any) -> None:
    with pytest.raises(BoundedError, match=r"more than 0\.5 seconds"):
        matches(["(a+)+$"], ["a" * 40 + "b"])
    assert matches(["a+"], ["aa", "b"]) == [["", None]]


def test_rules_that_backtrack_for_ever_are_a_typed_error(impatient: Any) -> None:
    for pattern in ("((([a-z/_*]+)+)+)+X", "(a|.)" * 30 + "X"):
        with pytest.raises(
            NaloraError, match=r"--lora\.rules: expected patterns that are matched.*0\.5 seconds"
        ):
            match_rules(
                [("ffn", 1), (pattern, 2)], ["a" * 39, "layers/*/ffn/gate_proj"], where="--lora.rules"
            )
    rules = [("(q|v)_proj", 1), ("^ffn", 2), ("attn.*proj", 3)]
    names = ["attn/q_proj", "attn/k_proj", "ffn", "norm"]
    assert match_rules(rules, names, where="here") == {"attn/q_proj": 1, "attn/k_proj": 3, "ffn": 2}


def test_common_rules_need_no_helper() -> None:
    assert all(
        map(bounded._HARMLESS.fullmatch, ("ffn", "ffn/gate_proj", "attn/(q|v)_proj", "^vision|head$", ""))
    )
    assert not any(
        map(bounded._HARMLESS.fullmatch, ("a+", "(a|b)(c|d)", "((a))", "a.*b", "(a)*", "(a){9}"))
    )


def test_expressions_match_as_in_python() -> None:
    names = ["model.layers.3.mlp.up_proj", "model.layers.12.self_attn.q_proj", "lm_head", ""]
    patterns = [
        r"mlp.up_proj",
        r"^lm_head$",
        r".*\.(up|q)_proj",
        r"(?:^|.*?\.)layers\.(?P<idx>\d+)\.",
        r"lm-head",
        "",
    ]
    patterns += ["self_attn.(q|v)_proj|^mlp", "(?:a|b)/c", "(q|v)_(proj|x)"]
    for how in ("match", "fullmatch", "search"):
        for pattern, row in zip(patterns, matches(patterns, names, how=how), strict=True):
            for name, found in zip(names, row, strict=True):
                expected = getattr(re, how)(pattern, name)
                assert (found is None) == (expected is None)
                if expected is not None and "idx" in expected.re.groupindex:
                    assert found == expected["idx"]


@pytest.mark.parametrize(
    "pattern", ["(", "a{99999999999}", "(?P<idx>a)(?P<idx>b)", "(?<=a+)b", "(" * 5000 + ")" * 5000]
)
def test_expressions_that_do_not_compile(pattern: str) -> None:
    with pytest.raises(BoundedError):
        matches([pattern], ["a"])


def test_a_fork_has_a_helper_of_its_own() -> None:
    program = (
        "import os\nfrom nalora_jax.bounded import render\n"
        "print(render('{{ x }}', [{'x': 'before'}]), flush=True)\n"
        "child = os.fork()\n"
        "print(render('{{ x }}', [{'x': 'child' if child == 0 else 'parent'}]), flush=True)\n"
        "os.waitpid(child, 0) if child else None\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()) == ["['before']", "['child']", "['parent']"]
