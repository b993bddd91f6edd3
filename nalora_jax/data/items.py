"""Tokenized evaluation examples: multiple-choice questions and plain completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nalora_jax.common.digests import digest_of, json_digest

# Minimum of held-out examples to choose a checkpoint by; with fewer, the choice is mostly chance,
# since one more correct example is a tenth.
FEW = 10


@dataclass(frozen=True)
class ChoiceItem:
    """A multiple-choice question; the model answers with the likeliest choice after the prompt.

    Example ("Q: Which way is up?\\nA:" with two choices, ids invented):
      >>> choices = [" up", " down"]
      >>> ChoiceItem([57, 28], [[1480], [951, 17]], gold=0, prompt="Q: ...", choices=choices)

    In fill-in tasks (winogrande) the choices change the prompt and share the continuation: then
    `choice_prompt_ids` has one prompt per choice and `choice_ids` repeats the continuation.
    `contexts` covers both.
    """

    # Prompt shared by all choices; if each choice has its own, the prompt of the gold choice.
    prompt_ids: list[int]
    # Tokens to score after the prompt, one list per choice, never empty; without the
    # end-of-turn token.
    choice_ids: list[list[int]]
    # Index of the correct choice.
    gold: int
    # Text of the prompt, as tokenized.
    prompt: str
    # Text of each choice, for display.
    choices: list[str]
    # Prompt of each choice if the choices differ in their prompts; None if they share it.
    choice_prompt_ids: list[list[int]] | None = None

    @property
    def contexts(self) -> Sequence[list[int]]:
        """Returns the prompt ids of each choice."""
        return self.choice_prompt_ids or [self.prompt_ids] * len(self.choice_ids)


@dataclass(frozen=True)
class CompletionItem:
    """One prompt and its reference completion, for perplexity, exact match and sample answers."""

    prompt_ids: list[int]
    # Reference completion, never empty; without the end-of-turn token.
    completion_ids: list[int]
    # Texts of prompt and completion, as tokenized.
    prompt: str
    completion: str
    # For conversations, the turns before the completion as (role, text), for display.
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class VisionItem(CompletionItem):
    """A completion whose prompt has images, each encoded or a file's path."""

    images: tuple[bytes | Path, ...] = ()


Item = ChoiceItem | CompletionItem


def digest(items: Sequence[Item]) -> str:
    """Returns the SHA-256 of the examples: equal if prompts, completions, images and order are
    equal."""
    asked = []
    for item in items:
        values = asdict(item)
        values.pop("turns", None)
        asked.append(values)
    return json_digest(asked, default=_digest_of_image)


def _digest_of_image(image: Any) -> str:
    """Returns the SHA-256 of an image, given as its bytes or the path of its file."""
    if not isinstance(image, bytes):
        image = image.read_bytes()
    return digest_of(image)
