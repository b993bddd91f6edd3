"""A conversation with a model: turns, a system prompt, and answers that are streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.data.chat import Message, text_field
from nalora_jax.data.forms import Parts
from nalora_jax.errors import NaloraError
from nalora_jax.generate.generator import Generator
from nalora_jax.tokenizer import Tokenizer


class Conversation:
    """Turns so far; an answer is part of it as far as it was taken from the stream.

    Attributes:
      system: the system prompt, or None.
      turns: user's and assistant's messages, in order.
      images: those that the turns show, in their order, prepared (uint8 ``[height, width, 3]``).
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[Message] = []
        self.images: list[np.ndarray] = []

    @property
    def messages(self) -> list[Message]:
        """Everything that the model reads."""
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.turns]

    def reset(self) -> None:
        """Forget the turns and their images; the system prompt stays."""
        self.turns, self.images = [], []

    def ask(
        self, text: str, generator: Generator, *, images: Sequence[np.ndarray] = (), **settings: Any
    ) -> Iterator[str]:
        """The answer to ``text`` in pieces. Where it cannot be asked, the conversation stays as it was.

        Args:
          text: of the user.
          generator: answers.
          images: what the user shows before the text, as the model's processor prepares it.
          **settings: the fields of `nalora_jax.generate.Settings`.

        Raises:
          NaloraError: the chat template refuses the turns, they fill the context, or the text holds what stands for
            images.
        """
        tokens = generator.tokenizer.images
        if tokens is not None and tokens.reserved(text):
            raise NaloraError("message", expected=f"no {tokens.token} in it", found=repr(text)[:80])
        parts = Parts([*[{"type": "image"}] * len(images), {"type": "text", "text": text}])
        asked: Message = {"role": "user", "content": parts if images else text}
        seen = [*self.images, *images]
        pieces = generator.stream(chat_tokens(generator.tokenizer, [*self.messages, asked]), images=seen, **settings)
        answer: Message = {"role": "assistant", "content": ""}
        self.turns += [asked, answer]
        self.images = seen
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
