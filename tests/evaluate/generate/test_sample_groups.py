"""Groups of samples: two kinds of cache, log-probabilities, keys and ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.evaluate.generate.programs import (
    NO_TOKEN,
    Prompts,
    padded_rows,
    sample_groups,
    view_weights,
)
from nalora_jax.evaluate.generate.sampling import make_sampling
from tests import tiny
from tests.evaluate.generate.test_prefill import BY_FAMILY
from tests.models.test_families import build

SAMPLES, LIMIT = 3, 6
CASE = BY_FAMILY["qwen3_5_text"]  # keys and values of attention, and a recurrent state


def sampled(rows: list[list[int]], seeds: list[int], stop: int = NO_TOKEN) -> tuple:
    pair = build(CASE)
    sampling = make_sampling(len(seeds), temperature=0.7, seeds=seeds)
    rest = {"live": np.ones(len(rows), bool), "stop_ids": np.array([stop]), "sampling": sampling}
    prompts = Prompts(**padded_rows(rows, len(rows)), **rest)
    weights = view_weights(pair.model, {"params": pair.params})
    groups = sample_groups(pair.model, weights, prompts, samples=SAMPLES, limit=LIMIT)
    return jax.device_get((groups.tokens, groups.log_probs))


def test_log_probabilities_are_those_of_whole_texts() -> None:
    """At temperature 0.7, of prompts of three lengths; each sample depends on its seed, not on its
    neighbors."""
    pair = build(CASE)
    rng = np.random.default_rng(4)
    rows = [rng.integers(1, 128, length).tolist() for length in (5, 11, 8)]
    seeds = list(range(len(rows) * SAMPLES))
    tokens, log_probs = sampled(rows, seeds)
    assert len({tuple(row) for row in tokens}) == len(seeds)
    texts = [[*rows[number // SAMPLES], *new] for number, new in enumerate(tokens)]
    padded = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    logits = tiny.logits_of(pair.model, {"params": pair.params}, jnp.asarray(padded))
    for row, length, new, found in zip(logits, map(len, texts), tokens, log_probs, strict=True):
        of_text = jax.nn.log_softmax(row[length - LIMIT - 1 : length - 1] / 0.7)
        np.testing.assert_allclose(found, of_text[np.arange(LIMIT), new], rtol=2e-4, atol=2e-4)
    moved, _ = sampled([rows[1], rows[0], rows[2]], [*seeds[3:6], *seeds[:3], *seeds[6:]])
    np.testing.assert_array_equal(moved, tokens[[3, 4, 5, 0, 1, 2, 6, 7, 8]])


def test_a_sample_ends_with_its_stop_token() -> None:
    rows, seeds = [[3, 1, 4, 1, 5]] * 3, list(range(9))
    free, log_probs = sampled(rows, seeds)
    stop = int(free[0, 2])
    stopped, stopped_log_probs = sampled(rows, seeds, stop)
    for row in seeds:
        ends = np.flatnonzero(free[row] == stop)
        length = int(ends[0]) + 1 if len(ends) else LIMIT
        np.testing.assert_array_equal(
            stopped[row], [*free[row, :length], *[NO_TOKEN] * (LIMIT - length)]
        )
        np.testing.assert_allclose(
            stopped_log_probs[row, :length], log_probs[row, :length], rtol=1e-6
        )
        assert not stopped_log_probs[row, length:].any()
