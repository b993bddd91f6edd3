"""The Python files in `studies/` that rules and figures of committed studies come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from nalora_jax.common.imports import import_file
from nalora_jax.errors import NaloraError
from nalora_jax.method import activations, statistics
from nalora_jax.method.rules import make
from nalora_jax.method.transform import make_mechanisms

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


def test_stochastic_masks_are_unbiased_and_a_frozen_gate_rests() -> None:
    import_file("stochastic_masks.py", STUDIES)
    averages = {"slope": np.ones((2, 50), np.float32)}
    context = make_mechanisms((), activation="silu", total_steps=10, seed=3).context(
        np.int32(0), "layers/ffn"
    )
    rule = make("random:keep=0.25")
    draws = np.stack([rule.factor(averages, context._replace(step=np.int32(step))) for step in range(60)])
    assert set(np.unique(draws)) == {0.0, 4.0}
    assert draws.mean() == pytest.approx(1.0, abs=0.1)
    freeze = make("freeze:share=0.6")
    for step, expected in ((5, 1), (6, 0)):
        assert (freeze.factor(averages, context._replace(step=np.int32(step))) == expected).all()
    with pytest.raises(NaloraError, match="total_steps"):
        freeze.factor(averages, context._replace(total_steps=0))
