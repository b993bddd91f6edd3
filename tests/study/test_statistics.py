"""Tests and intervals against enumeration, scipy and published values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from nalora_jax.study.statistics import holm, is_equivalent, paired, seeds_needed, sign_test, signed_rank_test

DIFFERENCES = np.array([-0.013, -0.002, -0.021, 0.004, -0.008, -0.001])


def test_the_sign_test_counts_every_way_the_signs_can_fall() -> None:
    for n, below in ((6, 5), (6, 3), (5, 5), (1, 0)):
        ways = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
        extreme = [k for k in ways if abs(k - n / 2) >= abs(below - n / 2)]
        assert sign_test(below, n - below) == pytest.approx(len(extreme) / len(ways))
    assert sign_test(0, 0) == 1.0


def test_the_signed_rank_test_counts_every_way_the_signs_can_fall() -> None:
    ranks = stats.rankdata(np.abs(DIFFERENCES))
    center = ranks.sum() / 2
    observed = ranks[DIFFERENCES > 0].sum()
    ways = [np.dot(signs, ranks) for signs in itertools.product((0, 1), repeat=len(ranks))]
    share = np.mean([abs(way - center) >= abs(observed - center) for way in ways])
    assert signed_rank_test(DIFFERENCES) == pytest.approx(share)
    assert signed_rank_test(np.append(DIFFERENCES, 0.0)) == pytest.approx(share)  # a pair that does not differ is mute
    assert signed_rank_test(np.zeros(4)) == 1.0
    assert 0 < signed_rank_test(np.array([1.0, 1.0, -1.0, 2.0])) <= 1  # ties


def test_equivalence_is_two_one_sided_t_tests() -> None:
    rng = np.random.default_rng(0)
    answers = []
    for mean in (0.0, 0.002, 0.004, 0.006):
        for n in (3, 5, 10):
            x = rng.normal(mean, 0.003, n)
            above = stats.ttest_1samp(x, -0.005, alternative="greater").pvalue
            below = stats.ttest_1samp(x, 0.005, alternative="less").pvalue
            assert is_equivalent(x, 0.005) == (max(above, below) < 0.05)
            answers.append(is_equivalent(x, 0.005))
    assert True in answers
    assert False in answers
    assert not is_equivalent(np.zeros(1), 0.005)  # one pair says nothing


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_needed_are_the_textbooks_sample_sizes(effect: float, pairs: int) -> None:
    # Cohen's small, medium and large effect at 80% and two-sided 5%, as G*Power 3.1 gives them for matched pairs.
    assert seeds_needed(1.0, effect) == pairs


def test_seeds_needed_has_bounds() -> None:
    assert seeds_needed(0.0, 0.005) == 2
    assert seeds_needed(1e-9, 0.005) == 2
    assert seeds_needed(10.0, 0.005) is None
    assert seeds_needed(math.nan, 0.005) is None


def test_holm_adjusts_as_r_does() -> None:
    # p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") and p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") in R.
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_comparison_is_of_the_differences() -> None:
    other = np.array([3.5, 3.6, 3.4, 3.55, 3.45, 3.52])
    found = paired(other + DIFFERENCES, other, 0.005)
    assert (found.n, found.better) == (6, 5)
    assert found.mean == pytest.approx(DIFFERENCES.mean())
    assert found.deviation == pytest.approx(DIFFERENCES.std(ddof=1))
    assert found.effect == pytest.approx(DIFFERENCES.mean() / DIFFERENCES.std(ddof=1))
    theirs = stats.bootstrap((DIFFERENCES,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    np.testing.assert_allclose((found.low, found.high), theirs.confidence_interval, atol=6e-4)
    assert found == paired(other + DIFFERENCES, other, 0.005)  # a report says the same twice
    assert paired([1.0], [2.0], 0.005).seeds_needed is None
