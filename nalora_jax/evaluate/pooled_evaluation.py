"""Evaluation of heads and embeddings: vectors of texts, and metrics by scikit-learn and SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nalora_jax.common.notes import count_progress
from nalora_jax.data.labels import LabelSet
from nalora_jax.data.pooled_texts import PooledItem
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.evaluator import SAMPLES, Evaluator, ItemRecord, variables_of
from nalora_jax.evaluate.generate.programs import padded_length
from nalora_jax.evaluate.intervals import bootstrap, loss_and_accuracy
from nalora_jax.mesh.distributed import place_batch, prompt_shards
from nalora_jax.mesh.processes import fetch
from nalora_jax.models.decoder import Decoder
from nalora_jax.ops.pooled_losses import (
    apply_score,
    label_losses,
    pool_segments,
    reward_losses,
)
from nalora_jax.ops.storage import prepare

_BATCH_TOKENS = 4096  # of a batch, padding included


def require_metrics() -> None:
    """Raises a NaloraError with installation instructions if scikit-learn is missing."""
    try:
        import sklearn.metrics  # noqa: F401
    except ImportError as error:
        raise NaloraError(
            "scikit-learn",
            expected="the package, which computes the metrics of heads and embeddings",
            found="not installed",
            remedy="pip install 'nalora_jax[metrics]'",
        ) from error


def text_vectors(
    model: Decoder,
    variables: Mapping[str, Any],
    texts: Sequence[np.ndarray],
    pooling: str,
    *,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Returns the vector of each text, or with a head its outputs, float32 ``[texts, width]``.

    Args:
      model: the decoder.
      variables: ``params``, and ``lora`` if there are adapters.
      texts: token ids of each.
      pooling: see `nalora_jax.ops.pooled_losses.pool_segments`.
      mesh: mesh of the weights, if they are sharded; the batch is split over its data axes.
    """
    variables = prepare(variables, model.numerics, tables=False)
    shards = prompt_shards(mesh)
    lengths = np.array([len(ids) for ids in texts])
    order = np.argsort(lengths, kind="stable")
    results: list[Any] = [None] * len(texts)
    start = 0
    with count_progress("evaluating", len(texts)) as done:
        while start < len(texts):
            # Of the longest text that fits a batch with as many texts as its padded length allows.
            rows = _rows_of(lengths[order], start, shards)
            chosen = order[start : start + rows].tolist()
            width = padded_length(int(lengths[chosen].max()), minimum=16)
            tokens = np.zeros((rows, width), np.int32)
            sizes = np.ones(rows, np.int32)
            for row, index in enumerate(chosen):
                tokens[row, : lengths[index]] = texts[index]
                sizes[row] = lengths[index]
            placed = place_batch((tokens, sizes), mesh)
            vectors = fetch(_vectors(model, pooling, variables, *placed))
            for row, index in enumerate(chosen):
                results[index] = vectors[row]
            done(len(chosen))
            start += rows
    return np.array(results)


def _rows_of(lengths: np.ndarray, start: int, shards: int) -> int:
    """Returns the number of rows of the batch that starts at a text; ``lengths`` are sorted."""
    rows = shards
    width = padded_length(int(lengths[start]), minimum=16)
    while True:
        rows = max(_BATCH_TOKENS // width // shards, 1) * shards
        last = min(start + rows, len(lengths)) - 1
        longest = padded_length(int(lengths[last]), minimum=16)
        if longest <= width:
            return rows
        width = longest


@partial(jax.jit, static_argnames=("model", "pooling"))
def _vectors(
    model: Decoder,
    pooling: str,
    variables: Any,
    tokens: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Returns the vectors or outputs of texts, one per row, ``[rows, width]``."""
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.broadcast_to(places, tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    hidden = model.apply(variables, tokens, positions=positions, segment_ids=segments)
    vectors = pool_segments(hidden, segments, positions, 1, pooling)[:, 0]
    head = variables.get("lora", {}).get("score")
    if head is None:
        return vectors
    return apply_score(vectors, head["kernel"])


class PooledEvaluator(Evaluator):
    """Evaluates vectors or outputs of the same texts; a subclass defines `records` and `summary`.

    Args:
      model: the decoder, with the adapters' spec.
      items: the held-out texts with labels.
      pooling: see `text_vectors`.
      mesh: mesh of the weights, if they are sharded.
    """

    def __init__(
        self,
        model: Decoder,
        items: Sequence[PooledItem],
        pooling: str,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        """Stores the arguments.

        Raises:
          NaloraError: scikit-learn is not installed.
        """
        require_metrics()
        self.metric = "accuracy"
        self.mode = "max"
        self.model = model
        self.items = items
        self.pooling = pooling
        self.mesh = mesh

    def outputs(self, params: Any, lora: Any | None) -> np.ndarray:
        """Returns the vectors or outputs of all texts, ``[items, texts, width]``."""
        texts = [ids for item in self.items for ids in item.ids]
        variables = variables_of(params, lora)
        flat = text_vectors(self.model, variables, texts, self.pooling, mesh=self.mesh)
        # [items * texts, width] -> [items, texts, width]
        return flat.reshape(len(self.items), -1, flat.shape[1])

    def samples(
        self,
        params: Any,
        lora: Any | None,
        records: Sequence[ItemRecord],
    ) -> dict[str, Any]:
        """Returns a few texts with the answer and the expected one, and which items are right."""
        samples = []
        for record in records[:SAMPLES]:
            samples.append(
                {name: record[name] for name in ("prompt", "answer", "expected")}
            )
        values: dict[str, Any] = {"samples": samples}
        if "correct" in records[0]:
            values["right"] = [record["correct"] for record in records]
        return values


class LabelEvaluator(PooledEvaluator):
    """Evaluates a classification or regression head.

    The metric is the share of texts whose labels are all right; of scores, the loss.
    """

    def __init__(
        self,
        model: Decoder,
        items: Sequence[PooledItem],
        labels: LabelSet,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        """Stores the arguments; see `PooledEvaluator`."""
        super().__init__(model, items, "last", mesh=mesh)
        self._labels = labels
        if labels.form == "score":
            self.metric = "loss"
            self.mode = "min"

    def records(self, params: Any, lora: Any | None) -> list[dict[str, Any]]:
        """Returns ``prompt``, ``answer``, ``expected``, ``loss``, and the ``outputs`` and
        ``labels`` of each text; of labels also ``correct`` and the ``chosen`` outputs."""
        logits = self.outputs(params, lora)[:, 0]  # [items, outputs]
        targets = np.array([item.labels for item in self.items])
        form = self._labels.form
        losses = np.asarray(
            label_losses(jnp.asarray(logits), jnp.asarray(targets), form)
        )
        chosen = logits > 0
        applies = targets > 0.5
        if form == "one":
            chosen = logits == logits.max(axis=1, keepdims=True)
        records = []
        for row, item in enumerate(self.items):
            record = {
                "prompt": " ".join(item.texts),
                "loss": losses[row].item(),
                "outputs": logits[row].tolist(),
                "labels": targets[row].tolist(),
            }
            if form == "score":
                record |= {
                    "answer": _numbers(logits[row]),
                    "expected": _numbers(targets[row]),
                }
            else:
                record |= {
                    "answer": self._names(chosen[row]),
                    "expected": self._names(applies[row]),
                    "chosen": chosen[row].astype(int).tolist(),
                    "correct": bool(np.array_equal(chosen[row], applies[row])),
                }
            records.append(record)
        return records

    def _names(self, chosen: np.ndarray) -> str:
        """Returns the names of the chosen outputs, bool ``[outputs]``."""
        pairs = zip(self._labels.names, chosen.tolist(), strict=True)
        return ", ".join(name for name, applies in pairs if applies)

    def summary(self, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns ``loss``, ``n``, ``low``, ``high``; of labels ``accuracy`` and ``f1`` (the mean
        over labels of one label a text, of all labels together of several), of one binary label
        also ``average_precision``, of scores ``pearson`` and ``spearman``."""
        from sklearn import metrics

        targets = np.array([record["labels"] for record in records])
        if self._labels.form == "score":
            outputs = np.array([record["outputs"] for record in records])
            related = correlations(outputs.ravel(), targets.ravel())
            return loss_of(records) | related
        targets = targets > 0.5
        values = loss_and_accuracy(records)
        if self._labels.form == "binary":
            outputs = np.array([record["outputs"] for record in records])
            precision = metrics.average_precision_score(targets[:, 0], outputs[:, 0])
            values["average_precision"] = float(precision)
        chosen = np.array([record["chosen"] for record in records])
        average = "micro"
        if self._labels.form == "one":
            average = "macro"
            chosen = chosen.argmax(axis=1)
            targets = targets.argmax(axis=1)
        f1 = metrics.f1_score(targets, chosen, average=average, zero_division=0.0)
        return values | {"f1": float(f1)}


class RewardPairEvaluator(PooledEvaluator):
    """Evaluates a reward head on pairs; the metric is the share of pairs whose chosen answer has
    the larger reward."""

    def records(self, params: Any, lora: Any | None) -> list[dict[str, Any]]:
        """Returns ``prompt``, both texts as ``expected`` and, if it has the larger reward,
        ``answer``, ``loss``, ``correct``, ``reward_of_chosen`` and ``reward_of_rejected``."""
        rewards = self.outputs(params, lora)[..., 0]  # [items, 2]
        margins = np.array([item.labels[0] for item in self.items])
        losses = np.asarray(
            reward_losses(jnp.asarray(rewards), jnp.asarray(margins), 0.0)
        )
        records = []
        for row, item in enumerate(self.items):
            chosen, rejected = rewards[row].tolist()
            answer = item.texts[0] if chosen > rejected else item.texts[1]
            records.append(
                {
                    "prompt": " | ".join(item.texts),
                    "answer": answer,
                    "expected": item.texts[0],
                    "loss": losses[row].item(),
                    "correct": chosen > rejected,
                    "reward_of_chosen": chosen,
                    "reward_of_rejected": rejected,
                }
            )
        return records

    def summary(self, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns ``accuracy``, ``low``, ``high``, ``loss``, ``n`` and the mean ``margin``."""
        chosen = np.array([record["reward_of_chosen"] for record in records])
        rejected = np.array([record["reward_of_rejected"] for record in records])
        margin = float((chosen - rejected).mean())
        return loss_and_accuracy(records) | {"margin": margin}


def loss_of(records: Sequence[ItemRecord]) -> dict[str, Any]:
    """Returns the mean ``loss`` of records with its 95% interval ``low`` and ``high``, and their
    number ``n``."""
    losses = np.array([record["loss"] for record in records])
    low, high = bootstrap(losses)
    return {"loss": float(losses.mean()), "n": len(losses), "low": low, "high": high}


def _numbers(values: np.ndarray) -> str:
    """Returns scores as text."""
    return ", ".join(f"{value:.3f}" for value in values.tolist())


def correlations(outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Returns the ``pearson`` and ``spearman`` correlation; NaN if either side is constant."""
    from scipy import stats

    functions: dict[str, Callable[..., Any]] = {
        "pearson": stats.pearsonr,
        "spearman": stats.spearmanr,
    }
    if np.ptp(outputs) == 0 or np.ptp(targets) == 0:
        return dict.fromkeys(functions, math.nan)
    return {
        name: float(function(outputs, targets).statistic)
        for name, function in functions.items()
    }
