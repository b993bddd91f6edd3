"""Settings of generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Annotated

import numpy as np

from nalora_jax.config.structured import (
    COUNT,
    PENALTY,
    POSITIVE_SHARE,
    SHARE,
    TEMPERATURE,
    TOKENS,
    ranges,
)
from nalora_jax.errors import NaloraError


@dataclass(frozen=True)
class Settings:
    """Settings of generation."""

    # Maximum number of generated tokens; fewer at the end of the context.
    max_new_tokens: Annotated[int, TOKENS] = 128
    # 0 selects the most likely token; otherwise logits are divided by it.
    temperature: Annotated[float, TEMPERATURE] = 0.0
    # Sample from this many most likely tokens; 0: from all.
    top_k: Annotated[int, COUNT] = 0
    # Sample from the smallest set of tokens with at least this total probability.
    top_p: Annotated[float, POSITIVE_SHARE] = 1.0
    # Sample from tokens with at least this fraction of the maximum probability; 0: from all.
    min_p: Annotated[float, SHARE] = 0.0
    # Penalty of tokens that occur in the prompt or the completion, also for greedy decoding;
    # 1: none, above 1: fewer repetitions.
    repetition_penalty: Annotated[float, PENALTY] = 1.0
    # Samples are a function of seed, prompt and weights; a sequence has one seed per prompt.
    seed: int | Sequence[int] = 0
    # Texts that end the completion and are not part of it. If a text starts with a special token,
    # that token ends the completion.
    stop: str | Sequence[str] = ()
    # Tokens that end the completion; None: the tokenizer's end-of-text tokens.
    stop_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Raises a NaloraError that names the first setting out of range."""
        for name, allowed in ranges(Settings).items():
            require_setting(name, allowed.holds(getattr(self, name)), str(allowed), getattr(self, name))
        texts = isinstance(self.stop, Sequence) and all(isinstance(text, str) for text in self.stop)
        require_setting("stop", texts, "a text, or texts", self.stop)
        seeds = self.seed if isinstance(self.seed, Sequence | np.ndarray) else [self.seed]
        valid = all(isinstance(seed, Integral) for seed in seeds)
        require_setting("seed", valid, "a whole number, or one for each prompt", self.seed)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Returns ``stop`` as a tuple."""
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(self.stop)

    def seeds(self, count: int) -> tuple[int, ...]:
        """Returns one seed for each of ``count`` prompts."""
        if not isinstance(self.seed, Sequence):
            return (int(self.seed),) * count
        require_setting(
            "seed", len(self.seed) == count, f"one number, or {count}: one for each prompt", len(self.seed)
        )
        return tuple(self.seed)


def require_setting(setting: str, holds: bool, expected: str, value: object) -> None:
    """Raises a NaloraError unless the setting ``holds``."""
    if not holds:
        raise NaloraError(setting, expected=expected, found=value)
