"""Frozen products against float64, in both passes, in every implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.layout.distributed import platform_of
from nalora_jax.ops.dispatch import Platform, numerics_for
from nalora_jax.ops.storage import matmul, round_and_save, rounded


def _operands(rows: int = 3) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(2, rows, 16), (16, 8), (2, rows, 8)]]


# Few rows are not native everywhere.
@pytest.mark.parametrize(("result", "rows"), [("float32", 3), ("float32", 40), ("bfloat16", 40)])
def test_low_precision_rounds_operands_and_accumulates_in_float32(result, rows, numerics):
    x, kernel, g = _operands(rows)
    half = numerics("bfloat16", result=result)
    value, vjp = jax.vjp(lambda x: matmul(x, kernel.astype(jnp.bfloat16), half), x)

    exact = lambda v: np.asarray(v.astype(jnp.bfloat16), np.float64)  # noqa: E731
    near = 1e-5 if result == "float32" else 1e-2
    assert value.dtype == result
    np.testing.assert_allclose(np.float64(value), exact(x) @ exact(kernel), rtol=near, atol=near)
    dx = vjp(g.astype(result))[0]
    assert dx.dtype == jnp.float32
    np.testing.assert_allclose(dx, exact(g) @ exact(kernel).T, rtol=1e-5, atol=1e-5)


def test_float32_is_the_plain_product_with_its_gradient(numerics):
    x, kernel, g = _operands()
    value, vjp = jax.vjp(lambda x: matmul(x, kernel, numerics()), x)
    np.testing.assert_allclose(value, x @ kernel, rtol=1e-6)
    np.testing.assert_allclose(vjp(g)[0], g @ kernel.T, rtol=1e-5, atol=1e-6)
    # A frozen kernel has none.
    for chosen in (numerics(), numerics("bfloat16", result="float32")):
        gradient = jax.grad(lambda k, n=chosen: jnp.sum(matmul(x, k, n) ** 2))(kernel)
        assert not np.any(gradient)


def test_the_platform_is_the_meshs():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    assert platform_of(mesh) == Platform("cpu", "cpu", 4, 2)
    assert platform_of().devices == 8


@pytest.mark.parametrize(
    ("name", "platform", "message"),
    [
        ("fastest", "cpu", "compute.implementation.*auto, xla.*'fastest'"),
        ("splash", "cpu", "'splash', which is for tpu"),
    ],
)
def test_an_implementation_that_is_not_there_is_refused_by_name(name, platform, message):
    with pytest.raises(NaloraError, match=message):
        numerics_for("bfloat16", platform, name)


def test_rounding_for_the_backward_pass_passes_the_gradient_on(numerics):
    x = jnp.linspace(-1, 1, 31)
    half = numerics(residual="bfloat16")
    value, back = jax.vjp(lambda x: round_and_save(x, half), x)
    np.testing.assert_array_equal(value, x.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(back(x)[0], x)
    np.testing.assert_array_equal(round_and_save(x, numerics()), x)


def test_rounding_is_the_conversion_to_bf16_and_differentiable(numerics):
    rng = np.random.default_rng(0)
    ties = np.array([1.00390625, 1.01171875, -1.00390625])  # halfway between two bf16 numbers: to even
    edges = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 1e-39, np.finfo(np.float32).max])
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    x = jnp.asarray(np.concatenate([ties, edges, bits[np.isfinite(bits)]]).astype(np.float32))
    got = jax.jit(lambda x: rounded(x, "bfloat16", numerics()))(x)
    assert got.dtype == jnp.bfloat16
    want = np.asarray(x).astype(got.dtype)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint16), want.view(np.uint16))
    nan = rounded(jnp.asarray([np.nan, -np.nan], jnp.float32), "bfloat16", numerics())
    assert np.all(np.isnan(np.asarray(nan, np.float32)))
    slope = jax.grad(lambda x: jnp.sum(rounded(x, "bfloat16", numerics()).astype(jnp.float32) ** 2))(x[:3])
    np.testing.assert_array_equal(slope, 2 * np.asarray(got[:3], np.float32))
