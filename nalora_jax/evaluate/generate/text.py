"""Streaming of text from tokens: whole characters, no stop strings, equal to the decoded text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer

# Decoders write it for bytes that do not (yet) form a character.
_REPLACEMENT = "\ufffd"


class Decodes(Protocol):
    """The part of a tokenizer that streaming uses."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ``ids``."""


class TextStream:
    """Converts pieces of token ids to pieces of text, whose concatenation is the text of all ids.

    Text that may still change is held back: an incomplete character, or the beginning of a stop
    string. A stop string and all text after it are dropped.

    Example (a tokenizer of bytes; "é" is two bytes):
      >>> stream = TextStream(tokenizer, stop=("END",))
      >>> [stream.push(ids) for ids in ([99, 195], [169, 69], [78, 33])], stream.finish()
      (['c', 'é', 'EN!'], '')
    """

    def __init__(self, tokenizer: Decodes, stop: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []
        # Decoding starts some tokens back, never at the newest: decoders treat a first token specially.
        self._start = 0
        self._complete = 0  # tokens before this end in a whole character
        self._shown = 0  # characters of the text since `_start` that were returned or held back
        self._held = ""  # possibly the beginning of a stop string
        self.stopped = False

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that is final after ``ids``."""
        if self.stopped:
            return ""
        self._ids.extend(ids)
        return self._release(self._take(final=False), final=False)

    def finish(self) -> str:
        """Returns the text that was held back."""
        if self.stopped:
            return ""
        return self._release(self._take(final=True), final=True)

    def _take(self, *, final: bool) -> str:
        """Returns new characters of the decoded text, up to the first incomplete one."""
        text = self._tokenizer.decode(self._ids[self._start :])
        stable = text if final else text.rstrip(_REPLACEMENT)
        piece = stable[self._shown :]
        self._shown = max(self._shown, len(stable))
        if len(stable) == len(text):
            self._start, self._complete = self._complete, len(self._ids)
            self._shown = len(self._tokenizer.decode(self._ids[self._start :]))
        return piece

    def _release(self, piece: str, *, final: bool) -> str:
        text = self._held + piece
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        held = 0
        if not final:
            held = _open_stop(text, self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _open_stop(text: str, stops: Sequence[str]) -> int:
    """Returns the length of the longest suffix of ``text`` that is a prefix of a stop string.

    Example:
      >>> _open_stop("abc###", ["### End"])
      3
    """
    sizes = (size for stop in stops for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size]))
    return max(sizes, default=0)


def special_stops(tokenizer: Tokenizer, stops: Sequence[str]) -> frozenset[int]:
    """Returns the ids of special tokens at the start of stop strings, after white space.

    Decoded text has no special tokens, so such a string can only be detected by the token.
    """
    added = tokenizer.backend.get_added_tokens_decoder()
    special = {token.content: number for number, token in added.items() if token.special and token.content}
    texts = [stop.lstrip() for stop in stops]
    return frozenset(
        number for content, number in special.items() if any(t.startswith(content) for t in texts)
    )
