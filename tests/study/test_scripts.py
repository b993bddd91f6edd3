"""The Python files in `studies/` that rules and figures of committed studies come from."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from nalora_jax.imports import import_file
from nalora_jax.method import activations, statistics
from nalora_jax.method.rules import make

STUDIES = Path(__file__).parents[2] / "studies"


def test_the_selection_mask_weighs_channels_by_the_slope_of_rho() -> None:
    import_file("selection_mask.py", STUDIES)
    z = np.linspace(-6, 6, 25)
    rho, drho = activations.get("silu").gate(z.astype(np.float32))
    gate = statistics.Gate(z, rho, drho, partition=None)
    slopes = np.asarray(statistics.get("selection_slope").values(gate))
    expected = expit(z) * (1 - expit(z))
    np.testing.assert_allclose(slopes, expected, rtol=1e-5, atol=1e-6)
    factors = make("selection:power=2").factor({"selection_slope": slopes[None]}, None)
    np.testing.assert_allclose(
        factors[0], np.minimum((expected / expected.mean()) ** 2, 4), rtol=1e-4, atol=1e-6
    )


def test_a_width_is_the_doublings_around_the_best_rate() -> None:
    width = runpy.run_path(str(STUDIES / "starts" / "widths.py"))["width"]
    rates = [1, 2, 4, 8, 16]
    assert width(rates, [0.4, 0.2, 0.0, 0.1, 0.2], 0.05) == (pytest.approx(0.75, abs=1e-3), True)
    assert width(rates, [0.0, 0.2, 0.4, 0.4, 0.0], 0.05) == (pytest.approx(0.25, abs=1e-3), False)
    assert width(rates, [0.4, 0.2, 0.0, 0.01, np.inf], 0.05) == (pytest.approx(1.25, abs=1e-3), True)


def test_an_optimum_is_the_vertex_over_the_logarithm_of_the_rate() -> None:
    script = runpy.run_path(str(STUDIES / "rate_by_rank" / "optima.py"))
    rates = 1e-3 * 2.0 ** np.arange(5)
    losses = 0.1 * (np.log2(rates) - np.log2(3e-3)) ** 2
    assert script["optimum"](rates, losses) == pytest.approx(3e-3)
    assert np.isnan(script["optimum"](rates, rates))  # the best rate is an end of the grid
    assert script["excess"]([1, 4], [0.3, 0.1], 2) == pytest.approx(0.1)
    assert np.isnan(script["excess"]([1, 4], [0.3, 0.1], 8))
