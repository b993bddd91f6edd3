"""Comparison of generated texts with references."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from decimal import Decimal

Normalise = Callable[[str], str]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A sign belongs to the number unless it is a subtraction ("10-5" contains 5); a comma only between
# groups of three digits.
_NUMBER = re.compile(
    r"(?:(?<!\w)[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)


def matches(
    answer: str,
    reference: str,
    normalise: Normalise,
) -> bool:
    """Returns True if both are equal and not empty after normalisation.

    If they are empty after normalisation, they must be equal without it.
    """
    normalised = normalise(answer)
    if normalised != normalise(reference):
        return False
    if normalised:
        return True
    return answer.strip() == reference.strip()


def normalize_text(text: str) -> str:
    """Returns the text in lower case, without punctuation, English articles and repeated spaces.

    This is SQuAD's normalisation.

    Example:
      >>> normalize_text("  The Eiffel-Tower, Paris. ")
      'eiffeltower paris'
    """
    plain = text.lower().translate(_PUNCTUATION)
    words = _ARTICLES.sub(" ", plain).split()
    return " ".join(words)


def last_number(text: str) -> str:
    """Returns the last number in a text in its shortest form, or "" if there is none.

    Example:
      >>> last_number("12 eggs at $3 make $1,036.50. #### 1,036.50")
      '1036.5'
    """
    numbers = _NUMBER.findall(text)
    if not numbers:
        return ""
    digits = numbers[-1].replace(",", "")
    number = format(Decimal(digits).normalize(), "f")
    if number in ("-0", "+0"):
        return "0"
    return number
