"""Environments of several turns: they open a conversation, answer the model's turns, and reward it.

    @register_environment("guess")
    class Guess:
        def start(self, record):
            self.number = record["number"]
            return [{"role": "user", "content": "Guess my number, from 1 to 9."}]

        def step(self, messages):
            guess = messages[-1]["content"].strip()
            if guess == str(self.number):
                return 1.0
            return [{"role": "user", "content": "No, guess again."}]

``--rl.environment guess`` trains on it. Each sample has its own instance, so an attribute belongs
to one conversation. ``start`` returns the same messages for a record each time. ``step`` receives
all messages, the last one by the model, and returns either messages to add or the reward, which
ends the sample.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar, cast

from nalora_jax.common.registry import Registry, parse_instance
from nalora_jax.config import RLConfig
from nalora_jax.data.chat_text import Message
from nalora_jax.data.chat_turns import (
    CallForm,
    call_form,
    require_fixed_turns,
    text_after_turn,
)
from nalora_jax.data.forms import message_of
from nalora_jax.data.tokenizer import Tokenizer, require_unicode
from nalora_jax.errors import NaloraError, describe_error
from nalora_jax.kinds.rl.rewards import RewardRecord, time_limit

_Made = TypeVar("_Made", bound=Callable[..., Any])
_ENVIRONMENTS: Registry[Any] = Registry(
    "environment", "nalora_jax.environments", "--rl.environment"
)
# JSON's names of the types of a tool's arguments.
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


class Environment(Protocol):
    """A conversation that rewards the model.

    It may have an attribute ``tools``, JSON schemas of functions in OpenAI's form. Then the chat
    template writes them into the prompt, and calls that the model writes in the template's form are
    in ``tool_calls`` of its messages.
    """

    def start(self, record: RewardRecord) -> Sequence[Message]:
        """Returns the first messages: a function of the record."""

    def step(self, messages: Sequence[Message]) -> Sequence[Message] | float:
        """Returns messages to add after the model's turn, or the reward of the sample."""


def register_environment(name: str) -> Callable[[_Made], _Made]:
    """Returns a decorator that registers an environment under ``name``.

    It decorates a class, or a function without arguments that returns an `Environment`. The fields
    of a dataclass are its settings: ``name:field=value``.
    """
    return _ENVIRONMENTS.decorator(name)


def make_environments(text: str) -> Callable[[], Environment]:
    """Returns a function that makes instances of the environment called ``NAME``,
    ``NAME:setting=value,...`` or ``MODULE:CLASS``.

    Raises:
      NaloraError: an unknown name or setting, or a module or class that cannot be imported.
    """
    name, _, rest = text.partition(":")
    make: Callable[[], Environment]
    try:
        if name in _ENVIRONMENTS or not rest or "=" in rest:
            make = partial(parse_instance, _ENVIRONMENTS, text)
        else:
            make = getattr(importlib.import_module(name), rest)
        make()  # so that errors come before a model is loaded
    except NaloraError:
        raise
    # The user's code may raise anything or call sys.exit.
    except (Exception, SystemExit) as error:
        raise NaloraError(
            f"--rl.environment {text}",
            expected="NAME, NAME:setting=value,... or MODULE:CLASS of an environment",
            found=describe_error(error),
        ) from error
    return make


@dataclass(frozen=True)
class Opening:
    """The first messages of a record's conversation."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Arena:
    """Runs environments within their limits, and writes their messages by the chat template.

    Attributes:
      rl: name, time limit and system prompt.
      tokenizer: with the chat template.
    """

    rl: RLConfig
    tokenizer: Tokenizer
    make: Callable[[], Environment]

    @classmethod
    def of(cls, rl: RLConfig, tokenizer: Tokenizer) -> Arena:
        """Returns the arena of a run's settings; see `make_environments`."""
        return cls(rl, tokenizer, make_environments(rl.environment))

    def begin(self, record: RewardRecord, where: str) -> tuple[Environment, Opening]:
        """Returns a new environment and its first messages.

        Args:
          record: of the data set.
          where: names the record in errors.

        Raises:
          NaloraError: it raises, takes too long, or returns no messages.
        """
        expected = "messages of a prompt"
        try:
            with time_limit(self.rl.reward_seconds):
                environment = self.make()
                messages = environment.start(record)
                tools = getattr(environment, "tools", None) or None
            messages = checked_messages(messages)
        except Exception as error:
            raise self._failure("start", where, expected, error) from error
        system = self.rl.system_prompt
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return environment, Opening(messages, tools)

    def step(
        self, environment: Environment, messages: Sequence[Message], where: str
    ) -> list[Message] | float:
        """Returns an environment's messages, or its reward: NaN if it fails and
        ``rl.ignore_reward_errors`` is set.

        Raises:
          NaloraError: it raises, takes too long, or returns anything else.
        """
        expected = "messages, or a finite number"
        try:
            with time_limit(self.rl.reward_seconds):
                # Copies: an environment may change them.
                outcome = environment.step([dict(message) for message in messages])
            if isinstance(outcome, Sequence) and not isinstance(outcome, str):
                return checked_messages(outcome)
            reward = float(cast(Any, outcome))
            if not math.isfinite(reward):
                raise ValueError(f"the value {reward}")
        except Exception as error:
            if self.rl.ignore_reward_errors:
                return math.nan
            turn = str(messages[-1]["content"])[:80]
            failure = self._failure("step", where, expected, error, f" for {turn!r}")
            raise failure from error
        return reward

    def _failure(
        self, method: str, where: str, expected: str, error: Exception, on: str = ""
    ) -> NaloraError:
        """Returns the error of an environment that failed."""
        if self.rl.reward_seconds:
            expected += f" within {self.rl.reward_seconds:g} s"
        remedy = "mend the environment"
        if method == "step":
            remedy += ", or pass --rl.ignore-reward-errors: such samples have no reward"
        return NaloraError(
            f"environment {self.rl.environment}, {method} of {where}",
            expected=expected,
            found=describe_error(error) + on,
            remedy=remedy,
        )

    def render(self, opening: Opening) -> str:
        """Returns the text of a prompt, up to the model's first turn."""
        return self.tokenizer.render_chat(
            opening.messages, add_generation_prompt=True, tools=opening.tools
        )

    def insert(
        self,
        messages: Sequence[Message],
        added: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> list[int]:
        """Returns the tokens of messages after the model's turn, up to its next turn."""
        text = text_after_turn(self.tokenizer, messages, added, tools)
        return self.tokenizer.encode(text, special=False)

    def check(self, opening: Opening) -> bool:
        """Checks the chat template on a prompt, see `require_fixed_turns`, and its form of
        calls."""
        if opening.tools:
            self.form(opening)
        return require_fixed_turns(self.tokenizer, opening.messages, opening.tools)

    def form(self, opening: Opening) -> CallForm:
        """Returns the template's form of calls, see `call_form`."""
        return call_form(self.tokenizer, opening.messages, opening.tools)


def checked_messages(value: Any) -> list[Message]:
    """Returns messages of an environment.

    Raises:
      NaloraError: there is none, one has no known role or no text, or is the assistant's.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise NaloraError(
            "messages", expected="a list of at least one", found=repr(value)[:80]
        )
    messages: list[Message] = []
    for number, each in enumerate(value):
        place = f"messages[{number}]"
        message = dict(message_of(each, place))
        content = message.get("content")
        if not isinstance(content, str):
            found = f"a {type(content).__name__}"
            raise NaloraError(f"{place}: content", expected="a text", found=found)
        require_unicode(content, f"{place}: content")
        messages.append(message)
    if messages[-1]["role"] == "assistant":
        raise NaloraError(
            "messages",
            expected="a message of another role last: the model answers it",
            found="the assistant's",
        )
    return messages


# ---------------------------------------------------------------- functions as tools


class ToolEnvironment:
    """An environment in which the model calls functions until it answers without a call.

    A subclass has ``functions``, whose names, annotations and docstrings become schemas, and
    defines `score`. The prompt is the record's ``prompt``.

    Example:
      class Sums(ToolEnvironment):
          functions = (add,)

          def score(self, messages):
              return float(messages[-1]["content"].strip() == self.record["answer"])
    """

    functions: ClassVar[Sequence[Callable[..., Any]]] = ()

    def __init__(self) -> None:
        self.record: RewardRecord = {}

    @property
    def tools(self) -> list[dict[str, Any]]:
        """Returns the schemas of the functions."""
        return [tool_schema(function) for function in self.functions]

    def start(self, record: RewardRecord) -> list[Message]:
        """Returns the record's prompt as a user's message, or its messages."""
        self.record = record
        prompt = record["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return list(prompt)

    def step(self, messages: Sequence[Message]) -> Sequence[Message] | float:
        """Returns the results of the last turn's calls, or the score of a turn without a call."""
        calls = messages[-1].get("tool_calls")
        if not calls:
            return self.score(messages)
        by_name = {function.__name__: function for function in self.functions}
        results: list[Message] = []
        for call in calls:
            name = call["function"]["name"]
            result = f"error: no function {name}"
            if name in by_name:
                try:
                    result = str(by_name[name](**call["function"]["arguments"]))
                # The model's arguments may be wrong; a time limit ends the sample.
                except TimeoutError:
                    raise
                except Exception as error:
                    result = f"error: {describe_error(error)}"
            message = {"role": "tool", "name": name, "content": result}
            results.append(message | {"tool_call_id": call["id"]})
        return results

    def score(self, messages: Sequence[Message]) -> float:
        """Returns the reward of a conversation, whose last turn has no call."""
        raise NotImplementedError


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the schema of a function in OpenAI's form.

    Its description is the docstring; arguments are of the types `str`, `int`, `float` and `bool`,
    by their annotations, or of any type.
    """
    properties = {}
    required = []
    hints = inspect.get_annotations(function, eval_str=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind = _TYPES.get(hints.get(name, str))
        properties[name] = {"type": kind} if kind else {}
        if parameter.default is parameter.empty:
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    described_as = {
        "name": function.__name__,
        "description": inspect.getdoc(function) or "",
        "parameters": parameters,
    }
    return {"type": "function", "function": described_as}
