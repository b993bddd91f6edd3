"""Environments: turns, tokens, limits and failures, on turns that a test writes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nalora_jax.config import RLConfig
from nalora_jax.data.prompts import PromptRecord
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.rl import environments, episodes
from nalora_jax.kinds.rl.engine import DrawnCompletion, Request
from nalora_jax.kinds.rl.environments import (
    Arena,
    ToolEnvironment,
    make_environments,
    register_environment,
)
from nalora_jax.kinds.rl.episodes import episode_rewards, follows_template, play, segments
from nalora_jax.kinds.rl.rewards import Scorer
from tests import tiny
from tests.data.test_chat_turns import FOLDER

ROLES = "{'user': 'u', 'assistant': 'v', 'tool': 'w', 'system': 's'}"
TEMPLATE = (
    "{% for m in messages %}{{ " + ROLES + "[m.role] + ' ' + m.content + '<end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'v ' }}{% endif %}"
)
RL = RLConfig(environment="test_echo", max_new_tokens=40, max_turns=4)


@register_environment("test_echo")
class Echo:
    """Repeats each turn, and rewards the number of turns after "z"."""

    def start(self, record: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": record["letter"]}]

    def step(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | float:
        last = messages[-1]["content"]
        if last == "z":
            return len(messages) / 2
        return [{"role": "tool", "content": last}, {"role": "user", "content": "x"}]


@register_environment("test_settings")
@dataclass
class Settings:
    reward: float = 2.0

    def start(self, record: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "a"}]

    def step(self, messages: Any) -> float:
        return self.reward


class Written:
    """An engine whose turns are written before; records what it was asked."""

    def __init__(self, tokenizer: Tokenizer, *turns: str) -> None:
        self.turns = [tokenizer.encode(turn, special=False) for turn in turns]
        self.requests: list[Request] = []

    def sample(self, requests: Sequence[Request]) -> list[DrawnCompletion]:
        self.requests += requests
        drawn = []
        for request in requests:
            ids = np.array(self.turns.pop(0)[: request.limit], np.int32)
            drawn.append(DrawnCompletion(ids, -np.ones(len(ids), np.float32), len(self.turns)))
        return drawn


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny.word_tokenizer(chat_template=TEMPLATE)


def arena_of(tokenizer: Tokenizer, environment: Any = Echo, **changes: Any) -> Arena:
    return Arena(replace(RL, **changes), tokenizer, environment)


def prompt_of(arena: Arena, letter: str = "a") -> PromptRecord:
    record = {"letter": letter, "answer": "z"}
    text = arena.render(arena.begin(record, "file:1")[1])
    return PromptRecord(arena.tokenizer.encode(text, special=False), text, record, "file:1")


def test_turns_are_the_written_tokens_and_messages_the_templates(tokenizer: Tokenizer) -> None:
    """Two samples of unequal lengths; the first ends a turn before the second."""
    arena = arena_of(tokenizer)
    prompt = prompt_of(arena)
    turns = ("b c<end>", "d<end>", "z<end>", "e<end>", "z<end>")
    engine = Written(tokenizer, *turns)
    first, second = play(engine, arena, [prompt, prompt], [5, 6])
    assert tokenizer.decode([*prompt.ids, *first.tokens], skip_special=False) == (
        "u a <end> v b c <end> w b c <end> u x <end> v z <end>"
    )
    parts = [
        (is_inserted, tokenizer.decode(part, skip_special=False))
        for is_inserted, part in segments(second.tokens, second.inserted)
    ]
    assert parts == [
        (False, "d <end>"),
        (True, "w d <end> u x <end> v"),
        (False, "e <end>"),
        (True, "w e <end> u x <end> v"),
        (False, "z <end>"),
    ]
    assert [first.reward, second.reward] == [2.5, 4.0]
    assert [first.turns, second.turns] == [2, 3]
    assert not first.cut
    assert not second.cut
    np.testing.assert_array_equal(np.array(first.log_probs) == 0, first.inserted)
    assert second.version == 0  # the oldest of its turns
    # Each request continues the sample's own tokens, with another seed.
    asked = [
        request
        for request in engine.requests
        if request.ids[len(prompt.ids) :][:1] == first.tokens[:1]
    ]
    (again,) = asked
    end = len(prompt.ids) + len(first.tokens) - 2
    assert list(again.ids) == [*prompt.ids, *first.tokens][:end]
    assert again.limit == RL.max_new_tokens - (len(first.tokens) - 2)
    assert len({request.seed for request in engine.requests}) == 5
    assert [request.seed for request in engine.requests[:2]] == [5, 6]
    assert follows_template(arena, first)
    assert follows_template(arena, second)
    # The whole conversation is what the template renders.
    rendered = tokenizer.render_chat(second.messages)
    assert tokenizer.encode(rendered, special=False) == [*prompt.ids, *second.tokens]


def test_another_stop_or_spelling_than_the_templates_is_counted(tokenizer: Tokenizer) -> None:
    other = replace(tokenizer, eos_ids=(0, 2))  # "a" ends a turn, too
    arena = arena_of(other)
    (episode,) = play(Written(other, "b a", "z<end>"), arena, [prompt_of(arena, "c")], [1])
    assert episode.reward == 2.5
    assert not follows_template(arena, episode)
    assert other.decode(episode.tokens, skip_special=False) == "b a w b a <end> u x <end> v z <end>"


@pytest.mark.parametrize(
    ("changes", "turns", "tokens", "reward"),
    [
        ({"max_turns": 2}, ("b<end>", "c<end>"), 11, 0.0),
        ({"max_turns": 2}, ("b<end>", "z<end>"), 11, 2.5),
        # A turn without its end: nothing can follow.
        ({"max_turn_tokens": 2}, ("b c d<end>",), 2, 0.0),
        ({"max_turn_tokens": 1}, ("z<end>",), 1, 1.0),  # what was asked for is rewarded
        ({"max_new_tokens": 4}, ("b c d e f<end>",), 4, 0.0),
        # No room for the messages and a turn.
        ({"max_new_tokens": 10}, ("b c<end>",), 3, 0.0),
        ({"max_new_tokens": 13}, ("b c<end>", "z<end>"), 13, 2.5),
    ],
)
def test_limits_end_a_sample(tokenizer, changes, turns, tokens, reward) -> None:
    arena = arena_of(tokenizer, **changes)
    (episode,) = play(Written(tokenizer, *turns), arena, [prompt_of(arena)], [1])
    assert len(episode.tokens) == tokens
    assert episode.reward == reward
    assert episode.cut == (reward < 2)


class Failing(Echo):
    """Fails in one of several ways."""

    fault: Any = None

    def step(self, messages: Any) -> Any:
        return self.fault(messages)


def _raise(messages: Any) -> None:
    raise KeyError("x")


FAULTS = {
    "raises": (_raise, "KeyError: 'x' for 'b'"),
    "takes long": (lambda messages: time.sleep(5), "TimeoutError: no value after 0.05 s"),
    "no number": (lambda messages: float("nan"), "the value nan"),
    "a text": (lambda messages: "x", "could not convert"),
    "nothing": (lambda messages: None, "NoneType"),
    "no messages": (lambda messages: [], "expected a list of at least one"),
    "no role": (lambda messages: [{"content": "x"}], "KeyError|role"),
    "no text": (lambda messages: [{"role": "user", "content": 3}], "content: expected a text"),
    "the model's": (
        lambda messages: [{"role": "assistant", "content": "x"}],
        "expected a message of another role last",
    ),
    "a misspelt role": (lambda messages: [{"role": "usr", "content": "x"}], "write 'user'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_environment_that_fails_is_named_with_its_record(tokenizer, name) -> None:
    fault, message = FAULTS[name]
    environment = type("Fault", (Failing,), {"fault": staticmethod(fault)})
    arena = arena_of(tokenizer, environment, reward_seconds=0.05)
    with pytest.raises(NaloraError, match=message) as error:
        play(Written(tokenizer, "b<end>"), arena, [prompt_of(arena)], [1])
    assert "environment test_echo, step of file:1" in str(error.value)
    arena = arena_of(tokenizer, environment, reward_seconds=0.05, ignore_reward_errors=True)
    (episode,) = play(Written(tokenizer, "b<end>"), arena, [prompt_of(arena)], [1])
    assert np.isnan(episode.reward)


def test_a_start_that_fails_or_changes_is_named(tokenizer: Tokenizer) -> None:
    letters = iter("abc")

    class Random(Echo):
        def start(self, record: Any) -> list[dict[str, Any]]:
            return [{"role": "user", "content": next(letters)}]

    arena = arena_of(tokenizer, Random)
    prompt = prompt_of(arena)
    with pytest.raises(NaloraError, match="start of file:1: expected the same messages"):
        play(Written(tokenizer, "b<end>"), arena, [prompt], [1])
    # The second sample of a prompt.
    arena = arena_of(tokenizer, Random)
    prompt = replace(prompt_of(arena_of(tokenizer), "c"), ids=tokenizer.encode("u b <end> v"))
    letters = iter("bc")
    with pytest.raises(NaloraError, match="start of file:1: expected the same messages"):
        play(Written(tokenizer, "b<end>"), arena, [prompt, prompt], [1, 2])
    with pytest.raises(NaloraError, match="start of file:2: expected messages .* KeyError"):
        arena_of(tokenizer).begin({}, "file:2")


def test_environments_are_named_with_settings_or_by_module(monkeypatch) -> None:
    assert make_environments("test_settings")().step([]) == 2.0  # type: ignore[comparison-overlap]
    assert make_environments("test_settings:reward=3")().step([]) == 3.0  # type: ignore[comparison-overlap]
    module = ModuleType("environments_of_a_test")
    vars(module)["made"] = lambda: Settings(4.0)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert make_environments("environments_of_a_test:made")().step([]) == 4.0  # type: ignore[comparison-overlap]
    for text, message in (
        ("absent", "--rl.environment: expected one of .*test_echo"),
        ("test_settings:size=3", "expected NAME:setting=value"),
        ("environments_of_a_test:absent", "MODULE:CLASS of an environment, found AttributeError"),
        ("no_such_module:made", "found ModuleNotFoundError"),
    ):
        with pytest.raises(NaloraError, match=message):
            make_environments(text)


def test_rewards_read_the_last_turn_and_all_messages(tokenizer, monkeypatch) -> None:
    module = ModuleType("rewards_of_a_test")

    def judge(prompt: str, completion: str, record: Any, messages: Any) -> float:
        assert completion == messages[-1]["content"]
        return float(len(messages))

    vars(module)["judge"] = judge
    monkeypatch.setitem(sys.modules, module.__name__, module)
    rewards = ("exact", "rewards_of_a_test:judge")
    arena = arena_of(tokenizer, rewards=rewards)
    played = play(Written(tokenizer, "b<end>", "z<end>"), arena, [prompt_of(arena)], [1])
    scorer = Scorer(arena.rl)
    np.testing.assert_array_equal(episode_rewards(scorer, played), [[2.5, 1.0, 5.0]])
    # One turn: two messages.
    values = scorer(["p"], ["z"], [{"answer": "z"}], ["file:1"])
    np.testing.assert_array_equal(values, [[1.0, 2.0]])


def test_the_system_prompt_precedes_messages_without_one(tokenizer: Tokenizer) -> None:
    arena = arena_of(tokenizer, system_prompt="h i")
    assert prompt_of(arena).text == "s h i<end> u a<end> v "

    class WithSystem(Echo):
        def start(self, record: Any) -> list[dict[str, Any]]:
            return [{"role": "system", "content": "j"}, *super().start(record)]

    assert prompt_of(arena_of(tokenizer, WithSystem, system_prompt="h i")).text.startswith(
        "s j<end>"
    )


def test_first_processes_outcomes_are_those_of_all(tokenizer, monkeypatch) -> None:
    """In a run of two processes the second one has no environments, and receives JSON."""
    sent: list[Any] = []
    monkeypatch.setattr(episodes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        episodes.multihost_utils, "broadcast_one_to_all", lambda x: sent.append(x) or sent[-1]
    )
    monkeypatch.setattr(episodes, "run_on_first_process", lambda action: action())
    outcomes = [[{"role": "user", "content": "é"}], 0.5, float("nan")]
    received = episodes._in_all_processes(lambda: outcomes)
    assert received[:2] == outcomes[:2]
    assert np.isnan(received[2])
    assert int(sent[0]) == len(sent[1])
    # The second process: the same sizes, without a value.
    first = list(sent)
    monkeypatch.setattr(episodes, "run_on_first_process", lambda action: None)
    monkeypatch.setattr(episodes.multihost_utils, "broadcast_one_to_all", lambda x: first.pop(0))
    assert episodes._in_all_processes(lambda: [])[:2] == outcomes[:2]


def test_a_long_rollout_logs_its_progress(tokenizer, monkeypatch, caplog) -> None:
    monkeypatch.setattr(episodes, "_LOGGED_EVERY", 0.0)
    arena = arena_of(tokenizer)
    engine = Written(tokenizer, "b<end>", "z<end>", "z<end>")
    with caplog.at_level("INFO"):
        play(engine, arena, [prompt_of(arena)] * 2, [1, 2])
    assert [record.getMessage() for record in caplog.records] == [
        "rollout: 0 of 2 samples are done",
        "rollout: 1 of 2 samples are done",
    ]
    caplog.clear()
    monkeypatch.setattr(episodes, "_LOGGED_EVERY", 60.0)
    with caplog.at_level("INFO"):
        play(Written(tokenizer, "z<end>"), arena, [prompt_of(arena)], [1])
    assert not caplog.records


# ---------------------------------------------------------------- tools


def add(a: int, b: int = 1) -> int:
    """Adds two numbers."""
    if a < 0:
        raise ValueError("negative")
    return a + b


class Sums(ToolEnvironment):
    functions = (add,)

    def score(self, messages: Any) -> float:
        return float(messages[-1]["content"] == self.record["answer"])


def test_tools_are_schemas_and_their_results_messages() -> None:
    environment = Sums()
    opening = environment.start({"prompt": "1 + 2", "answer": "3"})
    assert opening == [{"role": "user", "content": "1 + 2"}]
    properties = {"a": {"type": "integer"}, "b": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["a"]}
    function = {"name": "add", "description": "Adds two numbers.", "parameters": parameters}
    assert environment.tools == [{"type": "function", "function": function}]
    from transformers.utils import get_json_schema

    def documented(a: int, b: int = 1) -> int:
        """Adds two numbers.

        Args:
          a: one
          b: two
        """
        return a + b

    theirs = get_json_schema(documented)["function"]["parameters"]
    for name, schema in theirs["properties"].items():
        assert schema["type"] == properties[name]["type"]
    assert theirs["required"] == ["a"]

    def called(name: str, **arguments: Any) -> dict[str, Any]:
        return {"id": "call00000", "function": {"name": name, "arguments": arguments}}

    calls = [called("add", a=1, b=2), called("add", a=-1), called("add", x=1), called("minus")]
    results = environment.step([{"role": "assistant", "content": "", "tool_calls": calls}])
    assert isinstance(results, list)
    contents = [result["content"] for result in results]
    assert contents[0] == "3"
    assert contents[1] == "error: ValueError: negative"
    assert contents[2].startswith("error: TypeError")
    assert contents[3] == "error: no function minus"
    assert {result["role"] for result in results} == {"tool"}
    assert environment.step([{"role": "assistant", "content": "3"}]) == 1.0


def test_a_tool_that_takes_long_ends_the_sample(tokenizer: Tokenizer) -> None:
    def wait() -> None:
        time.sleep(5)

    class Slow(Sums):
        functions = (wait,)

    environment = Slow()
    environment.start({"prompt": "a", "answer": "b"})
    call = {"id": "call00000", "function": {"name": "wait", "arguments": {}}}
    message = {"role": "assistant", "content": "b", "tool_calls": [call]}
    arena = arena_of(tokenizer, reward_seconds=0.05)
    with pytest.raises(NaloraError, match="environment test_echo, step of here: .*TimeoutError"):
        arena.step(environment, [message], "here")


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    base = tiny.byte_tokenizer()
    template = (FOLDER / "qwen_tools.jinja").read_text().replace("<|im_end|>", "<end>")
    return replace(base, chat_template=template, special_tokens={})


def test_a_model_that_calls_a_tool_reads_its_result(byte_level: Tokenizer) -> None:
    """The call has other spaces than the template writes: the tokens stay those of the model."""
    arena = Arena(replace(RL, max_new_tokens=400), byte_level, Sums)
    record = {"prompt": "1 + 2", "answer": "3"}
    text = arena.render(arena.begin(record, "file:1")[1])
    assert '"name": "add"' in text
    prompt = PromptRecord(byte_level.encode(text, special=False), text, record, "file:1")
    call = '<tool_call>{"name":"add", "arguments":{"a":1,"b":2}}</tool_call>'
    engine = Written(byte_level, f"{call}<end>", "3<end>")
    (episode,) = play(engine, arena, [prompt], [1])
    assert episode.reward == 1.0
    written, inserted, last = [
        byte_level.decode(part, skip_special=False)
        for _, part in segments(episode.tokens, episode.inserted)
    ]
    assert (written, last) == (f"{call}<end>", "3<end>")
    assert inserted == (
        "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><end>\n<|im_start|>assistant\n"
    )
    assert not follows_template(arena, episode)
    assert environments.Arena.of(replace(RL, environment="test_echo"), byte_level).check(
        arena.begin(record, "here")[1]
    )


# ---------------------------------------------------------------- the page


def page_block(title: str) -> dict[str, Any]:
    """The names that a file of docs/environments.md defines."""
    page = (Path(__file__).parents[2] / "docs" / "environments.md").read_text(encoding="utf-8")
    code = page.split(f'```python title="{title}"\n')[1].split("```")[0]
    space: dict[str, Any] = {"__name__": title}
    exec(code, space)
    return space


@pytest.fixture
def free_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests may import the page's files, too."""
    monkeypatch.setattr(environments._ENVIRONMENTS, "_values", {})


@pytest.mark.usefixtures("free_names")
def test_the_calculator_of_the_page_calculates() -> None:
    environment = page_block("calculator.py")
    calculator = environment["Calculator"]()
    opening = calculator.start({"prompt": "What is 237 - 83?", "answer": "154"})
    assert opening[-1]["content"] == "What is 237 - 83?"

    def answer(text: str) -> Any:
        return calculator.step([*opening, {"role": "assistant", "content": text}])

    assert answer("calc(237 - 83)") == [{"role": "tool", "content": "154"}]
    assert answer("So calc(2 * 3)") == [{"role": "tool", "content": "6"}]
    assert answer("It is 154.") == 1.0
    assert answer("1540") == answer("none") == answer("calc(237 / 83)") == 0.0
    assert isinstance(make_environments("calculator")(), environment["Calculator"])


@pytest.mark.usefixtures("free_names")
def test_the_tools_of_the_page_multiply() -> None:
    products = page_block("tools.py")["Products"]()
    products.start({"prompt": "6 * 7?", "answer": "42"})
    function = {"name": "multiply", "arguments": {"a": 6, "b": 7}}
    call = {"id": "call00000", "function": function}
    (result,) = products.step([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert result["content"] == "42"
    assert products.step([{"role": "assistant", "content": "42"}]) == 1.0
    assert products.tools[0]["function"]["description"] == "Multiplies two whole numbers."
