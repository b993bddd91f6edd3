"""Numbers behind the pictures."""

from __future__ import annotations

import numpy as np
import pytest

from nalora_jax.report.drawing import evenly, smooth, thin


@pytest.mark.parametrize("window", [1, 3, 7])
def test_smooth_is_the_mean_of_the_last_values(window):
    values = np.random.default_rng(0).standard_normal(20)
    values[[2, 11]] = np.nan
    expected = [
        np.nanmean(values[max(0, i - window + 1) : i + 1]) if window > 1 else values[i] for i in range(20)
    ]
    np.testing.assert_allclose(smooth(values, window), expected, rtol=1e-12, atol=1e-12)


def test_thin_keeps_rows_together_and_both_ends():
    steps, values = thin(np.arange(1000), np.arange(1000) * 2, most=50)
    assert len(steps) == 50
    assert (steps[0], steps[-1]) == (0, 999)
    np.testing.assert_array_equal(values, steps * 2)
    assert len(thin(np.arange(7), most=50)[0]) == 7


def test_evenly_takes_the_nearest_log_step():
    steps, values = evenly(np.array([10.0, 11.0, 20.0]), np.array([[1.0], [2.0], [3.0]]), 6)
    np.testing.assert_array_equal(steps, [10, 12, 14, 16, 18, 20])
    np.testing.assert_array_equal(values[:, 0], [1, 2, 2, 3, 3, 3])
    assert len(evenly(np.array([1.0, 3.0]), np.zeros((2, 1)), 100)[0]) == 3
    assert len(evenly(np.array([7.0]), np.zeros((1, 1)), 100)[0]) == 1
