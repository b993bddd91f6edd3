"""Intervals and tests against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nalora_jax.evaluate.intervals import bootstrap, compare, mcnemar, wilson


@given(n=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_equals_scipy(n, share):
    k = round(share * n)
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(k, n), (expected.low, expected.high), atol=1e-15)


@given(gained=st.integers(0, 300), lost=st.integers(0, 300))
def test_mcnemar_equals_the_exact_binomial_test(gained, lost):
    expected = stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    np.testing.assert_allclose(mcnemar(gained, lost), expected, rtol=1e-9)


def test_bootstrap_of_a_ratio_weighs_units_by_their_size():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 100, 300)
    losses = tokens * (2 + 0.3 * rng.standard_normal(300))
    low, high = bootstrap(losses, tokens, resamples=4000)
    ratio = losses.sum() / tokens.sum()
    # The delta method's standard error of a ratio.
    error = np.std(losses - ratio * tokens, ddof=1) * math.sqrt(300) / tokens.sum()
    np.testing.assert_allclose(
        (low, high), (ratio - 1.96 * error, ratio + 1.96 * error), atol=0.15 * error
    )


def test_a_paired_comparison_sees_what_separate_intervals_hide():
    rng = np.random.default_rng(0)
    before = rng.random(500) < 0.5
    after = before.copy()
    after[np.flatnonzero(~before)[:20]] = True
    after[np.flatnonzero(before)[:3]] = False
    result = compare(before, after)
    assert (result["gained"], result["lost"], result["n"]) == (20, 3, 500)
    assert result["difference"] == pytest.approx(17 / 500)
    difference = after.astype(float) - before
    theirs = stats.bootstrap((difference,), np.mean, n_resamples=10_000, method="percentile", rng=1)
    np.testing.assert_allclose(
        (result["low"], result["high"]), theirs.confidence_interval, atol=0.003
    )
    assert result["p_value"] == pytest.approx(stats.binomtest(3, 23).pvalue)
    assert wilson(int(before.sum()), 500)[1] > after.mean()
