"""Confidence intervals and paired comparisons of held-out metrics.

`scipy.stats` takes 0.7 s to import, so the functions that need it import it. Wilson's interval is
computed here, because every run with choices reports it before its first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

# Number of resampled indices in memory at once.
_CHUNK = 1 << 22
_PAIRED = 10_000  # bootstrap samples of a paired comparison


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Returns Wilson's 95% score interval of a proportion; (0, 1) for n = 0.

    Unlike the normal approximation, it keeps its coverage for small n and for rates near 0 and 1.

    Source: Wilson, 1927, Journal of the American Statistical Association 22; equal to SciPy's
    ``binomtest(successes, n).proportion_ci(method="wilson")``.
    """
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.975)  # leaves 2.5% at either end
    share = successes / n
    center = (2 * n * share + z**2) / (2 * (n + z**2))
    spread = math.sqrt(4 * n * share * (1 - share) + z**2)
    half_width = z * spread / (2 * (n + z**2))
    low = center - half_width
    high = center + half_width
    if successes == 0:
        low = 0.0
    if successes == n:
        high = 1.0
    return low, high


def accuracy_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the ``accuracy`` of records with ``correct``, and its 95% interval.

    The interval ``low`` and ``high`` is Wilson's.
    """
    right = sum(record["correct"] for record in records)
    low, high = wilson(right, len(records))
    return {"accuracy": right / len(records), "low": low, "high": high}


def loss_and_accuracy(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns `accuracy_of` records, their mean ``loss`` and their number ``n``."""
    losses = [record["loss"] for record in records]
    return accuracy_of(records) | {"loss": float(np.mean(losses)), "n": len(records)}


def recall_of(hits: np.ndarray) -> dict[str, Any]:
    """Returns ``recall``, the mean of hits ``[queries]``, with its 95% interval ``low`` and
    ``high``, and their number ``n``."""
    low, high = bootstrap(hits)
    return {"recall": float(hits.mean()), "low": low, "high": high, "n": len(hits)}


def t_interval(difference: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Returns Student's t interval of the mean of ``[n]`` values; infinite for a single value.

    A percentile bootstrap covers about 75 to 87% instead of 95% for 3 to 6 normal values.
    """
    from scipy import stats

    n = difference.size
    if n < 2:
        return -math.inf, math.inf
    mean = float(difference.mean())
    standard_error = float(difference.std(ddof=1)) / math.sqrt(n)
    quantile = float(stats.t.ppf(0.5 + confidence / 2, n - 1))
    half_width = quantile * standard_error
    return mean - half_width, mean + half_width


def bootstrap(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Returns the 95% percentile interval of the weighted mean ``sum(values) / sum(weights)``.

    A unit's value and weight are resampled together.

    Args:
      values: one sum per unit (a document's loss, an item's 0 or 1).
      weights: one weight per unit (a document's tokens); 1 by default, which gives the plain mean.
      resamples: number of bootstrap samples.
    """
    if weights is None:
        weights = np.ones(len(values))
    return _interval(resamples, np.divide, values, weights)


def difference_of_means(
    values: np.ndarray,
    weights: np.ndarray,
    other_values: np.ndarray,
    other_weights: np.ndarray,
) -> dict[str, float]:
    """Returns the ``difference`` of two weighted means, and its 95% interval ``low``, ``high``.

    The difference is ``sum(other_values) / sum(other_weights) - sum(values) / sum(weights)``. Both
    models' results of a unit are resampled together, for a percentile interval.

    Args:
      values, weights: ``[n]``, of the first model's units, as for `bootstrap`.
      other_values, other_weights: ``[n]``, of the second model on the same units.
    """

    def difference(
        first: Any,
        first_weight: Any,
        second: Any,
        second_weight: Any,
    ) -> Any:
        """Returns the second mean minus the first, given sums of values and of weights."""
        return second / second_weight - first / first_weight

    units = (values, weights, other_values, other_weights)
    low, high = _interval(_PAIRED, difference, *units)
    totals = [unit.sum() for unit in units]
    return {
        "difference": float(difference(*totals)),
        "low": low,
        "high": high,
    }


def _interval(
    resamples: int, statistic: Callable[..., Any], *units: Any
) -> tuple[float, float]:
    """Returns the 95% percentile interval of a statistic; it has a fixed seed.

    Args:
      resamples: number of bootstrap samples.
      statistic: a function of one sum for each of ``units``.
      *units: arrays ``[n]``, which are resampled together and summed.
    """
    from scipy import stats

    arrays = [np.asarray(array, np.float64) for array in units]
    n = arrays[0].size
    assert {array.shape for array in arrays} == {(n,)}
    if n == 0:
        return math.nan, math.nan
    if n == 1:
        only = float(statistic(*np.concatenate(arrays)))
        return only, only

    def of_sums(*samples: Any, axis: int) -> Any:
        sums = [sample.sum(axis=axis) for sample in samples]
        return statistic(*sums)

    interval = stats.bootstrap(
        arrays,
        of_sums,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _CHUNK // n),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def compare(before: Any, after: Any) -> dict[str, Any]:
    """Compares two vectors of correct (1) and incorrect (0) answers to the same questions.

    A paired test has more power than comparing two separate intervals, because questions that both
    answer correctly, or both incorrectly, cancel out.

    Returns:
      ``difference``, accuracy of the second minus accuracy of the first, with its interval ``low``
      and ``high``; ``p_value``, the exact McNemar test of equal accuracy; ``gained`` (incorrect
      before, correct after), ``lost`` (the reverse) and ``n``, numbers of questions.
    """
    first = np.asarray(before, bool)
    second = np.asarray(after, bool)
    assert first.shape == second.shape
    assert first.ndim == 1
    n = first.size
    gained = int(np.sum(second & ~first))
    lost = int(np.sum(first & ~second))
    low = math.nan
    high = math.nan
    if n:
        # Resampling questions is equivalent to a multinomial draw of the three counts.
        shares = np.array([gained, lost, n - gained - lost]) / n
        counts = np.random.default_rng(0).multinomial(n, shares, size=_PAIRED)
        differences = (counts[:, 0] - counts[:, 1]) / n
        low, high = np.percentile(differences, [2.5, 97.5]).tolist()
    return {
        "difference": (gained - lost) / max(n, 1),
        "low": low,
        "high": high,
        "p_value": mcnemar(gained, lost),
        "gained": gained,
        "lost": lost,
        "n": n,
    }


def mcnemar(gained: int, lost: int) -> float:
    """Returns the two-sided exact p-value of McNemar's test; 1 without discordant answers.

    It is the probability that a fair coin splits the discordant answers at least this unevenly.

    Source: McNemar, 1947, Psychometrika 12; the exact binomial form.
    """
    from scipy import stats

    if gained + lost:
        return float(stats.binomtest(gained, gained + lost).pvalue)
    return 1.0
