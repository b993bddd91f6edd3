"""Tests and intervals against enumeration, scipy and published values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from nalora_jax.study.hypothesis_tests import (
    compare_pairs,
    holm,
    is_equivalent,
    seeds_needed,
    signed_rank_test,
    skewness,
    t_test,
)

DIFFERENCES = np.array([-0.013, -0.002, -0.021, 0.004, -0.008, -0.001])


def enumerated(difference: np.ndarray) -> float:
    """The share of all signs of the mid-ranks that are at least as extreme."""
    ranks = stats.rankdata(np.abs(difference))
    center, observed = ranks.sum() / 2, ranks[difference > 0].sum()
    ways = np.array(list(itertools.product((0, 1), repeat=len(ranks)))) @ ranks
    return float(np.mean(np.abs(ways - center) >= abs(observed - center)))


def test_signed_rank_p_values_equal_an_enumeration_of_all_signs_with_ties_as_well() -> None:
    tied = [1.0, 1.0, -1.0, 2.0], [3.0, -3.0, 3.0, 3.0, -1.0, -1.0, 2.0, 2.0, 5.0, 1.0]
    for difference in (DIFFERENCES, *map(np.array, tied)):
        assert signed_rank_test(difference) == pytest.approx(enumerated(difference))
        assert signed_rank_test(np.append(difference, 0.0)) == pytest.approx(enumerated(difference))


def test_accuracies_that_differ_by_the_same_number_of_items_are_ties_despite_rounding() -> None:
    counts, other = np.array([180, 171, 190, 165, 177]), np.array([174, 165, 178, 164, 165])
    recorded, theirs = (
        np.round(values / 300, 9) for values in (counts, other)
    )  # as records hold them
    exact = signed_rank_test((counts - other).astype(float))
    assert compare_pairs(recorded, theirs, 0.02).wilcoxon_p == exact == 0.0625
    assert compare_pairs(recorded, recorded + 1e-10, 0.02).better == 0


def test_equivalence_equals_two_one_sided_t_tests_of_scipy() -> None:
    rng = np.random.default_rng(0)
    answers = []
    for mean in (0.0, 0.002, 0.004, 0.006):
        for n in (
            3,
            5,
            10,
        ) * 20:  # in some only the 90% interval is within the margin, not the 95% one
            x = rng.normal(mean, 0.003, n)
            above = stats.ttest_1samp(x, -0.005, alternative="greater").pvalue
            below = stats.ttest_1samp(x, 0.005, alternative="less").pvalue
            assert is_equivalent(x, 0.005) == (max(above, below) < 0.05)
            answers.append(is_equivalent(x, 0.005))
    assert {True, False} == set(answers)


def test_statistics_are_undefined_for_one_pair_equal_pairs_or_an_unknown_margin() -> None:
    one = compare_pairs([1.0], [2.0], 0.005)
    assert (one.low, one.high, one.equivalent, one.seeds_needed) == (
        -math.inf,
        math.inf,
        False,
        None,
    )
    assert math.isnan(one.t_p)
    assert (t_test(np.ones(3)), t_test(np.zeros(3)), skewness(np.full(3, 0.1))) == (0.0, 1.0, 0.0)
    for margin in (math.nan, 0.0, -0.1):
        unknown = compare_pairs(DIFFERENCES, np.zeros(6), margin)
        assert not unknown.equivalent
        assert unknown.seeds_needed is None


def test_seeds_needed_equal_the_sample_sizes_of_textbooks() -> None:
    # Cohen's small, medium and large effect at 80% and two-sided 5%, as G*Power 3.1 gives them for
    # matched pairs.
    assert [seeds_needed(1.0, effect) for effect in (0.2, 0.5, 0.8)] == [199, 34, 15]


def test_holm_adjusts_as_r_does() -> None:
    # p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") and p.adjust(c(0.01, 0.04, 0.03, 0.005),
    # "holm") in R.
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, math.nan]) == pytest.approx([0.02, math.nan], nan_ok=True)
