"""Held-out divergence from a teacher, for a run's log and its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from nalora_jax.common.notes import count_progress
from nalora_jax.data.taught_text import TaughtExample, held_out_batches
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.evaluate.evaluator import (
    SAMPLE_TOKENS,
    SAMPLES,
    Evaluator,
    ItemRecord,
    sample_records,
    variables_of,
)
from nalora_jax.evaluate.generate import Generator
from nalora_jax.evaluate.intervals import bootstrap
from nalora_jax.mesh.distributed import place_batch, prompt_shards
from nalora_jax.mesh.processes import fetch
from nalora_jax.models.decoder import Decoder

# Rows of a batch on each device.
_ROWS = 4


class TaughtRows(NamedTuple):
    """The shapes of held-out rows."""

    length: int  # positions
    taught: bool  # the teacher reads other rows


# ``(params, lora, batch)`` -> divergence and agreement of every token, ``[rows, seq]`` each
ScoreTokens = Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]


class DistillationEvaluator(Evaluator):
    """Evaluates adapters by the divergence from a teacher on the same completions.

    Args:
      model: the decoder, with the adapters' spec.
      tokenizer: tokenizer of the base model.
      items: the held-out examples.
      rows: shapes of the rows.
      score: of a batch.
      mesh: mesh of the weights, if they are sharded.
    """

    metric: Literal["loss"] = "loss"
    mode: Literal["min"] = "min"

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        items: Sequence[TaughtExample],
        rows: TaughtRows,
        score: ScoreTokens,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._items = items
        self._rows = rows
        self._score = score
        self._mesh = mesh

    def examples(self, params: Any, lora: Any | None) -> Sequence[TaughtExample]:
        """Returns the examples that an adapter is evaluated on."""
        return self._items

    def records(self, params: Any, lora: Any | None) -> list[dict[str, Any]]:
        """Returns ``prompt``, ``completion``, the ``loss`` (the divergence, summed over its
        ``tokens``) and ``agreements``, the number of tokens at which both models' most likely token
        is the same, of every example."""
        items = self.examples(params, lora)
        sums = np.zeros((3, len(items)))  # divergence, agreements, tokens
        count = _ROWS * prompt_shards(self._mesh)
        batches = held_out_batches(
            items, self._rows.length, count, taught=self._rows.taught
        )
        with count_progress("evaluating", len(items)) as done:
            for batch, examples in batches:
                scores = self._score(params, lora, place_batch(batch, self._mesh))
                parts = [np.asarray(fetch(values), np.float64) for values in scores]
                parts.append(batch["loss_weights"])
                for row, of_row in enumerate(examples):
                    segments = batch["segment_ids"][row]
                    for place, values in enumerate(parts):
                        # Segment 0 is padding.
                        totals = np.bincount(
                            segments, values[row], minlength=len(of_row) + 1
                        )
                        sums[place, of_row] = totals[1 : len(of_row) + 1]
                    done(len(of_row))
        records = []
        for item, (loss, agreements, tokens) in zip(
            items, sums.T.tolist(), strict=True
        ):
            records.append(
                {
                    "prompt": item.prompt,
                    "completion": item.completion,
                    "loss": loss,
                    "tokens": tokens,
                    "agreements": agreements,
                }
            )
        return records

    def summary(self, records: Sequence[ItemRecord]) -> dict[str, Any]:
        """Returns the divergence per token, ``loss``, with its 95% interval ``low`` and ``high``
        over examples, the share of tokens at which both models agree, ``agreement``, and ``n``."""
        losses = np.array([record["loss"] for record in records])
        tokens = np.array([record["tokens"] for record in records])
        agreements = np.array([record["agreements"] for record in records])
        low, high = bootstrap(losses, tokens)
        return {
            "loss": float(losses.sum() / tokens.sum()),
            "low": low,
            "high": high,
            "n": len(records),
            "agreement": float(agreements.sum() / tokens.sum()),
        }

    def samples(
        self, params: Any, lora: Any | None, records: Sequence[ItemRecord]
    ) -> dict[str, Any]:
        """Returns a few prompts with the model's completion and the reference."""
        sampled = self._items[:SAMPLES]
        generator = Generator(
            self._model, variables_of(params, lora), self._tokenizer, mesh=self._mesh
        )
        prompts = [item.example.divided[0] for item in sampled]
        answers = generator.generate(prompts, max_new_tokens=SAMPLE_TOKENS)
        references = [item.completion for item in sampled]
        return sample_records([item.prompt for item in sampled], answers, references)
