"""Exact match of generated completions with references, after normalisation."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from nalora_jax.data.items import CompletionItem
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate import Generator
from nalora_jax.evaluate.statistics import wilson

Normalise = Callable[[str], str]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A sign belongs to the number unless it is a subtraction ("10-5" contains 5); a comma only between
# groups of three digits.
_NUMBER = re.compile(r"(?:(?<!\w)[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class ExactMatchResult:
    """Share of completions that equal their reference, with its 95% interval."""

    accuracy: float
    low: float
    high: float
    n: int
    answers: tuple[str, ...]  # as generated
    correct: np.ndarray  # bool [n], for paired comparisons


def exact_match(
    generator: Generator,
    items: Sequence[CompletionItem],
    *,
    normalise: Normalise | None = None,
    batch_size: int = 16,
    **settings: Any,
) -> ExactMatchResult:
    """Generates a completion of every prompt and compares it with the reference.

    Args:
      generator: the model.
      items: prompts with reference completions.
      normalise: applied to both before the comparison; `plain_text` by default, `last_number` for
        arithmetic.
      batch_size: prompts per batch.
      **settings: generation settings, the fields of `nalora_jax.evaluate.generate.Settings`.

    Raises:
      NaloraError: there are no items, or a prompt cannot be continued.
    """
    if not items:
        raise NaloraError("evaluation data", expected="at least one question", found="none")
    clean = normalise or plain_text
    answers = generator.generate([item.prompt_ids for item in items], batch_size=batch_size, **settings)
    pairs = zip(answers, items, strict=True)
    correct = np.array([matches(answer, item.completion, clean) for answer, item in pairs])
    low, high = wilson(int(correct.sum()), len(items))
    return ExactMatchResult(float(correct.mean()), low, high, len(items), tuple(answers), correct)


def matches(answer: str, reference: str, normalise: Normalise) -> bool:
    """Returns True if both are equal and not empty after normalisation.

    If they are empty after normalisation, they must be equal without it.
    """
    expected = normalise(reference)
    normalised = normalise(answer)
    return normalised == expected and (bool(normalised) or answer.strip() == reference.strip())


def plain_text(text: str) -> str:
    """Returns the text in lower case, without punctuation, English articles and repeated spaces.

    This is SQuAD's normalisation.

    Example:
      >>> plain_text("  The Eiffel-Tower, Paris. ")
      'eiffeltower paris'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def last_number(text: str) -> str:
    """Returns the last number in a text in its shortest form, or "" if there is none.

    Example:
      >>> last_number("12 eggs at $3 make $1,036.50. #### 1,036.50")
      '1036.5'
    """
    numbers = _NUMBER.findall(text)
    if not numbers:
        return ""
    number = format(Decimal(numbers[-1].replace(",", "")).normalize(), "f")
    return "0" if number in ("-0", "+0") else number
