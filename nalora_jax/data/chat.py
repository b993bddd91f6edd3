"""Renders records as text and marks the parts whose tokens count in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nalora_jax.config import DataConfig
from nalora_jax.data.forms import Parts, canonical, message_of, tools_of
from nalora_jax.data.long_chats import shortened
from nalora_jax.data.source import TableRecord
from nalora_jax.data.tokenizer import REASONING
from nalora_jax.data.tokenizer_backend import is_unicode, unicode_error
from nalora_jax.data.turns import Message as Message
from nalora_jax.data.turns import completions, with_stops
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer


class MissingFieldError(NaloraError):
    """A record does not have a required field."""


@dataclass(frozen=True)
class Rendered:
    """A text and the character ranges of its completions.

    Example (a completion):
      >>> Rendered("2 + 2 = 4", answers=((7, 9),), special=True)
    """

    text: str
    # Character ranges that count in the loss, in order, not overlapping.
    answers: tuple[tuple[int, int], ...]
    # True if the tokenizer adds the begin-of-sequence id (a chat template writes it itself).
    special: bool


def render(record: dict[str, Any], config: DataConfig, tokenizer: Tokenizer, where: str) -> Rendered:
    """Returns the training text of a record, chosen by its fields (`nalora_jax.data.forms`).

    Args:
      record: one record of the data set.
      config: names of the fields, ``loss_on`` and ``chat``.
      tokenizer: renders chat templates.
      where: names the record in messages.

    Raises:
      NaloraError: a field is missing or of the wrong type, a completion is empty, or the chat
        template changes earlier turns when later turns are added, so that no exact mask exists.
    """
    record = canonical(record, config, where)
    if config.messages_field in record:
        messages, tools = messages_of(record, config, where), tools_of(record, where)
        return render_chat(messages, config.loss_on, tokenizer, where, tools)
    prompt = text_field(
        record, config.prompt_field, where, "--data.prompt-field", alternative=config.messages_field
    )
    completion = text_field(record, config.completion_field, where, "--data.completion-field")
    if not completion:
        raise NaloraError(
            f"{where}: {config.completion_field}", expected="an answer", found="an empty text"
        )
    if config.chat:
        return render_chat(as_messages(prompt, completion), config.loss_on, tokenizer, where)
    text = prompt + completion
    return Rendered(text, ((0 if config.loss_on == "all" else len(prompt), len(text)),), special=True)


def render_chat(
    messages: Sequence[Message],
    loss_on: str,
    tokenizer: Tokenizer,
    where: str,
    tools: Sequence[Message] | None = None,
) -> Rendered:
    """Renders a conversation with the model's chat template.

    A completion runs from the position at which generation would start to the end of its
    end-of-turn token. It excludes white space that a template writes between turns, and an
    end-of-sequence token that a template writes only after the last turn (as Phi-3's does). If the
    template ends turns by the next role's token, that token is part of the completion. If the loss
    is computed on the last completion only, the text after it is left out.

    Example (ChatML, completions in brackets, loss on every assistant turn):
      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n[Hello<|im_end|>]\\n

    Raises:
      NaloraError: there is no assistant turn to learn, or the template leaves no exact mask.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns and loss_on != "all":
        raise NaloraError(where, expected="an assistant's turn, whose tokens are the targets", found="none")
    if loss_on == "answer":
        turns = turns[-1:]
        messages = messages[: turns[0] + 1]
    if turns and turns[0] == 0 and loss_on != "all":
        raise NaloraError(where, expected="a user's or system's message first", found="an assistant's")
    for turn in turns:
        if _is_empty(messages[turn]):
            raise NaloraError(
                f"{where}: message {turn + 1} of {len(messages)}",
                expected="an assistant's answer",
                found="an empty text",
                remedy="the model would learn to end at once: write the answer, or remove the record",
            )
    ends_in_turn = messages[-1]["role"] == "assistant"
    if loss_on == "all":
        text = tokenizer.render_chat(messages, tools=tools).rstrip()
        answers: tuple[tuple[int, int], ...] = ((0, len(text)),)
    else:
        text, answers = _completions(messages, turns, tokenizer, where, tools)
        text = text[: answers[-1][1]] if ends_in_turn else text
    if ends_in_turn or loss_on != "all":
        text, answers = with_stops(text, answers, messages[-1], tokenizer, tools)
    return Rendered(text, answers, special=False)


def _completions(
    messages: Sequence[Message],
    turns: Sequence[int],
    tokenizer: Tokenizer,
    where: str,
    tools: Sequence[Message] | None,
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Returns the text and the completions; of long chats from short contents, if their text is the same."""
    short = shortened(messages, len(turns))
    if short is not None:
        text, answers = completions(short.messages, turns, tokenizer, where, tools)
        expanded = short.expanded(text, [place for answer in answers for place in answer])
        if expanded is not None and expanded[0] == tokenizer.render_chat(messages, tools=tools):
            places = iter(expanded[1])
            return expanded[0], tuple(zip(places, places, strict=True))
    return completions(messages, turns, tokenizer, where, tools)


def _is_empty(message: Message) -> bool:
    """Returns True if an assistant's message has no text, tool call or reasoning."""
    texts = [message.get(name) for name in ("content", *REASONING)]
    return not message.get("tool_calls") and not any(isinstance(t, str) and t.strip() for t in texts)


def as_messages(prompt: str, completion: str | None = None) -> list[Message]:
    """Returns prompt and completion as a user and an assistant turn.

    The leading space of the completion is removed.
    """
    messages = [{"role": "user", "content": prompt}]
    if completion is not None:
        messages.append({"role": "assistant", "content": completion.strip()})
    return messages


def messages_of(record: dict[str, Any], config: DataConfig, where: str) -> list[Message]:
    """Returns the chat messages of a record after checking them.

    Raises:
      NaloraError: not a list of messages with a role and a text.
    """
    field, value = config.messages_field, record[config.messages_field]
    if isinstance(value, dict) and all(isinstance(value_text, list) for value_text in value.values()):
        # TFDS stores a sequence of dicts as a dict of sequences.
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        actual = "none" if value == [] else f"a {type(value).__name__}"
        raise NaloraError(f"{where}: {field}", expected="a list of chat messages", found=actual)
    filled = isinstance(record, TableRecord)
    messages = [
        message_of(turn, f"{where}: {field}[{number}]", filled=filled) for number, turn in enumerate(value)
    ]
    for number, message in enumerate(messages):
        text_field(message, "role", f"{where}: {field}[{number}]")
        if not isinstance(message.get("content"), Parts):
            text_field(message, "content", f"{where}: {field}[{number}]")
    return messages


def text_field(
    record: dict[str, Any], field: str, where: str, flag: str = "", alternative: str = ""
) -> str:
    """Returns the text ``record[field]``.

    Raises:
      NaloraError: the field is missing (the message lists the record's fields) or not a text.
    """
    if field not in record:
        expected, remedy, names = f"a field {field!r}", "", ", ".join(map(repr, record))
        if alternative:
            expected += f" (or {alternative!r})"
        if flag:
            remedy = f"name the right one by {flag}"
        raise MissingFieldError(where, expected=expected, found=names or "no field", remedy=remedy)
    value = record[field]
    if not isinstance(value, str):
        raise NaloraError(f"{where}: {field}", expected="a text", found=f"a {type(value).__name__}")
    require_unicode(value, f"{where}: {field}")
    return value


def require_unicode(text: str, where: str) -> None:
    """Raises a NaloraError about ``where`` if ``text`` cannot be encoded.

    JSON can contain half a surrogate pair.
    """
    if not is_unicode(text):
        raise unicode_error(where, text)
