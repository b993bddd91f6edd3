"""Token-weighted loss and perplexity of completions, with a confidence interval over documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from nalora_jax.data.items import CompletionItem
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.likelihood import score_groups
from nalora_jax.evaluate.statistics import bootstrap
from nalora_jax.models.decoder import Decoder


@dataclass(frozen=True)
class PerplexityResult:
    """Loss over all loss tokens, with its 95% bootstrap interval over documents."""

    loss: float  # nats per token
    low: float
    high: float
    perplexity: float  # exp(loss)
    tokens: int
    n: int  # documents


def completion_loss(
    model: Decoder,
    variables: Mapping[str, Any],
    items: Sequence[CompletionItem],
    *,
    mesh: Mesh | None = None,
) -> PerplexityResult:
    """Computes the loss of the reference completions after their prompts; an item is a document."""
    groups = [[(item.prompt_ids, item.completion_ids)] for item in items]
    scores = [row[0] for row in score_groups(model, variables, groups, mesh=mesh)]
    return result(
        np.array([-score.log_prob for score in scores]), np.array([score.tokens for score in scores])
    )


def result(sums: np.ndarray, counts: np.ndarray) -> PerplexityResult:
    """Computes loss and interval from the loss sums and token counts of documents."""
    tokens = int(counts.sum())
    if tokens == 0:
        raise NaloraError("evaluation data", expected="at least one target token", found="none")
    loss = float(sums.sum() / tokens)
    low, high = bootstrap(sums, counts)
    return PerplexityResult(loss, low, high, math.exp(min(loss, 700.0)), tokens, len(sums))
