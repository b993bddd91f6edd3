"""What evaluation scores: one multiple-choice or one plain completion question, tokenized."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Held-out examples below which a choice between checkpoints is mostly chance: one more right answer is a tenth.
FEW = 10


@dataclass(frozen=True)
class ChoiceItem:
    """One multiple-choice question; the answer is the choice whose tokens are likeliest after the prompt.

    Example ("Q: Which way is up?\\nA:" with two choices, ids invented):
      >>> ChoiceItem([57, 28], [[1480], [951, 17]], gold=0, prompt="Q: ...", choices=[" up", " down"])

    In fill-in tasks (winogrande) the choices change the prompt and share the continuation: then `choice_prompt_ids`
    has one prompt per choice and `choice_ids` repeats the continuation. `contexts` covers both.
    """

    # Prompt shared by all choices (of the gold choice, where each has its own).
    prompt_ids: list[int]
    # Tokens to score after the prompt, one list per choice, never empty; without the end-of-turn token.
    choice_ids: list[list[int]]
    # Index of the right choice.
    gold: int
    # Text of the prompt, as tokenized.
    prompt: str
    # Text of each choice, for display.
    choices: list[str]
    # Prompt of each choice, where the choices differ in their prompt; None where they share it.
    choice_prompt_ids: list[list[int]] | None = None

    @property
    def contexts(self) -> Sequence[list[int]]:
        """Prompt ids of each choice."""
        return self.choice_prompt_ids or [self.prompt_ids] * len(self.choice_ids)


@dataclass(frozen=True)
class CompletionItem:
    """One prompt and its reference completion, for perplexity, exact match and sample answers."""

    prompt_ids: list[int]
    # Reference answer, never empty; without the end-of-turn token.
    completion_ids: list[int]
    # Texts of both, as tokenized.
    prompt: str
    completion: str
    # The conversation before the answer as (role, text), where it was one: for display.
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SeenItem(CompletionItem):
    """A completion whose prompt has images: encoded, or files' paths."""

    images: tuple[bytes | Path, ...] = ()


Item = ChoiceItem | CompletionItem


def digest(items: Sequence[Item]) -> str:
    """SHA-256 of questions with their answers: equal where the same is asked in the same order."""
    asked = [{name: value for name, value in asdict(item).items() if name != "turns"} for item in items]
    return hashlib.sha256(json.dumps(asked, default=_stated).encode()).hexdigest()


def _stated(value: bytes | Path) -> str:
    """What an image is told apart by: its content."""
    content = value.read_bytes() if isinstance(value, Path) else value
    return hashlib.sha256(content).hexdigest()
