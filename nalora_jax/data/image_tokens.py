"""Image placeholders of chat templates, and the tokens that replace them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageTokens:
    """The format in which a model writes an image into its text.

    Example (LLaVA 1.5):
      >>> ImageTokens(token="<image>", token_id=32000, count=576, placeholder="<image>")
    """

    token: str  # its name in the tokenizer
    token_id: int
    count: int  # tokens per image
    placeholder: str  # text that a chat template, or a user, writes for an image
    before: str = ""  # texts around an image's tokens
    after: str = ""

    @property
    def expansion(self) -> str:
        """The text of one image."""
        return self.before + self.token * self.count + self.after

    def expanded(self, text: str) -> str:
        """Returns ``text`` with every placeholder replaced by the tokens of an image."""
        return self.expansion.join(text.split(self.placeholder))

    def reserved(self, text: str) -> bool:
        """Returns True if a text contains a placeholder or image token; users' text must not."""
        return self.placeholder in text or self.token in text


def as_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Converts string contents to lists of parts, as multimodal templates expect.

    Example:
      ``{"role": "user", "content": "Hi"}`` -> ``{"role": "user", "content": [{"type": "text",
      "text": "Hi"}]}``
    """

    def parts(content: Any) -> list[Any]:
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        return list(content)

    return [
        {**message, "content": parts(message["content"])} if "content" in message else dict(message)
        for message in messages
    ]
