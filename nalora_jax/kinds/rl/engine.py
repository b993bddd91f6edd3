"""What draws completions for rollouts: servers (`nalora_jax.kinds.rl.servers`), or a generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Request(NamedTuple):
    """One completion to draw."""

    ids: Sequence[int]  # tokens before it
    seed: int
    limit: int  # most new tokens


class DrawnCompletion(NamedTuple):
    """A completion that was drawn."""

    tokens: np.ndarray  # int32 [length], with its stop token
    # float32 [length], of the engine at the sampling temperature
    log_probs: np.ndarray
    version: int  # training step of the adapter that wrote it
    # int16 [tokens before it + length, mixtures, top_k], experts (`nalora_jax.models.replay`); None
    # if they are not recorded
    routing: np.ndarray | None = None


class Engine(Protocol):
    """Draws completions of the adapter that was loaded last."""

    def load(self, lora: Any, step: int) -> None:
        """Loads the adapter after ``step`` training steps: later samples come from it."""

    def sample(self, requests: Sequence[Request]) -> list[DrawnCompletion]:
        """Returns a completion of each request."""
