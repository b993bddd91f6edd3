"""Confidence intervals and paired comparisons of held-out metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

# Number of resampled indices in memory at once.
_CHUNK = 1 << 22


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's score interval of a proportion; (0, 1) for n = 0.

    Unlike the normal approximation, it keeps its coverage for small n and for rates near 0 and 1.

    Source: Wilson, 1927, J. Am. Stat. Assoc. 22.
    """
    if n == 0:
        return 0.0, 1.0
    z = _quantile(confidence)
    rate = successes / n
    center = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def bootstrap(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the percentile interval of the weighted mean ``sum(values) / sum(weights)``.

    A unit's value and weight are resampled together.

    Args:
      values: one sum per unit (a document's loss, an item's 0 or 1).
      weights: one weight per unit (a document's tokens); 1 by default, which gives the plain mean.
      confidence: confidence level of the interval.
      resamples: number of bootstrap samples.
      seed: seed of the resampling, so that reports are reproducible.
    """
    sums = np.asarray(values, np.float64)
    counts = np.ones_like(sums)
    if weights is not None:
        counts = np.asarray(weights, np.float64)
    assert sums.shape == counts.shape
    if sums.size == 0:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // sums.size)
    means = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(sums.size, size=(min(rows, resamples - start), sums.size))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return _percentiles(np.concatenate(means), confidence)


def paired_bootstrap(
    values: np.ndarray,
    weights: np.ndarray,
    other_values: np.ndarray,
    other_weights: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the percentile interval of the difference of two weighted means.

    It is ``sum(other_values) / sum(other_weights) - sum(values) / sum(weights)``. Both models'
    results of a unit are resampled together.

    Args:
      values, weights: ``[n]``, of the first model's units, as for `bootstrap`.
      other_values, other_weights: ``[n]``, of the second model on the same units.
      confidence: confidence level of the interval.
      resamples: number of bootstrap samples.
      seed: seed of the resampling.
    """
    arrays = [np.asarray(array, np.float64) for array in (values, weights, other_values, other_weights)]
    n = arrays[0].size
    assert {array.shape for array in arrays} == {(n,)}
    if n == 0:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    differences = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(n, size=(min(rows, resamples - start), n))
        first, first_weight, second, second_weight = (array[drawn].sum(axis=1) for array in arrays)
        differences.append(second / second_weight - first / first_weight)
    return _percentiles(np.concatenate(differences), confidence)


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of two sets of answers to the same questions."""

    difference: float  # accuracy of the second minus accuracy of the first
    low: float  # interval of the difference
    high: float
    p_value: float  # exact McNemar test of equal accuracy
    gained: int  # incorrect before, correct after
    lost: int  # correct before, incorrect after
    n: int


def compare(
    before: Any, after: Any, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Compares two vectors of correct (1) and incorrect (0) answers to the same questions.

    A paired test has more power than comparing two separate intervals, because questions that both
    answer correctly, or both incorrectly, cancel out.
    """
    first, second = np.asarray(before, bool), np.asarray(after, bool)
    assert first.shape == second.shape
    assert first.ndim == 1
    n = first.size
    gained, lost = int(np.sum(second & ~first)), int(np.sum(first & ~second))
    low, high = math.nan, math.nan
    if n:
        # Resampling questions is equivalent to a multinomial draw of the three counts.
        shares = np.array([gained, lost, n - gained - lost]) / n
        counts = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
        low, high = _percentiles((counts[:, 0] - counts[:, 1]) / n, confidence)
    return Comparison((gained - lost) / max(n, 1), low, high, mcnemar(gained, lost), gained, lost, n)


def mcnemar(gained: int, lost: int) -> float:
    """Returns the two-sided exact p-value of McNemar's test.

    It is the probability that a fair coin splits the discordant answers at least this unevenly.

    Source: McNemar, 1947, Psychometrika 12; the exact binomial form.
    """
    n, rarer = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, k) for k in range(rarer + 1))
    return min(1.0, 2 * tail / 2**n)


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _percentiles(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)
