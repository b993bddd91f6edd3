"""Chats of many long turns: short texts stand in for long contents while prefixes are rendered.

An exact mask needs the rendered text up to every turn, which is quadratic in the length of a chat.
Most templates copy contents unchanged. Then the turns' positions in the chat follow from a chat with
the same turns and short contents, and only one text of the full length is rendered.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

# Characters that all prefixes together may have before contents are shortened.
_MOST = 4_000_000
_LONG = 64  # characters of a content that is shortened
_MARK = re.compile(r"xq(\d{6})qx")


@dataclass(frozen=True)
class ShortChat:
    """A chat whose long contents are marks, which keep the white space around a content."""

    messages: list[dict[str, Any]]
    contents: list[str]  # of each mark, without white space around it

    def expanded(self, text: str, positions: Sequence[int]) -> tuple[str, list[int]] | None:
        """Returns a rendered text with its contents, and the positions in it; None if one is inside a content."""
        marks = list(_MARK.finditer(text))
        if any(mark.start() < position < mark.end() for mark in marks for position in positions):
            return None
        contents = [self.contents[int(mark[1])] for mark in marks]
        ends = [mark.end() for mark in marks]
        longer = (len(content) - len(mark[0]) for content, mark in zip(contents, marks, strict=True))
        shifts = [0, *accumulate(longer)]
        places = [position + shifts[bisect_right(ends, position)] for position in positions]
        return self.restored(text), places

    def restored(self, text: str) -> str:
        """Returns a rendered text with its contents."""
        return _MARK.sub(lambda mark: self.contents[int(mark[1])], text)


def shortened(messages: Sequence[dict[str, Any]], turns: int) -> ShortChat | None:
    """Returns the chat with marks in place of long contents; None if its prefixes are short enough.

    Args:
      messages: the chat.
      turns: prefixes to render.
    """
    long = {i for i, message in enumerate(messages) if _is_long(message.get("content"))}
    if turns * sum(len(messages[i]["content"]) for i in long) <= _MOST:
        return None
    return marked(messages, long)


def marked(messages: Sequence[dict[str, Any]], places: Collection[int]) -> ShortChat:
    """Returns the chat with marks in place of the contents at ``places``."""
    short: list[dict[str, Any]] = []
    contents: list[str] = []
    for i, message in enumerate(messages):
        if i in places:
            text: str = message["content"]
            content = text.strip()
            start = text.index(content)
            mark = f"{text[:start]}xq{len(contents):06}qx{text[start + len(content) :]}"
            message = message | {"content": mark}
            contents.append(content)
        short.append(message)
    return ShortChat(short, contents)


def _is_long(content: Any) -> bool:
    return isinstance(content, str) and len(content.strip()) > _LONG
