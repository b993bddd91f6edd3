"""Statistics of paired seeds: intervals, tests, equivalence, corrections and sample sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from nalora_jax.evaluate.intervals import mcnemar, t_interval

_MOST_SEEDS = 10_000
# Of the t tests for which `seeds_needed` counts pairs.
_LEVEL = 0.05
_POWER = 0.8
# Records have nine significant digits, so differences below this share of the maximum are ties.
_RESOLUTION = 1e-8


@dataclass(frozen=True)
class Paired:
    """Comparison of two methods over the same seeds.

    Differences are method minus other, so below 0 is better.
    """

    n: int
    mean: float
    low: float  # 95% t interval of the mean difference
    high: float
    deviation: float  # standard deviation of the differences
    better: int  # pairs with a difference below 0
    t_p: float  # two-sided paired t test
    sign_p: float  # exact two-sided sign test, without pairs that do not differ
    # exact two-sided signed-rank test, without pairs that do not differ
    wilcoxon_p: float
    effect: float  # mean over deviation (Cohen's d_z)
    skewness: float  # of the sample; 0 for equal differences
    margin: float  # of equivalence; NaN if it is unknown
    # two one-sided t tests at 5% reject a difference of the margin or more
    equivalent: bool
    # pairs that detect the margin with a power of 80%; None above 10,000
    seeds_needed: int | None


def compare_pairs(
    method: Sequence[float], other: Sequence[float], margin: float
) -> Paired:
    """Compares two lists of losses seed by seed.

    Args:
      method: losses ``[n]``, finite.
      other: losses ``[n]`` of the same seeds in the same order.
      margin: equivalence margin, in the unit of the losses. Without a margin above 0, NaN included,
        the methods are not equivalent.
    """
    first = np.asarray(method, np.float64)
    second = np.asarray(other, np.float64)
    assert first.shape == second.shape == (first.size,)
    assert first.size
    difference = first - second  # [n]
    resolution = _RESOLUTION * float(max(np.abs(first).max(), np.abs(second).max()))
    difference[np.abs(difference) <= resolution] = 0.0
    n = difference.size
    mean = float(difference.mean())
    deviation = math.nan
    if n > 1:
        deviation = float(difference.std(ddof=1))
    effect = math.nan
    if deviation > 0:
        effect = mean / deviation
    low, high = t_interval(difference)
    below = int(np.sum(difference < 0))
    above = int(np.sum(difference > 0))
    return Paired(
        n=n,
        mean=mean,
        low=low,
        high=high,
        deviation=deviation,
        better=below,
        t_p=t_test(difference),
        sign_p=mcnemar(below, above),  # McNemar's test is the exact sign test
        wilcoxon_p=signed_rank_test(difference, resolution),
        effect=effect,
        skewness=skewness(difference),
        margin=margin,
        equivalent=is_equivalent(difference, margin),
        seeds_needed=seeds_needed(deviation, margin),
    )


def t_test(difference: np.ndarray) -> float:
    """Returns the two-sided p-value of a mean of 0: 1 for zeros only, NaN for a single value."""
    n = difference.size
    if n < 2:
        return math.nan
    standard_error = float(difference.std(ddof=1)) / math.sqrt(n)
    if standard_error == 0:  # equal values: 1 if they are 0, and else 0
        return float(not difference.any())
    statistic = abs(float(difference.mean())) / standard_error
    return float(2 * stats.t.sf(statistic, n - 1))


def signed_rank_test(difference: np.ndarray, resolution: float = 0.0) -> float:
    """Returns the exact two-sided p-value of Wilcoxon's signed-rank test, for tied differences too.

    The sum of the positive differences' mid-ranks is compared with its
    distribution over all 2^n signs.

    Args:
      difference: ``[n]``; values of 0 are left out.
      resolution: absolute differences that follow each other within this distance are ties.

    Example:
      >>> signed_rank_test(np.array([0.02, 0.04, 0.04, 0.06, 0.08]))
      0.0625
    """
    nonzero = difference[np.abs(difference) > resolution]
    if not nonzero.size:
        return 1.0
    # Mid-ranks are multiples of a half, so twice the ranks are integers.
    doubled = np.rint(2 * _mid_ranks(np.abs(nonzero), resolution)).astype(int)
    # Probability of each sum of the positive ranks. Every rank is added or not, with probability
    # 1/2 each: a convolution with 1/2 at 0 and 1/2 at the rank.
    probabilities = np.ones(1)
    for rank in doubled:
        probabilities = np.convolve(probabilities, np.bincount([0, rank]) / 2)
    sums = np.arange(probabilities.size)
    observed = doubled[nonzero > 0].sum()
    center = doubled.sum() / 2
    is_extreme = np.abs(sums - center) >= abs(observed - center)
    return float(min(1.0, probabilities[is_extreme].sum()))


def _mid_ranks(values: np.ndarray, resolution: float) -> np.ndarray:
    """Returns ranks starting at 1; values within ``resolution`` of the next share a mean rank."""
    order = np.argsort(values)
    groups = np.zeros(values.size, int)  # ties have the same number
    groups[order[1:]] = np.cumsum(np.diff(values[order]) > resolution)
    return np.asarray(stats.rankdata(groups), np.float64)


def is_equivalent(difference: np.ndarray, margin: float) -> bool:
    """Returns True if a TOST at 5% rejects a mean of ``margin`` or more (Schuirmann, 1987)."""
    low, high = t_interval(difference, confidence=0.9)
    return -margin < low and high < margin


def skewness(difference: np.ndarray) -> float:
    """Returns the sample skewness of ``[n]`` values: g1, without a correction for n.

    It is 0 for equal values.
    """
    if np.ptp(difference) <= _RESOLUTION * np.abs(difference).max():
        return 0.0
    return float(stats.skew(difference))


def seeds_needed(deviation: float, effect: float) -> int | None:
    """Returns the number of pairs with which a t test at 5% detects ``effect`` with a power of 80%.

    Returns:
      At least 2; None if the deviation is unknown, the effect is not above 0, or 10,000 pairs are
      not enough.
    """
    if not math.isfinite(deviation) or not effect > 0:
        return None
    if deviation == 0:
        return 2
    # With a known deviation a normal test is enough, which needs fewer pairs than the t test.
    quantiles = stats.norm.isf(_LEVEL / 2) + stats.norm.isf(1 - _POWER)
    fewest = (quantiles * deviation / effect) ** 2
    if fewest > _MOST_SEEDS:
        return None
    for n in range(max(2, int(fewest)), _MOST_SEEDS + 1):
        # The statistic has a noncentral t distribution; the test rejects beyond both limits.
        limit = stats.t.ppf(1 - _LEVEL / 2, n - 1)
        shift = math.sqrt(n) * effect / deviation
        above = stats.nct.sf(limit, n - 1, shift)
        below = stats.nct.cdf(-limit, n - 1, shift)
        if above + below >= _POWER:
            return n
    return None


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns Holm's adjusted p-values in order; an undefined p-value counts as 1 and stays NaN.

    Rejecting at a level keeps the probability of any false rejection below that level.

    Example:
      >>> holm([0.01, 0.04, 0.03])
      [0.03, 0.06, 0.06]
    """
    adjusted = [math.nan] * len(p_values)
    running = (
        0.0  # largest adjusted p-value so far; a larger p-value's is at least as large
    )
    defined = [index for index, p in enumerate(p_values) if math.isfinite(p)]
    ranked = sorted(defined, key=lambda index: p_values[index])
    for rank, index in enumerate(ranked):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
