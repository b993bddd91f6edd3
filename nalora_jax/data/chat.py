"""Renders records as text and marks the parts whose tokens count in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nalora_jax.config import DataConfig
from nalora_jax.data.forms import Parts, canonical, message_of, tools_of
from nalora_jax.data.long_chats import shortened
from nalora_jax.data.source import TableRecord
from nalora_jax.errors import NaloraError
from nalora_jax.tokenizer import REASONING
from nalora_jax.tokenizer_backend import is_unicode, unicode_error

if TYPE_CHECKING:
    from nalora_jax.tokenizer import Tokenizer

Message = dict[str, Any]


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
    loss is computed on the last completion only, the text after it is left out.

    Example (ChatML, completions in brackets, loss on every assistant turn):
      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n[Hello<|im_end|>]\\n
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
    if loss_on == "all":
        text = tokenizer.render_chat(messages, tools=tools).rstrip()
        return Rendered(text, ((0, len(text)),), special=False)
    if loss_on == "assistant" and (short := shortened(messages, len(turns))) is not None:
        rendered = render_chat(short.messages, loss_on, tokenizer, where, tools)
        expanded = short.expanded(rendered.text, [place for answer in rendered.answers for place in answer])
        if expanded is not None and tokenizer.render_chat(messages, tools=tools).startswith(expanded[0]):
            places = iter(expanded[1])
            return Rendered(expanded[0], tuple(zip(places, places, strict=True)), special=False)
    # The full text, then for each completion the text before it and the text up to its end.
    parts = [part for turn in turns for part in ((messages[:turn], True), (messages[: turn + 1], False))]
    text, *texts = tokenizer.render_chats([(messages, False), *parts], tools)
    end_of_chat = _end_of_chat(text, messages, tokenizer, tools)
    texts = [part.removesuffix(end_of_chat) for part in texts]
    answers = tuple(
        _answer(text, before, upto, where) for before, upto in zip(texts[::2], texts[1::2], strict=True)
    )
    end = answers[-1][1] if turns[-1] == len(messages) - 1 else len(text)
    return Rendered(text[:end], answers, special=False)


def _is_empty(message: Message) -> bool:
    """Returns True if an assistant's message has no text, tool call or reasoning."""
    texts = [message.get(name) for name in ("content", *REASONING)]
    return not message.get("tool_calls") and not any(isinstance(t, str) and t.strip() for t in texts)


def _end_of_chat(
    text: str, messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Message] | None
) -> str:
    """Returns the end-of-sequence token after a conversation that is not part of its last turn.

    It is "" if there is none, or if the token remains when the template continues the conversation.
    """
    token = (tokenizer.special_tokens or {}).get("eos_token", "")
    if not token or not text.endswith(token):
        return ""
    try:
        continued = tokenizer.render_chat(messages, add_generation_prompt=True, tools=tools)
    except NaloraError:  # a completion cannot follow this turn
        return ""
    if continued.startswith(text) or not continued.startswith(text.removesuffix(token)):
        return ""
    return token


def _answer(text: str, before: str, upto: str, where: str) -> tuple[int, int]:
    """Returns the character range of a completion in ``text``, the full conversation."""
    if not (text.startswith(upto) and upto.startswith(before)):
        raise NaloraError(
            where,
            expected="a chat template whose earlier turns stay as they are when turns are added",
            found="one that rewrites them, so that no exact loss mask exists",
            remedy="use --data.loss-on answer (one turn a record), --data.loss-on all, or prompt/completion records",
        )
    return len(before), len(upto.rstrip())


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
