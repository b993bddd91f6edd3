"""Where images stand in a text: the placeholder that chat templates write, and the tokens that take its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageTokens:
    """How a model writes an image into its text.

    Example (LLaVA 1.5):
      >>> ImageTokens(token="<image>", token_id=32000, count=576, placeholder="<image>")
    """

    token: str  # as the tokenizer knows it
    token_id: int
    count: int  # of them for each image
    placeholder: str  # what a chat template, or a user, writes for an image
    before: str = ""  # texts around an image's tokens
    after: str = ""

    @property
    def expansion(self) -> str:
        """The text of one image."""
        return self.before + self.token * self.count + self.after

    def expanded(self, text: str) -> str:
        """``text`` with the tokens of an image in the place of every placeholder."""
        return self.expansion.join(text.split(self.placeholder))

    def reserved(self, text: str) -> bool:
        """Whether a text holds what stands for images: a user's words must not."""
        return self.placeholder in text or self.token in text


def as_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are lists of parts, which the templates of models that see loop over.

    Example:
      ``{"role": "user", "content": "Hi"}`` -> ``{"role": "user", "content": [{"type": "text", "text": "Hi"}]}``
    """

    def parts(content: Any) -> list[Any]:
        return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)

    return [
        {**message, "content": parts(message["content"])} if "content" in message else dict(message)
        for message in messages
    ]
