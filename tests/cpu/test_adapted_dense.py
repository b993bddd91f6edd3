"""One product for base and adapter by XLA: when it is taken, and what its operands are filled up with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.cpu import adapted_dense as module
from nalora_jax.cpu.adapted_dense import worthwhile
from nalora_jax.method.low_rank import Adapter, Dense, adapted_dense
from nalora_jax.ops.dispatch import Platform, numerics_for


@pytest.mark.parametrize("operand", ["float32", "bfloat16"])
def test_contractions_filled_up_with_zeros_change_nothing(
    operand: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(64)
    shapes = ((2, 40, 64), (64, 128), (64, 5), (5, 128), (128,))
    x, kernel, a, b, mask = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    numerics = numerics_for(operand, Platform("cpu", "", 8))  # on several devices no kernel is native

    def results(multiple: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        x, kernel, a, b = arrays
        monkeypatch.setattr(module, "contraction_multiple", lambda _: multiple)

        def layer(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            return adapted_dense(
                x, Dense(kernel, Adapter(a, b, 0.7, jnp.abs(mask[: b.shape[1]]))), numerics
            ).y

        @jax.jit
        def value_and_gradients(*given: jax.Array) -> tuple[jax.Array, ...]:
            y, back = jax.vjp(layer, *given)
            return y, *back(jnp.cos(y))

        return value_and_gradients(x, a, b)

    for arrays in ((x, kernel, a, b), (jnp.tile(x, 2), kernel.T, b.T, a.T)):
        for plain, filled in zip(results(1, *arrays), results(32, *arrays), strict=True):
            np.testing.assert_allclose(plain, filled, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("rows", "expected"), [(1, False), (31, False), (32, True), (4096, True)])
def test_few_rows_leave_the_kernel_alone(rows: int, expected: bool) -> None:
    assert worthwhile(jnp.zeros((1, rows, 64)), jnp.zeros((64, 128))) is expected
