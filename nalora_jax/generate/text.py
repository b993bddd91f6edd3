"""Text from tokens as they come: no half characters, nothing of a stop string, the same text as in one piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nalora_jax.tokenizer import Tokenizer

# What decoders put where bytes do not (yet) make a character.
_REPLACEMENT = "\ufffd"


class Decodes(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``."""


class TextStream:
    """Turns token ids, pushed in pieces, into pieces of text whose concatenation is the text of all ids.

    Text is held back while it may still change: an incomplete character, or the beginning of a stop string. What
    follows a stop string, and the stop string itself, is dropped.

    Example (a tokenizer of bytes; "é" is two bytes):
      >>> stream = TextStream(tokenizer, stop=("END",))
      >>> [stream.push(ids) for ids in ([99, 195], [169, 69], [78, 33])], stream.finish()
      (['c', 'é', 'EN!'], '')
    """

    def __init__(self, tokenizer: Decodes, stop: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []
        # Decoding starts at a token some way back, never at the newest: decoders treat a first token specially.
        self._start = 0
        self._complete = 0  # tokens before this end in a whole character
        self._shown = 0  # characters of the text from `_start` on that were taken
        self._held = ""  # taken, but possibly the beginning of a stop string
        self.stopped = False

    def push(self, ids: Iterable[int]) -> str:
        """The text that has become certain with ``ids``."""
        if self.stopped:
            return ""
        self._ids.extend(ids)
        return self._release(self._take(final=False), final=False)

    def finish(self) -> str:
        """What was still held back."""
        return "" if self.stopped else self._release(self._take(final=True), final=True)

    def _take(self, *, final: bool) -> str:
        """New characters of the decoded text, up to the first that is incomplete."""
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
        keep = 0 if final else _open_stop(text, self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _open_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that begins a stop string.

    Example:
      >>> _open_stop("abc###", ["### End"])
      3
    """
    sizes = (size for stop in stops for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size]))
    return max(sizes, default=0)


def special_stops(tokenizer: Tokenizer, stops: Sequence[str]) -> frozenset[int]:
    """Returns the ids of special tokens that stop strings begin with, white space aside.

    Text without special tokens never contains such a string, so the token itself has to end it.
    """
    added = tokenizer.backend.get_added_tokens_decoder()
    special = {token.content: number for number, token in added.items() if token.special and token.content}
    texts = [stop.lstrip() for stop in stops]
    return frozenset(number for content, number in special.items() if any(t.startswith(content) for t in texts))
