"""Token-weighted loss and perplexity of texts, with a confidence interval over documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nalora_jax.data.items import CompletionItem
from nalora_jax.distributed import fetch
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.likelihood import score_groups, target_log_probs
from nalora_jax.evaluate.split_rows import for_rows
from nalora_jax.evaluate.statistics import bootstrap
from nalora_jax.generate.shapes import place_batch
from nalora_jax.models.decoder import Decoder
from nalora_jax.ops.split_rows import joined
from nalora_jax.ops.storage import prepare


@dataclass(frozen=True)
class PerplexityResult:
    """Loss over all loss tokens, with its 95% bootstrap interval over documents."""

    loss: float  # nats per token
    low: float
    high: float
    perplexity: float  # exp(loss)
    tokens: int
    n: int  # documents


def perplexity(
    model: Decoder,
    variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, Any]],
    *,
    mesh: Mesh | None = None,
) -> PerplexityResult:
    """Computes the loss over packed batches; a document is a segment of a row.

    Args:
      model: the decoder.
      variables: ``params``, and ``lora`` if there are adapters.
      batches: ``tokens, targets, loss_weights, segment_ids, positions``, each ``[rows, seq]``;
        targets with a weight above 0 count.
      mesh: mesh of the weights, if they are sharded; its data axes must divide the rows.

    Raises:
      NaloraError: no batch has a target.
    """
    variables = prepare(variables, model.numerics, tables=False)
    sums: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for batch in batches:
        of_rows = for_rows(model, mesh, batch["tokens"].shape[1])
        log_probs = fetch(_batch_log_probs(of_rows, variables, place_batch(dict(batch), mesh)))
        loss, tokens = _by_document(batch, -log_probs.astype(np.float64))
        sums.append(loss)
        counts.append(tokens)
    return result(np.concatenate([*sums, np.zeros(0)]), np.concatenate([*counts, np.zeros(0)]))


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


@partial(jax.jit, static_argnames=("model",))
def _batch_log_probs(model: Decoder, variables: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    hidden = model.apply(
        variables, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    hidden = joined(hidden, model.activation_sharding, batch["tokens"].shape[1])
    return target_log_probs(model, variables, hidden, batch["targets"], batch["loss_weights"] > 0)[0]


def _by_document(batch: Mapping[str, Any], losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns loss sums and token counts of the documents of a batch that have targets."""
    segments = np.asarray(batch["segment_ids"], np.int64)
    scored = np.asarray(batch["loss_weights"]) > 0
    document = segments + np.arange(len(segments))[:, None] * (segments.max(initial=0) + 1)
    tokens = np.bincount(document[scored])
    sums = np.bincount(document[scored], losses[scored])
    return sums[tokens > 0], tokens[tokens > 0].astype(np.float64)


def result(sums: np.ndarray, counts: np.ndarray) -> PerplexityResult:
    """Computes loss and interval from the loss sums and token counts of documents."""
    tokens = int(counts.sum())
    if tokens == 0:
        raise NaloraError("evaluation data", expected="at least one target token", found="none")
    loss = float(sums.sum() / tokens)
    low, high = bootstrap(sums, counts)
    return PerplexityResult(loss, low, high, math.exp(min(loss, 700.0)), tokens, len(sums))
