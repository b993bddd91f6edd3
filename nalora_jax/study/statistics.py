"""What paired seeds say: differences with their interval, tests, equivalence, and how many seeds it would take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from nalora_jax.evaluate.statistics import bootstrap

_MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Paired:
    """A method against another one over the same seeds; differences are method minus other, so below 0 is better."""

    n: int
    mean: float
    low: float  # 95% percentile bootstrap interval of the mean difference
    high: float
    deviation: float  # standard deviation of the differences
    better: int  # pairs with a difference below 0
    sign_p: float  # exact two-sided sign test; pairs without a difference say nothing
    wilcoxon_p: float  # exact two-sided signed-rank test
    effect: float  # mean over deviation (Cohen's d_z)
    equivalent: bool  # two one-sided t tests at 5% reject a difference of the margin or more
    seeds_needed: int | None  # pairs for a power of 80% to see a difference of the margin; None above 10,000


def paired(method: Sequence[float], other: Sequence[float], margin: float) -> Paired:
    """The comparison of two lists of losses, seed by seed.

    Args:
      method: losses ``[n]``, finite.
      other: losses ``[n]`` of the same seeds in the same order.
      margin: of equivalence, in the unit of the losses.
    """
    difference = np.asarray(method, np.float64) - np.asarray(other, np.float64)
    assert difference.ndim == 1
    assert difference.size
    n, mean = difference.size, float(difference.mean())
    deviation = float(difference.std(ddof=1)) if n > 1 else math.nan
    low, high = bootstrap(difference, resamples=10_000)
    below, above = int(np.sum(difference < 0)), int(np.sum(difference > 0))
    return Paired(
        n,
        mean,
        low,
        high,
        deviation,
        below,
        sign_test(below, above),
        signed_rank_test(difference),
        mean / deviation if deviation > 0 else math.nan,
        is_equivalent(difference, margin),
        seeds_needed(deviation, margin),
    )


def sign_test(below: int, above: int) -> float:
    """Two-sided exact p-value of so many differences on either side of 0; 1 where there are none."""
    return float(stats.binomtest(below, below + above).pvalue) if below + above else 1.0


def signed_rank_test(difference: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's test, without pairs that do not differ; exact unless differences are tied."""
    kept = difference[difference != 0]
    if not kept.size:
        return 1.0
    tied = len(np.unique(np.abs(kept))) < kept.size
    return float(stats.wilcoxon(kept, method="asymptotic" if tied else "exact").pvalue)


def is_equivalent(difference: np.ndarray, margin: float) -> bool:
    """Whether the mean lies within ``margin`` of 0 by two one-sided t tests at 5% each (Schuirmann, 1987)."""
    n = difference.size
    if n < 2:
        return False
    error = float(difference.std(ddof=1)) / math.sqrt(n)
    reach = float(stats.t.ppf(0.95, n - 1)) * error
    return abs(float(difference.mean())) + reach < margin


def seeds_needed(deviation: float, effect: float, *, power: float = 0.8, level: float = 0.05) -> int | None:
    """Pairs with which a two-sided t test sees a mean difference of ``effect`` with probability ``power``.

    Returns:
      At least 2; None where the deviation is unknown or 10,000 pairs are not enough.
    """
    if not math.isfinite(deviation):
        return None
    if deviation == 0:
        return 2
    normal = stats.norm.isf(level / 2) + stats.norm.isf(1 - power)
    fewest = (normal * deviation / effect) ** 2  # with a known deviation; an estimated one needs more
    if fewest > _MOST_SEEDS:
        return None
    for n in range(max(2, int(fewest)), _MOST_SEEDS + 1):
        limit = stats.t.ppf(1 - level / 2, n - 1)
        shift = math.sqrt(n) * effect / deviation
        reached = stats.nct.sf(limit, n - 1, shift) + stats.nct.cdf(-limit, n - 1, shift)
        if reached >= power:
            return n
    return None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: the chance of one false alarm among them stays below the level.

    Example:
      >>> holm([0.01, 0.04, 0.03])
      [0.03, 0.06, 0.06]
    """
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
