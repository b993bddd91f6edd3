"""Common forms of training examples, converted to prompt and completion or to chat messages.

    messages       {"messages": [{"role", "content"}], "tools": [...]}, calls as in OpenAI's form
    completion     {"prompt": "...", "completion": "..."}
    conversation   {"prompt": [messages], "completion": [messages]}
    ShareGPT       {"conversations": [{"from": "human", "value": "..."}], "system": "..."}
    Alpaca         {"instruction": "...", "input": "...", "output": "..."}
    text           {"text": "..."}, whose tokens all count in the loss

A record has the first of these forms whose fields it contains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from nalora_jax.config import DataConfig
from nalora_jax.data.source import Record, TableRecord, json_object
from nalora_jax.errors import NaloraError

CONVERSATIONS = "conversations"
TEXT = "text"
# Field with the images of a record (encoded, or paths of files), for vision-language models.
IMAGES = "__images__"
# ShareGPT's names of speakers, and the roles of chat templates.
ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
    **{role: role for role in ("user", "assistant", "system", "tool")},
}
_CALL = "function_call"
# Roles of chat templates and their synonyms, which templates would render unchanged.
_KNOWN_ROLES = ("user", "assistant", "system", "tool", "developer")
_MISNAMED = {
    name: role for name, role in ROLES.items() if name != role and role != "tool"
}


class Parts(list[dict[str, str]]):
    """Texts and images of a message in order, for a vision-language model.

    See `nalora_jax.data.images.image_chat`.
    """


def uses_chat_template(record: Record, config: DataConfig, *chosen: str) -> bool:
    """Returns True if a chat template writes the text of a record.

    Args:
      record: of any form.
      config: names of the fields, and ``chat``.
      *chosen: fields with the completions of a preference pair.
    """
    record = canonical(record, config, "record")
    fields = (config.prompt_field, *chosen)
    has_messages = any(isinstance(record.get(field), list) for field in fields)
    return config.chat or config.messages_field in record or has_messages


def canonical(record: Record, config: DataConfig, where: str) -> Record:
    """Converts a record of any form to ``config.messages_field``, or to a prompt and a completion.

    A record of unknown form is returned unchanged.

    Raises:
      NaloraError: the type of a field does not match the record's form.
    """
    return _converted(record, config, where)[0]


def form_of(record: Record, config: DataConfig) -> str:
    """Returns the name of a record's form for the log, or "" if the form is unknown.

    Raises:
      NaloraError: as of `canonical`.
    """
    return _converted(record, config, "record")[1]


def _converted(record: Record, config: DataConfig, where: str) -> tuple[Record, str]:
    """Returns the record in the form of `canonical`, and the name of its form as of `form_of`."""
    messages = config.messages_field
    asked = config.prompt_field
    answered = config.completion_field
    prompt = record.get(asked)
    completion = record.get(answered)
    tools = record.get("tools")

    def with_messages(turns: Any) -> Record:
        """Returns a record of chat messages, with the tools of the original one."""
        chat = type(record)({messages: turns})
        if tools:
            chat["tools"] = tools
        return chat

    if messages in record:
        form = f"chat messages ({messages})"
        if tools:
            form += ", with tools"
        return record, form
    if isinstance(prompt, list) and isinstance(completion, list):
        form = f"chat messages ({asked} and {answered})"
        return with_messages([*prompt, *completion]), form
    if asked in record:
        form = f"prompt and completion ({asked}, {answered})"
        if record.get("choices"):
            form += ", with choices"
        return record, form
    if CONVERSATIONS in record:
        system = record.get("system")
        turns = record[CONVERSATIONS]
        if isinstance(turns, list) and isinstance(system, str) and system:
            turns = [{"role": "system", "content": system}, *turns]
        form = f"ShareGPT conversations ({CONVERSATIONS}: from, value)"
        return with_messages(turns), form
    if {"instruction", "output"} <= record.keys():
        author = "Alpaca's prompt"
        if config.chat:
            author = "the chat template"
        form = f"Alpaca fields (instruction, input, output), written by {author}"
        return _alpaca(record, config, where), form
    if TEXT not in record:
        return record, ""
    if answered not in record and not config.chat:
        record = type(record)({asked: "", answered: record[TEXT]})
    return record, f"plain text ({TEXT})"


def _alpaca(record: Record, config: DataConfig, where: str) -> Record:
    """Returns the prompt and completion of a record in Alpaca form; ``input`` may be absent.

    With chat, the prompt is the instruction and input alone: the chat template frames them.
    """
    texts = {
        name: record.get(name) or "" for name in ("instruction", "input", "output")
    }
    for name, text in texts.items():
        if not isinstance(text, str):
            raise NaloraError(
                f"{where}: {name}", expected="a text", found=f"a {type(text).__name__}"
            )
    instruction = texts["instruction"]
    given = texts["input"]
    if config.chat:
        prompt = "\n\n".join(filter(None, (instruction, given)))
    else:  # Stanford Alpaca's prompt, with which most models without a chat template were tuned
        context = ""
        if given:
            context = ", paired with an input that provides further context"
        prompt = (
            f"Below is an instruction that describes a task{context}. Write a response that "
            f"appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
        )
        if given:
            prompt += f"### Input:\n{given}\n\n"
        prompt += "### Response:\n"
    return {config.prompt_field: prompt, config.completion_field: texts["output"]}


def message_of(value: Any, where: str, *, filled: bool = False) -> Record:
    """Returns a chat message for templates: role, text, and tool calls with object arguments.

    Args:
      value: ``{"role", "content"}`` as in OpenAI's form, or ``{"from", "value"}`` as in ShareGPT's.
        Contents given as text parts are joined; a null content of a message with tool calls is
        empty.
      where: names the message.
      filled: remove nulls from tool calls, since in a `TableRecord` they may mean absent fields.

    Raises:
      NaloraError: an unknown form or speaker, a misspelt role, or a part that is not a text.
    """
    turn = spoken(value, where)
    if turn is not value:
        return turn
    message = {
        name: member
        for name, member in value.items()
        if member is not None or name in ("role", "content")
    }
    check_role(message.get("role"), where)
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls:
        if filled:
            calls = _without_null(calls)
        message["tool_calls"] = [
            _call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(calls)
        ]
        message["content"] = message.get("content") or ""
    else:
        message.pop("tool_calls", None)
    content = message.get("content")
    if isinstance(content, list) and not isinstance(content, Parts):
        texts = [_part(part, f"{where}: content") for part in content]
        message["content"] = "".join(texts)
    return message


def check_role(role: object, where: str) -> None:
    """Refuses a misspelt or alternative role name, which templates would render unchanged.

    Raises:
      NaloraError: the role is unknown but similar to a known role; the message suggests that role.
    """
    if not isinstance(role, str) or role in _KNOWN_ROLES:
        return
    plain = role.strip().lower()
    similar = get_close_matches(plain, _KNOWN_ROLES, 1, cutoff=0.75)
    if plain in _MISNAMED:
        similar = [_MISNAMED[plain]]
    for meant in similar:
        found = repr(role)[:80]
        raise NaloraError(
            f"{where}: role",
            expected=f"a role that chat templates know ({', '.join(_KNOWN_ROLES)})",
            found=found,
            remedy=f"write {meant!r}",
        )


def spoken(message: Any, where: str) -> Record:
    """Returns a message of ShareGPT's or LLaVA's form as one with a role; other messages as they
    are.

    Raises: NaloraError: not a dict, or an unknown speaker.
    """
    if not isinstance(message, dict):
        raise NaloraError(
            where,
            expected='{"role": ..., "content": ...}',
            found=f"a {type(message).__name__}",
        )
    if message.get("role") is not None or not {"from", "value"} <= message.keys():
        return message
    speaker = message["from"]
    if speaker == _CALL:
        call = {
            "type": "function",
            "function": json_object(message["value"], f"{where}: value"),
        }
        return {"role": "assistant", "content": "", "tool_calls": [_call(call, where)]}
    if speaker not in ROLES:
        roles = ", ".join([*ROLES, _CALL])
        raise NaloraError(
            f"{where}: from", expected=f"one of {roles}", found=repr(speaker)[:80]
        )
    return {"role": ROLES[speaker], "content": message["value"]}


def _call(call: Any, where: str) -> Record:
    """Returns a tool call with its arguments as an object (a JSON text in OpenAI's form)."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise NaloraError(
            where,
            expected='{"type": "function", "function": {"name": ..., "arguments": ...}}',
            found=repr(call)[:80],
        )
    arguments = json_object(function.get("arguments") or {}, f"{where}: arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def tools_of(record: Mapping[str, Any], where: str) -> list[Record] | None:
    """Returns the schemas of a conversation's tools.

    The field "tools" is a list, or a text with a list in JSON. Nulls in objects of a `TableRecord`
    are removed; all other nulls are part of a schema.

    Raises:
      NaloraError: the field has another type.
    """
    value = record.get("tools")
    if not value:
        return None
    if isinstance(record, TableRecord):
        value = _without_null(value)
    try:
        if isinstance(value, str):
            value = json.loads(value)
        if isinstance(value, list):
            value = list(value)
            for i, tool in enumerate(value):
                if isinstance(tool, str) and tool[:1] == "{":
                    value[i] = json.loads(tool)
    except (ValueError, RecursionError) as error:
        raise NaloraError(
            f"{where}: tools", expected="a JSON list of tools", found=error
        ) from error
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise NaloraError(
            f"{where}: tools", expected="a list of tools", found=repr(value)[:80]
        )
    return value or None


def _without_null(value: Any) -> Any:
    """Removes the nulls with which an Arrow column fills fields that only other rows have."""
    if isinstance(value, dict):
        return {
            name: _without_null(member)
            for name, member in value.items()
            if member is not None
        }
    if isinstance(value, list):
        return [_without_null(member) for member in value]
    return value


def _part(content: Any, where: str) -> str:
    """Returns the text of a part of a message's content; raises a NaloraError for another part."""
    if isinstance(content, dict) and content.get("type", "text") == "text":
        text = content.get("text")
        if isinstance(text, str):
            return text
    raise NaloraError(
        where,
        expected='a text, or parts {"type": "text", "text": ...}',
        found=repr(content)[:80],
    )
