"""Turns drawn by the generator of this library, as an engine of `nalora_jax.kinds.rl.episodes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from jax.sharding import Mesh

from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.evaluate.generate import Generator
from nalora_jax.evaluate.generate.programs import (
    NO_TOKEN,
    Prompts,
    bucket,
    padded_rows,
    sample_groups,
)
from nalora_jax.evaluate.generate.sampling import make_sampling
from nalora_jax.kinds.rl.engine import DrawnCompletion, Request
from nalora_jax.mesh.distributed import place_batch, prompt_shards
from nalora_jax.models.decoder import Decoder


def stop_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Returns the stop tokens, padded, int ``[stops]``."""
    stops = sorted(tokenizer.eos_ids)
    size = bucket(len(stops), minimum=8)
    return np.array(stops + [NO_TOKEN] * (size - len(stops)))


@dataclass(frozen=True)
class TurnGenerator:
    """Samples turns of one adapter, many rows in a program.

    Attributes:
      model: the decoder without rematerialization.
      weights: from `nalora_jax.evaluate.generate.programs.view_weights`.
      stops: stop tokens, padded, int ``[stops]``.
      mesh: of the weights.
      temperature: of the samples, above 0.
      limit: most tokens of a turn.
      step: of training, at which the adapter is.
      rows: of a program on all shards, at most.
      records: record the experts of every token.
    """

    model: Decoder
    weights: Any
    stops: np.ndarray
    mesh: Mesh | None
    temperature: float
    limit: int
    step: int
    rows: int
    records: bool = False

    def sample(self, requests: Sequence[Request]) -> list[DrawnCompletion]:
        """Returns a turn for each request.

        Samples of one prompt, next to each other, share its prefill if all prompts have as many.
        """
        counts = []
        for _, group in groupby(request.ids for request in requests):
            counts.append(len(list(group)))
        samples = 1
        if len(set(counts)) == 1 and counts[0] <= self.rows:
            samples = counts[0]
        size = self.rows // samples * samples
        drawn: list[DrawnCompletion] = []
        for start in range(0, len(requests), size):
            drawn += self._drawn(requests[start : start + size], samples)
        return drawn

    def _drawn(
        self, requests: Sequence[Request], samples: int
    ) -> list[DrawnCompletion]:
        """Returns the turns of one program; ``samples`` requests in a row have the same ids."""
        ids = [request.ids for request in requests[::samples]]
        # Few numbers of rows, since each compiles a program.
        fewest = max(self.rows // samples // 4, 1)
        shards = prompt_shards(self.mesh)
        count = bucket(len(ids), minimum=fewest, multiple=shards)
        rows = padded_rows(ids, count)
        live = np.arange(count) < len(ids)
        seeds = [request.seed for request in requests]
        sampling = make_sampling(
            count * samples, temperature=self.temperature, seeds=seeds
        )
        placed = place_batch({**rows, "live": live, "sampling": sampling}, self.mesh)
        results = sample_groups(
            self.model,
            self.weights,
            Prompts(**placed, stop_ids=self.stops),
            samples=samples,
            limit=self.limit,
            records=self.records,
        ).fetched()
        drawn = []
        for row, request in enumerate(requests):
            # The program's limit may be above the request's.
            turn = results.tokens[row, : request.limit]
            turn = turn[turn != NO_TOKEN]
            of_turn = results.log_probs[row, : len(turn)]
            routing = results.routing(row, len(request.ids), len(turn))
            drawn.append(DrawnCompletion(turn, of_turn, self.step, routing))
        return drawn


@dataclass(frozen=True)
class GreedyTurns:
    """The likeliest turns of one adapter, for evaluation; without log-probabilities.

    Attributes:
      generator: of the model with its adapter.
      tokenizer: of the model.
    """

    generator: Generator
    tokenizer: Tokenizer

    def sample(self, requests: Sequence[Request]) -> list[DrawnCompletion]:
        """Returns the likeliest turn for each request, which ends with the end-of-text token unless
        it was cut."""
        limit = max(request.limit for request in requests)
        completions = self.generator.complete(
            [request.ids for request in requests], max_new_tokens=limit
        )
        drawn = []
        for request, completion in zip(requests, completions, strict=True):
            ids = list(completion.ids)
            if completion.reason == "stop":
                ids.append(self.tokenizer.eos_id)
            turn = np.array(ids[: request.limit], np.int32)
            drawn.append(DrawnCompletion(turn, np.zeros(len(turn), np.float32), 0))
        return drawn
