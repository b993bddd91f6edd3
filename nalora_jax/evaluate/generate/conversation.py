"""A conversation with a model: turns, a system prompt and streamed answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.data.chat_templates import state_layouts
from nalora_jax.data.chat_text import Message, text_field
from nalora_jax.data.forms import Parts, check_role
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate.generator import Generator


class Conversation:
    """The turns so far; a streamed answer is added as far as it has been read.

    Attributes:
      system: the system prompt, or None.
      turns: messages of user and assistant, in order.
      images: processed images of the turns, in order (uint8 ``[height, width, 3]``).
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[Message] = []
        self.images: list[np.ndarray] = []

    @property
    def messages(self) -> list[Message]:
        """Returns the system prompt and the turns."""
        if self.system is None:
            return list(self.turns)
        return [{"role": "system", "content": self.system}, *self.turns]

    def reset(self) -> None:
        """Removes the turns and their images, not the system prompt."""
        self.turns = []
        self.images = []

    def ask(
        self,
        text: str,
        generator: Generator,
        *,
        images: Sequence[np.ndarray] = (),
        **settings: Any,
    ) -> Iterator[str]:
        """Yields the answer to ``text`` in pieces. After an error the conversation is unchanged.

        Args:
          text: the user's message.
          generator: generates the answer.
          images: images before the text, processed by the model's processor.
          **settings: the fields of `nalora_jax.evaluate.generate.GenerationSettings`.

        Raises:
          NaloraError: the chat template rejects the turns, they fill the context, or the text has
            image tokens.
        """
        tokens = generator.tokenizer.images
        if tokens is not None and tokens.reserved(text):
            raise NaloraError(
                "message", expected=f"no {tokens.token} in it", found=repr(text)[:80]
            )
        question: Message = {"role": "user", "content": text}
        if images:
            parts: list[dict[str, Any]] = [{"type": "image"} for _ in images]
            parts.append({"type": "text", "text": text})
            question["content"] = Parts(parts)
        pictures = [*self.images, *images]
        if tokens is not None and tokens.sized and pictures:
            # The tokens of an image may depend on how many follow it.
            processor: Any = generator.processor
            layouts = processor.layouts_of_prepared(pictures)
            state_layouts([*self.turns, question], layouts)
        prompt = chat_tokens(generator.tokenizer, [*self.messages, question])
        pieces = generator.stream(prompt, images=pictures, **settings)
        answer: Message = {"role": "assistant", "content": ""}
        self.turns += [question, answer]
        self.images = pictures
        return self._record(pieces, answer)

    def _record(self, pieces: Iterator[str], answer: Message) -> Iterator[str]:
        """Yields the pieces, and adds each to the answer."""
        for piece in pieces:
            answer["content"] += piece
            yield piece


def chat_tokens(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]
) -> list[int]:
    """Returns the token ids of a conversation up to the start of the assistant's answer.

    The template writes the begin-of-sequence token.

    Raises:
      NaloraError: the model has no chat template, or its template rejects the messages.
    """
    text = tokenizer.render_chat(messages, add_generation_prompt=True)
    return tokenizer.encode(text, special=False)


def read_messages(path: Path) -> list[Message]:
    """Returns the messages of a JSON file: a list of them, or an object with ``messages``.

    Raises:
      NaloraError: an unreadable file, other content, an unknown role, or no user's message last.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NaloraError(
            f"--messages {path}", expected="a JSON file", found=error
        ) from error
    if isinstance(parsed, dict):
        parsed = parsed.get("messages")
    if not isinstance(parsed, list) or not parsed:
        found = "none"
        if parsed:
            found = f"a {type(parsed).__name__}"
        raise NaloraError(
            f"--messages {path}",
            expected='a list of messages, or an object with "messages"',
            found=found,
        )
    for number, message in enumerate(parsed):
        where = f"{path}: messages[{number}]"
        if not isinstance(message, dict):
            raise NaloraError(
                where,
                expected='{"role": ..., "content": ...}',
                found=f"a {type(message).__name__}",
            )
        check_role(text_field(message, "role", where), where)
        text_field(message, "content", where)
    if parsed[-1]["role"] == "assistant":
        raise NaloraError(
            f"--messages {path}",
            expected="a user's message last",
            found="an assistant's",
            remedy="leave out the last message: the model generates it",
        )
    return parsed
