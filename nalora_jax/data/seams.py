"""Seams of texts: positions at which a text can be divided without a change of its tokens.

A tokenizer divides texts at special tokens and, before it merges, into words. The tokens before and
after such a position are independent, so that only the part around the start of a completion has to
be encoded twice:

    <|im_start|>user\\nUp?<|im_end|>\\n<|im_start|> | assistant\\n^It is | that way.<|im_end|>

Here ``|`` are seams and ``^`` is the boundary: the tokens of "assistant\\nIt is" must start with
the tokens of "assistant\\n".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer

_WORDS = "ab cd ef, gh"
# Returns the ids of a text and the token positions of boundaries at the given characters.
Recut = Callable[[str, list[int]], tuple[list[int], list[int]]]


@dataclass
class Division:
    """Parts of a text to encode, and the rule that joins their ids."""

    texts: list[str] = field(default_factory=list)
    # For each text: True for the start of the previous part, up to a boundary; False for the next
    # part.
    heads: list[bool] = field(default_factory=list)
    # True if a boundary is inside a special token: then other parts depend on how it is encoded.
    cuts_special: bool = False

    def add(self, text: str, *, head: bool = False) -> None:
        """Appends a part, or the beginning of the last part."""
        self.texts.append(text)
        self.heads.append(head)

    def join(self, encoded: Sequence[list[int]], recut: Recut) -> tuple[list[int], list[int]] | None:
        """Returns a text's ids and each boundary's token position; None if the parts are not independent.

        Args:
          encoded: ids of each of `texts`.
          recut: encodes a part of the text whose tokens cross one of its boundaries.
        """
        ids: list[int] = []
        positions: list[int] = []
        starts = [i for i, head in enumerate(self.heads) if not head]
        for start, stop in pairwise([*starts, len(self.heads)]):
            piece_ids, heads = encoded[start], encoded[start + 1 : stop]
            places = [len(head) for head in heads]
            if any(piece_ids[: len(head)] != head for head in heads):
                if self.cuts_special:
                    return None
                piece_ids, places = recut(
                    self.texts[start], [len(text) for text in self.texts[start + 1 : stop]]
                )
            positions += [len(ids) + place for place in places]
            ids += piece_ids
        return ids, positions


@dataclass(frozen=True)
class Seams:
    """Positions at which texts of a tokenizer can be divided.

    Attributes:
      special: special tokens that divide a text.
      words: True if a space between two ASCII letters starts a new word.
    """

    special: tuple[str, ...]
    words: bool

    def divide(self, text: str, cuts: Sequence[int]) -> Division:
        """Divides ``text`` for the comparison of its tokens up to each of ``cuts`` (ascending)."""
        division = Division(cuts_special=any(self._cuts_special(text, cut) for cut in cuts))
        start = done = 0
        for cut in cuts:
            if cut >= done:
                start = max(self._before(text, cut), done)
                end = self._after(text, cut)
                if start > done:
                    division.add(text[done:start])
                division.add(text[start:end])
                done = end
            division.add(text[start:cut], head=True)
        if done < len(text) or not cuts:
            division.add(text[done:])
        return division

    def _cuts_special(self, text: str, cut: int) -> bool:
        """Returns True if ``cut`` is inside a special token."""
        places = (
            text.find(name, max(cut - len(name) + 1, 0), cut + len(name) - 1) for name in self.special
        )
        return any(at >= 0 for at in places)

    def _before(self, text: str, cut: int) -> int:
        """Returns the last seam up to ``cut``."""
        best = 0
        for token in self.special:
            at = text.rfind(token, best, cut)
            if at >= 0:
                best = max(best, at + len(token))
        at = cut
        while self.words and (at := text.rfind(" ", best + 1, at)) > 0:
            if _between_letters(text, at):
                return at
        return best

    def _after(self, text: str, cut: int) -> int:
        """Returns the first seam at ``cut`` or after it; after it without a special token there."""
        best = len(text)
        for token in self.special:
            at = text.find(token, cut, best)
            if at >= 0:
                best = at
        at = cut
        while self.words and (at := text.find(" ", at + 1, best)) > 0:
            if _between_letters(text, at):
                return at
        return best


def _between_letters(text: str, at: int) -> bool:
    around = text[at - 1 : at] + text[at + 1 : at + 2]
    return len(around) == 2 and around.isascii() and around.isalpha()


def seams_of(tokenizer: Tokenizer, texts: Sequence[str]) -> Seams:
    """Returns the seams of a tokenizer, with the special tokens that occur in ``texts``."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    names = [token.content for token in added]
    plain = [t.content for t in added if not (t.normalized or t.lstrip or t.rstrip or t.single_word)]
    used = [name for name in plain if any(name in text for text in texts)]
    special = [name for name in used if not any(_overlap(name, other) for other in names)]
    return Seams(tuple(name for name in special if _divides(tokenizer, name)), _words(tokenizer))


def _overlap(name: str, other: str) -> bool:
    """Returns True if two different tokens can share characters of a text."""
    if name == other:
        return False
    short = min(len(name), len(other))
    return name in other or any(name[-n:] == other[:n] or other[-n:] == name[:n] for n in range(1, short))


def _divides(tokenizer: Tokenizer, name: str) -> bool:
    joined, *parts = tokenizer.encode_batch([f"a {name}b c{name} d", "a ", name, "b c", name, " d"])
    return joined == [token for piece in parts for token in piece]


def _words(tokenizer: Tokenizer) -> bool:
    """Returns True if the tokenizer divides a text into words and encodes each independently."""
    before = tokenizer.backend.pre_tokenizer
    if before is None:
        return False
    ends = {end for _, (_, end) in before.pre_tokenize_str(_WORDS)}
    joined, *parts = tokenizer.encode_batch([_WORDS, "ab", " cd", " ef, gh"])
    return {2, 5} <= ends and joined == [token for piece in parts for token in piece]
