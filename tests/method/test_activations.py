from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from transformers.activations import ACT2FN

from nalora_jax.method import activations

pytestmark = pytest.mark.optimised  # bounds are those of fused multiply-adds
CLAMPED = "clamped_swish(1.3,6.0)"
SELF_GATED = ("silu", "gelu", "gelu_tanh", "quick_gelu", "mish", CLAMPED)
SINGLE = ("relu", "relu2", "identity")
TINY = float(np.finfo(np.float32).tiny)


def reference(name, z):
    """(rho, h - 1) in float64 by scipy."""

    def sigmoid(inner, slope):
        return special.expit(inner), z * special.expit(-inner) * slope

    if name == "silu":
        return sigmoid(z, 1.0)
    if name == "quick_gelu":
        return sigmoid(1.702 * z, 1.702)
    c = np.sqrt(2 / np.pi)
    if name == "gelu_tanh":
        return sigmoid(2 * c * (z + 0.044715 * z**3), 2 * c * (1 + 3 * 0.044715 * z * z))
    if name == "gelu":
        near, far = (
            c * z / special.erfcx(x / np.sqrt(2)) for x in (np.minimum(-z, 20.0), np.abs(z))
        )
        return special.ndtr(z), np.where(z < 0, far, near)
    if name == "mish":
        e = np.exp(np.minimum(z, 40.0))
        return e * (e + 2) / (e * (e + 2) + 2), z * 4 * (e + 1) / ((e + 2) * (e * (e + 2) + 2))
    below, top = sigmoid(1.3 * z, 1.3), 6.0 * special.expit(1.3 * 6.0)  # of CLAMPED
    return np.where(z > 6.0, top / np.maximum(z, 6.0), below[0]), np.where(z > 6.0, -1.0, below[1])


def grid():
    """Dense around 0 and in the tails of every activation, and up to 1e4."""
    wide = np.geomspace(1e-6, 1e4, 2001)
    parts = [np.linspace(-95, 25, 60001), np.linspace(-14, 4, 60001), wide, -wide, [0.0]]
    return np.concatenate(parts).astype(np.float32)


@pytest.mark.parametrize("name", SELF_GATED)
def test_values_and_derivatives_agree_with_float64(name):
    activation, z = activations.get_activation(name), grid()
    rho, excess = reference(name, z.astype(np.float64))
    seen = rho > 4 * TINY  # below, float32 flushes to 0
    for function, truth, condition in (
        (jax.vmap(jax.grad(activation.phi)), rho * (1 + excess), rho),
        (partial(activations.homogeneity, activation=activation), 1 + excess, np.ones_like(rho)),
        (activation.phi, z * rho, 0 * rho),
        (activation.rho, rho, 0 * rho),
    ):
        value = np.asarray(jax.jit(function)(z), np.float64)
        bound = 2e-5 * np.abs(truth) + 2.0**-21 * condition
        assert (np.abs(value - truth) <= bound)[seen].all()
        assert np.isfinite(value).all()
    assert np.abs(activation.phi(z) - z * rho)[~seen].max(initial=0.0) <= 1e-35


@pytest.mark.parametrize("name", SELF_GATED + SINGLE)
def test_finite_at_extremes_and_dtype_kept(name):
    activation = activations.get_activation(name)
    z = jnp.array([0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0, 30.0, -30.0, 1e4, -1e4], jnp.bfloat16)

    @jax.jit
    def values(z):
        slopes = [jax.vmap(jax.grad(f))(z) for f in (activation.phi, activation.rho)]
        return [activation.phi(z), activation.rho(z), *activation.gate(z), *slopes]

    for value in values(z):
        assert value.dtype == z.dtype
        assert value.shape == z.shape
        assert jnp.isfinite(value).all()


@pytest.mark.parametrize(
    "name", [*SELF_GATED[:-1], "relu", "relu2", *activations.ACTIVATION_ALIASES]
)
def test_names_compute_what_transformers_computes(name):
    z, theirs = np.linspace(-6, 6, 481), "gelu_pytorch_tanh" if name == "gelu_tanh" else name
    expected = ACT2FN[theirs](torch.from_numpy(z)).numpy()
    np.testing.assert_allclose(
        activations.get_activation(name).phi(jnp.float32(z)), expected, rtol=2e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    ("name", "zero", "peak_at", "peak", "linear_from"),
    [
        ("silu", -1.2785, 1.2785, 1.2785, 4.485),
        ("gelu", -0.7518, 0.840, 1.2945, 2.440),
        ("gelu_tanh", -0.7525, 0.840, 1.2943, 2.442),
        ("quick_gelu", -0.7512, 0.751, 1.2785, 2.635),
        ("mish", -1.1925, 0.877, 1.2154, 2.545),
        ("clamped_swish", -0.7512, 0.751, 1.2785, 2.635),
    ],
)
def test_constants_of_the_design(name, zero, peak_at, peak, linear_from):
    partition = activations.partition(name)
    # Printed to so many digits, the last one rounded either way.
    assert partition.z0 == pytest.approx(zero, abs=1e-4)
    assert partition.z1 == pytest.approx(linear_from, abs=1e-3)
    z = jnp.linspace(0, 6, 60001)
    h = activations.homogeneity(z, activations.get_activation(name))
    assert float(h.max()) == pytest.approx(peak, abs=1e-4)
    assert float(z[h.argmax()]) == pytest.approx(peak_at, abs=2e-3)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4),
    name=st.sampled_from(SELF_GATED + SINGLE),
)
def test_regions_are_disjoint_and_cover_the_line(values, name):
    partition = activations.partition(name)
    below = np.nextafter(np.float32(partition.z1), np.float32(-1e9))
    z = jnp.array([*values, partition.z0, partition.z1, below, 0.0, -0.0, jnp.nan], jnp.float32)
    masks = activations.regions(z, partition)
    np.testing.assert_array_equal(sum(mask.astype(jnp.int32) for mask in masks), jnp.ones(z.shape))
    zero = activations.regions(jnp.zeros(()), partition)
    assert bool(zero.expanding) if partition.meaningful else bool(zero.linear)
