"""`nalora chat` and `nalora generate --messages` on a tiny model, with scripted input."""

from __future__ import annotations

import json
import shutil
import string
import sys
from io import StringIO

import pytest

from nalora_jax.__main__ import main
from nalora_jax.config import LoRARule
from nalora_jax.evaluate.generate import Generator, programs
from nalora_jax.loading.adapted import load
from tests import tiny

WORDS = ["<end>", "<unk>", "system", "user", "assistant", *string.ascii_lowercase]
HF = tiny.HF | {"vocab_size": len(WORDS), "num_key_value_heads": 1, "intermediate_size": 24}
HF |= {"max_position_embeddings": 96}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
SETTINGS = ["--max-new-tokens", "4", "--temperature", "0", "--dtype", "float32"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama with a chat template, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "base"
    return tiny.make_model(folder, HF, tiny.word_tokenizer(WORDS, TEMPLATE), spread=3.0)


@pytest.fixture(scope="module")
def adapters(base):
    """Two adapters of different ranks, scales and places."""
    rules = [(LoRARule("ffn/", 2),), (LoRARule("layers/1/ffn", 0), LoRARule("", 5, 3.0))]
    return [
        tiny.make_adapter(base.parent / f"adapter{i}", base, rules[i], 0.25, seed=i)
        for i in range(2)
    ]


def talk(monkeypatch, capsys, model, lines, *flags):
    """Answers, and what was said beside them."""
    monkeypatch.setattr(sys, "stdin", StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", str(model), *SETTINGS, *flags]) == 0
    out, err = capsys.readouterr()
    return out.splitlines(), err


def answer(model, messages, adapter=None):
    """What the model itself says to a conversation, its adapter in its own shapes."""
    loaded = load(model, adapter=adapter, dtype="float32")
    text = "".join(f"{role} {text} " for role, text in messages) + "assistant "
    generator = Generator(loaded.module, loaded.variables, loaded.base.tokenizer)
    return generator.generate([loaded.base.tokenizer.encode(text)], max_new_tokens=4)[0]


def test_a_conversation_remembers_its_turns_and_its_system_prompt(base, monkeypatch, capsys):
    lines = ["a b c", "", "d e", "/reset", "/system", "d e"]
    said, _ = talk(monkeypatch, capsys, base, lines, "--system", "x y")
    first = answer(base, [("system", "x y"), ("user", "a b c")])
    asked = [("system", "x y"), ("user", "a b c"), ("assistant", first), ("user", "d e")]
    assert said == [first, answer(base, asked), answer(base, [("user", "d e")])]
    assert len(set(said)) == 3


def test_adapters_take_turns_in_a_conversation_and_nothing_is_compiled(
    base, adapters, monkeypatch, capsys
):
    one, two = adapters
    counts, stream = [], Generator.stream

    def counting(self, *given, **settings):
        counts.append(programs.prefill._cache_size() + programs.decode._cache_size())
        return stream(self, *given, **settings)

    monkeypatch.setattr(Generator, "stream", counting)
    lines = ["a b c"]
    for path in (two, "none", one):
        lines += ["/reset", f"/adapter {path}", "a b c"]
    said, err = talk(monkeypatch, capsys, base, lines, "--adapter", str(one))
    asked = [("user", "a b c")]
    assert said == [answer(base, asked, adapter) for adapter in (one, two, None, one)]
    assert len(set(said)) == 3
    assert f"{base} + {two}" in err
    assert 0 < counts[1] == counts[-1]  # programs before each answer: those of the first serve all


@pytest.mark.parametrize(("in_turns", "warned"), [(False, True), (True, False)])
def test_an_adapter_that_was_trained_without_a_template_is_warned_of(
    base, adapters, monkeypatch, capsys, tmp_path, in_turns, warned
):
    run = tmp_path / "run"
    shutil.copytree(adapters[0], run / "adapter")
    record = {"run": {"model": str(base)}, "data": {"in_turns": in_turns}}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    for model, lines in ((run, []), (base, [f"/adapter {run}"])):
        _, err = talk(monkeypatch, capsys, model, lines)
        assert ("was trained on prompts without a chat template" in err) == warned


def test_what_is_wrong_is_said_and_the_conversation_goes_on(
    base, adapters, tmp_path, monkeypatch, capsys
):
    lines = ["/adapter nowhere", "/adaptr x", "/image a.png", "/help", "a " * 200, "a b c", "/exit"]
    lines += ["never said"]
    said, err = talk(monkeypatch, capsys, base, lines)
    assert said == [answer(base, [("user", "a b c")])]
    for text in (
        "error: nowhere: expected a folder with adapter_config.json",
        "error: /adaptr: expected /help, /adapter",
        f"error: /image: expected a vision-language model, found {base}, which was loaded as a lang",
        "error: prompt: expected fewer than 96 tokens (the context), found",
        "/system TEXT",
    ):
        assert text in err


def test_a_model_without_a_chat_template_is_refused(tmp_path, capsys):
    model = tiny.make_model(tmp_path / "model")
    assert main(["chat", str(model), *SETTINGS]) == 2
    error = (
        f"error: {model}: expected a model with a chat template, found none in its tokenizer; use"
    )
    assert capsys.readouterr().err.splitlines()[-1].startswith(error)


def test_an_interrupt_ends_the_answer_and_not_the_conversation(base, monkeypatch, capsys):
    stream = Generator.stream

    def interrupted(self, *given, **settings):
        yield next(stream(self, *given, **settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "stream", interrupted)
    said, err = talk(monkeypatch, capsys, base, ["a b c", "d"])
    assert len(said) == 2
    assert err.count("...") == 2


def test_generate_takes_messages(base, tmp_path, capsys):
    messages = [{"role": "system", "content": "x y"}, {"role": "user", "content": "a b c"}]
    file = tmp_path / "messages.json"
    file.write_text(json.dumps({"messages": messages}))
    assert main(["generate", str(base), "--messages", str(file), *SETTINGS]) == 0
    assert capsys.readouterr().out == answer(base, [("system", "x y"), ("user", "a b c")]) + "\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "expected --prompt or --messages, found neither"),
        ("{", "expected a JSON file"),
        (
            '{"messages": 3}',
            'expected a list of messages, or an object with "messages", found a int',
        ),
        ('[{"role": "usr", "content": "a"}]', "messages[0]: role: expected a role"),
        ('[{"role": "assistant", "content": "a"}]', "expected a user's message last"),
    ],
)
def test_messages_that_are_none_are_refused_before_anything_is_loaded(
    tmp_path, capsys, content, said
):
    file = tmp_path / "messages.json"
    file.write_text(content)
    assert main(["generate", "no/model", *(["--messages", str(file)] if content else [])]) == 2
    assert said in capsys.readouterr().err
