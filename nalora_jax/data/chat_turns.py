"""Conversations whose assistant turns stay the tokens that the model wrote.

A chat template renders the messages between two turns of the model. The text from one turn's stop
token to the start of the next turn is inserted after the model's own tokens:

    <|im_start|>user\\n2 + 2?<|im_end|>\\n<|im_start|>assistant\\n    the prompt
    calc(2 + 2)<|im_end|>                                          written by the model
    \\n<|im_start|>tool\\n4<|im_end|>\\n<|im_start|>assistant\\n       inserted
    4<|im_end|>                                                    written by the model

A template that changes earlier turns when later ones are added would render another text
(`require_fixed_turns`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError

ChatMessage = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None

_MARK = (
    "xz0000zx"  # stands for the content of a turn, or for the name of a called function
)
_THOUGHTS = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
_DECODER = json.JSONDecoder()


def text_after_turn(
    tokenizer: Tokenizer,
    messages: Sequence[ChatMessage],
    added: Sequence[ChatMessage],
    tools: Tools = None,
) -> str:
    """Returns the text from the stop token of the last turn to the start of the next turn.

    Args:
      tokenizer: renders the chat template.
      messages: up to a turn of the assistant, which is the last one. Contents of the assistant's
        turns do not matter.
      added: the messages after it.
      tools: schemas of the tools.

    Raises:
      NaloraError: the template rejects the messages, or writes no stop token after a turn.
    """
    marked = []
    for message in messages:
        if message["role"] == "assistant":
            message = _marked(message, "x")
        marked.append(message)
    mark = _MARK
    while any(
        mark in json.dumps(message, default=str) for message in (*marked, *added)
    ):
        mark += "x"
    marked[-1] = _marked(messages[-1], mark)
    text = tokenizer.render_chat(
        [*marked, *added], add_generation_prompt=True, tools=tools
    )
    _, _, after = text.rpartition(mark)
    places = []
    for token_id in tokenizer.eos_ids:
        stop = tokenizer.turn_ends.get(token_id, "")
        if stop and stop in after:
            places.append((after.index(stop), len(stop)))
    if mark not in text or not places:
        raise NaloraError(
            "chat template",
            expected="one that writes each turn of the assistant with a stop token after it",
            found=repr(text[-200:]),
            remedy="use the model's own chat template, of an instruction-tuned model",
        )
    place, size = min(places)
    return after[place + size :]


def _marked(message: ChatMessage, mark: str) -> dict[str, Any]:
    """Returns an assistant's message with a short text in place of its content."""
    calls = message.get("tool_calls")
    if not calls:
        return {"role": "assistant", "content": mark}
    # Ids stay, because a template may look for the call of a result.
    function = {"name": mark, "arguments": {}}
    replaced = [{**call, "function": function} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": replaced}


def require_fixed_turns(
    tokenizer: Tokenizer, messages: Sequence[ChatMessage], tools: Tools = None
) -> bool:
    """Checks that the template renders earlier turns as they were written.

    Args:
      tokenizer: with the template.
      messages: the prompt of a sample.
      tools: schemas of the tools.

    Returns:
      True if the template removes the thoughts of earlier turns, which samples keep.

    Raises:
      NaloraError: it changes anything else of an earlier turn, or rejects a second turn of the user
        or, with tools, a tool's result.
    """
    removes_thoughts = _keeps_words(tokenizer, messages, tools)
    if tools:
        chat = [*messages, _call("f"), _result("y")]
        prompt, actual = _rendered(tokenizer, [messages, chat], tools)
        if not actual.startswith(prompt):
            _refuse_rewriting(prompt, actual[: len(prompt)])
        text_after_turn(tokenizer, chat[:-1], chat[-1:], tools)
    return removes_thoughts


def _rendered(
    tokenizer: Tokenizer, chats: Sequence[Sequence[ChatMessage]], tools: Tools
) -> list[str]:
    """Returns the text of each chat up to the start of the assistant's next turn."""
    return tokenizer.render_chats([(chat, True) for chat in chats], tools)


def _result(content: str) -> ChatMessage:
    """Returns the result of the call that `_call` makes."""
    return {
        "role": "tool",
        "name": "f",
        "tool_call_id": call_id(0),
        "content": content,
    }


def call_id(number: int) -> str:
    """Returns the id of a sample's call, of nine letters and digits, as Mistral's template
    needs."""
    return f"call{number:05d}"


def _call(name: str) -> ChatMessage:
    """Returns an assistant's message that calls a function."""
    call = {
        "type": "function",
        "id": call_id(0),
        "function": {"name": name, "arguments": {"k": 1}},
    }
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _keeps_words(
    tokenizer: Tokenizer, messages: Sequence[ChatMessage], tools: Tools
) -> bool:
    """Compares a turn of words, without and with thoughts, with the template's rendering; see
    `require_fixed_turns`."""
    reply = {"role": "user", "content": "y"}
    (prompt,) = _rendered(tokenizer, [messages], tools)
    contents = ["x", "<think>\nt\n</think>\n\nx"]
    if prompt.rstrip().endswith("<think>"):  # the prompt begins a thought
        contents = ["t\n</think>\n\nx"]
    removes_thoughts = False
    for content in contents:
        chat = [*messages, {"role": "assistant", "content": content}]
        inserted = text_after_turn(tokenizer, chat, [reply], tools)
        (actual,) = _rendered(tokenizer, [[*chat, reply]], tools)
        stop = _stop_before(tokenizer, actual, len(actual) - len(inserted))
        ours = prompt + content + stop + inserted
        if ours == actual:
            continue
        if _without_thoughts(ours) != _without_thoughts(actual):
            _refuse_rewriting(ours, actual)
        removes_thoughts = True
    return removes_thoughts


def _without_thoughts(text: str) -> str:
    """Returns a text without thoughts, and without white space, which templates write around
    them."""
    return "".join(_THOUGHTS.sub("", text).split())


def _stop_before(tokenizer: Tokenizer, text: str, end: int) -> str:
    """Returns the stop token that ends at position ``end`` of a text."""
    stops = [tokenizer.turn_ends.get(token_id, "") for token_id in tokenizer.eos_ids]
    ending = [stop for stop in stops if text[:end].endswith(stop)]
    return max(ending, key=len, default="")


def _refuse_rewriting(ours: str, actual: str) -> None:
    """Raises the error of a template that changes earlier turns."""
    raise NaloraError(
        "chat template",
        expected="earlier turns as they were written when later ones are added: "
        f"{ours[-160:]!r}",
        found=repr(actual[-160:]),
        remedy="use a template that keeps them, such as ChatML: samples of several turns are the "
        "tokens that the model wrote",
    )


# ---------------------------------------------------------------- calls of tools


@dataclass(frozen=True)
class CallForm:
    """The form in which a chat template writes calls of tools: a JSON object after a text.

    Example (Qwen 2.5):
      >>> CallForm(before="<tool_call>", name="name", arguments="arguments")
    """

    before: str  # "" if a call is the whole turn
    name: str  # field with the function's name
    arguments: str  # field with its arguments

    def parse(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Returns the content before the first call of a turn, and the calls in OpenAI's form.

        Text that is no call, such as damaged JSON, belongs to the content.
        """
        if self.before:
            content, *parts = text.split(self.before)
        else:
            content = ""
            parts = [text]
        calls: list[dict[str, Any]] = []
        for part in parts:
            for function in self._functions(part):
                call = {"type": "function", "id": call_id(len(calls))}
                calls.append(call | {"function": function})
        if not calls:
            content = text
        return content.strip(), calls

    def _functions(self, text: str) -> list[dict[str, Any]]:
        """Returns name and arguments of each call in the JSON at the start of a text.

        The JSON is one call or a list of calls, with the keys `name` and `arguments` of this form;
        what is no call is skipped.
        """
        try:
            value, _ = _DECODER.raw_decode(text.lstrip())
        except (ValueError, RecursionError):
            return []
        calls = value if isinstance(value, list) else [value]
        functions = []
        for call in calls:
            if not isinstance(call, dict) or not isinstance(call.get(self.name), str):
                continue
            arguments = call.get(self.arguments, {})
            if isinstance(arguments, dict):
                functions.append({"name": call[self.name], "arguments": arguments})
        return functions


def call_form(
    tokenizer: Tokenizer, messages: Sequence[ChatMessage], tools: Tools
) -> CallForm:
    """Returns the form of calls, read from a call that the template renders.

    Args:
      tokenizer: with the template.
      messages: the prompt of a sample.
      tools: schemas of the tools.

    Raises:
      NaloraError: the template does not write tools and calls, or no JSON.
    """
    plain = tokenizer.render_chat(messages, add_generation_prompt=True)
    prompt = tokenizer.render_chat(messages, add_generation_prompt=True, tools=tools)
    text = tokenizer.render_chat([*messages, _call(_MARK)], tools=tools)
    place = text.find(_MARK)
    if place >= 0 and prompt != plain:
        # The first JSON value of the turn that includes the call.
        start = min(len(prompt), place)
        if not text.startswith(prompt):
            start = text.rfind("\n", 0, text.rfind("\n", 0, place)) + 1
        for opening in range(start, place):
            if text[opening] not in "{[":
                continue
            try:
                value, _ = _DECODER.raw_decode(text[opening:])
            except ValueError:
                continue
            call = value[0] if isinstance(value, list) else value
            name = next((key for key in call if call[key] == _MARK), None)
            arguments = next((key for key in call if call[key] == {"k": 1}), None)
            if name is not None and arguments is not None:
                return CallForm(text[start:opening].strip(), name, arguments)
    raise NaloraError(
        "chat template",
        expected="one that writes tools, and calls of them as JSON",
        found=repr(text[-160:]),
        remedy="an environment without `tools` may agree on its own form with the model, and parse "
        "it in `step`",
    )
