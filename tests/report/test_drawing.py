"""Numbers behind the pictures."""

from __future__ import annotations

import numpy as np
import pytest

from nalora_jax.report.drawing import smooth


@pytest.mark.parametrize("window", [1, 3, 7])
def test_smooth_is_the_mean_of_the_last_values(window):
    values = np.random.default_rng(0).standard_normal(20)
    values[[2, 11]] = np.nan
    expected = [
        np.nanmean(values[max(0, i - window + 1) : i + 1]) if window > 1 else values[i] for i in range(20)
    ]
    np.testing.assert_allclose(smooth(values, window), expected, rtol=1e-12, atol=1e-12)
