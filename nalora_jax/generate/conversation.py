"""A conversation with a model: turns, a system prompt, and answers that are streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nalora_jax.data.chat import Message, text_field
from nalora_jax.errors import NaloraError
from nalora_jax.generate.generator import Generator
from nalora_jax.tokenizer import Tokenizer


class Conversation:
    """Turns so far; an answer is part of it as far as it was taken from the stream.

    Attributes:
      system: the system prompt, or None.
      turns: user's and assistant's messages, in order.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """Everything that the model reads."""
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.turns]

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.turns = []

    def ask(self, text: str, generator: Generator, **settings: Any) -> Iterator[str]:
        """The answer to ``text`` in pieces. Where it cannot be asked, the conversation stays as it was.

        Args:
          text: of the user.
          generator: answers.
          **settings: the fields of `nalora_jax.generate.Settings`.

        Raises:
          NaloraError: the chat template refuses the turns, or they fill the context.
        """
        asked = {"role": "user", "content": text}
        pieces = generator.stream(chat_tokens(generator.tokenizer, [*self.messages, asked]), **settings)
        answer = {"role": "assistant", "content": ""}
        self.turns += [asked, answer]
        return self._taken(pieces, answer)

    def _taken(self, pieces: Iterator[str], answer: Message) -> Iterator[str]:
        for piece in pieces:
            answer["content"] += piece
            yield piece


def chat_tokens(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins.

    The template writes the begin-of-sequence token itself.

    Raises:
      NaloraError: the model has no chat template, or its template refuses the messages.
    """
    return tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True), special=False)


def read_messages(path: Path) -> list[Message]:
    """The messages of a JSON file: a list of ``{"role": ..., "content": ...}``, or an object with such ``messages``.

    Raises:
      NaloraError: the file cannot be read or holds something else, or the last word is the assistant's already.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NaloraError(f"--messages {path}", expected="a JSON file", found=error) from error
    if isinstance(found, dict):
        found = found.get("messages")
    if not isinstance(found, list) or not found:
        expected = 'a list of messages, or an object with "messages"'
        raise NaloraError(
            f"--messages {path}", expected=expected, found=f"a {type(found).__name__}" if found else "none"
        )
    for number, message in enumerate(found):
        where = f"{path}: messages[{number}]"
        if not isinstance(message, dict):
            raise NaloraError(where, expected='{"role": ..., "content": ...}', found=f"a {type(message).__name__}")
        text_field(message, "role", where)
        text_field(message, "content", where)
    if found[-1]["role"] == "assistant":
        remedy = "leave out the last message: it is what the model is asked for"
        raise NaloraError(f"--messages {path}", expected="a user's message last", found="an assistant's", remedy=remedy)
    return found
