"""Evaluation of vectors of texts: retrieval of positives, and rank correlation with scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nalora_jax.data.pooled_texts import PooledItem
from nalora_jax.evaluate.evaluator import ItemRecord
from nalora_jax.evaluate.intervals import recall_of
from nalora_jax.evaluate.pooled_evaluation import PooledEvaluator, correlations
from nalora_jax.models.decoder import Decoder
from nalora_jax.ops.pooled_losses import unit_vectors

_AT = 10  # rank at which nDCG is cut
_RESAMPLED = 1000  # bootstrap samples of a rank correlation
_SEED = 20261204


class TextRetrievalEvaluator(PooledEvaluator):
    """Evaluates vectors by the rank of each anchor's positive among all other texts of the records.

    Candidates are the different positives and negatives of all held-out records. If an anchor has
    several records, the positives of its other records are no candidates for it.

    Args:
      scale: of the cosines in the loss.
    """

    def __init__(
        self,
        model: Decoder,
        items: Sequence[PooledItem],
        pooling: str,
        scale: float,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        """Stores the arguments; see `PooledEvaluator`."""
        super().__init__(model, items, pooling, mesh=mesh)
        self.metric = "recall"
        self._scale = scale

    def records(self, params: Any, lora: Any | None) -> list[dict[str, Any]]:
        """Returns ``prompt``, ``answer`` (the nearest text), ``expected``, ``rank`` (the number of
        candidates before the positive), ``ndcg`` at 10, ``correct`` and ``loss`` (InfoNCE over all
        candidates) of each record."""
        vectors = self.outputs(params, lora)  # [items, texts, d]
        unit = np.asarray(unit_vectors(jnp.asarray(vectors)))
        texts: dict[str, np.ndarray] = {}  # vectors of candidates
        positives: dict[str, set[str]] = {}  # of each anchor
        for item, own in zip(self.items, unit, strict=True):
            texts |= dict(zip(item.texts[1:], own[1:], strict=True))
            positives.setdefault(item.texts[0], set()).add(item.texts[1])
        names = list(texts)
        places = {name: place for place, name in enumerate(names)}
        candidates = np.array(list(texts.values()))
        records = []
        for item, own in zip(self.items, unit, strict=True):
            anchor, positive = item.texts[:2]
            cosines = candidates @ own[0]
            for other in positives[anchor] - {positive}:
                cosines[places[other]] = -np.inf
            records.append(self._record(cosines, places[positive], names, anchor))
        return records

    def _record(
        self, cosines: np.ndarray, positive: int, names: list[str], anchor: str
    ) -> dict[str, Any]:
        """Returns the record of an anchor, of its cosines with all candidates."""
        from sklearn import metrics

        logits = self._scale * cosines
        log_sum = float(jax.nn.logsumexp(jnp.asarray(logits)))
        finite = np.isfinite(cosines)
        relevant = np.arange(len(cosines)) == positive
        ndcg = 1.0  # of a single candidate, for which scikit-learn has no value
        if finite.sum() > 1:
            ndcg = metrics.ndcg_score([relevant[finite]], [cosines[finite]], k=_AT)
        rank = int(np.sum(cosines > cosines[positive]))
        return {
            "prompt": anchor,
            "answer": names[int(np.argmax(cosines))],
            "expected": names[positive],
            "rank": rank,
            "ndcg": float(ndcg),
            "correct": rank == 0,
            "loss": log_sum - float(logits[positive]),
        }

    def summary(self, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns ``recall`` at 1 with its interval ``low`` and ``high``, ``text_recall_5``,
        ``text_recall_10``, ``ndcg`` at 10, the mean ``loss`` and ``n``."""
        ranks = np.array([record["rank"] for record in records])
        values = recall_of(ranks < 1)
        for most in (5, 10):
            values[f"text_recall_{most}"] = float((ranks < most).mean())
        for name in ("ndcg", "loss"):
            values[name] = float(np.mean([record[name] for record in records]))
        return values


class PairSimilarityEvaluator(PooledEvaluator):
    """Evaluates vectors by Spearman's correlation of the cosines of pairs with their scores."""

    def __init__(
        self,
        model: Decoder,
        items: Sequence[PooledItem],
        pooling: str,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        """Stores the arguments; see `PooledEvaluator`."""
        super().__init__(model, items, pooling, mesh=mesh)
        self.metric = "spearman_cosine"

    def records(self, params: Any, lora: Any | None) -> list[dict[str, Any]]:
        """Returns ``prompt`` (both texts), ``answer`` and ``cosine``, ``expected`` and ``score``,
        and ``loss``, their squared difference."""
        vectors = self.outputs(params, lora)  # [items, 2, d]
        unit = np.asarray(unit_vectors(jnp.asarray(vectors)))
        cosines = np.sum(unit[:, 0] * unit[:, 1], axis=-1).tolist()
        records = []
        for item, cosine in zip(self.items, cosines, strict=True):
            score = item.labels[0].item()
            records.append(
                {
                    "prompt": " | ".join(item.texts),
                    "answer": f"{cosine:.3f}",
                    "expected": f"{score:.3f}",
                    "cosine": cosine,
                    "score": score,
                    "loss": (cosine - score) ** 2,
                }
            )
        return records

    def summary(self, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns ``spearman_cosine`` with the interval ``low`` and ``high``, ``pearson``, the mean
        ``loss`` and ``n``."""
        cosines = np.array([record["cosine"] for record in records])
        scores = np.array([record["score"] for record in records])
        related = correlations(cosines, scores)
        rng = np.random.default_rng(_SEED)
        resampled = []
        for _ in range(_RESAMPLED):
            chosen = rng.integers(0, len(records), len(records))
            value = correlations(cosines[chosen], scores[chosen])["spearman"]
            # A resample of pairs with one score has no correlation.
            if not math.isnan(value):
                resampled.append(value)
        low = high = math.nan
        if resampled:
            low, high = np.percentile(resampled, [2.5, 97.5]).tolist()
        losses = [record["loss"] for record in records]
        return {
            "spearman_cosine": related["spearman"],
            "low": low,
            "high": high,
            "pearson": related["pearson"],
            "loss": float(np.mean(losses)),
            "n": len(records),
        }
