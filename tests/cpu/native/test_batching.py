"""Kernels under `jax.vmap`: one call for all runs, whose results equal those of single runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.cpu import native
from nalora_jax.cpu.native import Heads, Logistic, Slice, Sum, Term
from tests.cpu.native.test_kernels import draw

pytestmark = pytest.mark.usefixtures("kernels")
RUNS, ROWS = 5, 20


def _assert_one_call(function: Callable[..., Any], *operands: jax.Array) -> None:
    """Compares the runs of one call with calls of single runs; operands have an axis of runs."""
    together, alone = jax.jit(jax.vmap(function)), jax.jit(function)
    program = together.lower(*operands).as_text()
    assert program.count("stablehlo.custom_call @nalora") == 1
    assert "stablehlo.while" not in program
    results = jax.tree.leaves(together(*operands))
    for run in range(RUNS):
        singles = jax.tree.leaves(alone(*(operand[run] for operand in operands)))
        for x, y in zip(results, singles, strict=True):
            share = 2**-8 if y.dtype == jnp.bfloat16 else 1e-6
            x, y = np.asarray(x[run], np.float32), np.asarray(y, np.float32)
            np.testing.assert_allclose(x, y, rtol=share, atol=share * np.abs(y).max(initial=0))


def test_sums_with_shared_kernels_and_kernels_of_each_run():
    rng = np.random.default_rng(0)
    kernel, stack = draw(rng, 48, 70), Slice(draw(rng, 3, 70, 48).view(jnp.uint16), jnp.int32(1))

    def sums(x: jax.Array, hidden: jax.Array, b: jax.Array) -> list[jax.Array]:
        return native.products(
            Sum([Term(x, kernel), Term(hidden, b)], "bfloat16"),
            Sum([Term(x, stack, True), Term(hidden, b.T, True)]),
            Sum([Term(x, kernel)]),
            Sum([Term(hidden.T, x)]),
        )

    # With 48 columns each, only two runs at a time are joined.
    for rank in (8, 48):
        of_runs = draw(rng, RUNS, ROWS, 48), draw(rng, RUNS, ROWS, rank), draw(rng, RUNS, rank, 70)
        _assert_one_call(sums, *of_runs)


def test_sums_over_a_vocabulary_with_a_number_of_rows_for_each_run():
    rng = np.random.default_rng(1)
    table, counts = draw(rng, 100, 48), jnp.asarray([3, ROWS, 0, 7, 19], jnp.int32)
    sums = lambda x, count: native.over_vocabulary(x, table, count, transposed=True)  # noqa: E731
    _assert_one_call(sums, draw(rng, RUNS, ROWS, 48), counts)


def test_attention_with_positions_that_all_rows_share():
    rng = np.random.default_rng(2)
    places = jnp.arange(ROWS, dtype=jnp.int32)[None]
    q, k, v = (draw(rng, RUNS, 2, ROWS, heads, 16) for heads in (4, 2, 2))

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return native.attention(Heads(q, k, v, places, jnp.ones_like(places), 0))

    _assert_one_call(attention, q, k, v)


def test_gates():
    rng = np.random.default_rng(3)
    z, u = draw(rng, RUNS, ROWS, 64), draw(rng, RUNS, ROWS, 64)
    _assert_one_call(lambda z, u: native.gate(z, u, Logistic(1.0, 0.0)), z, u)
    _assert_one_call(lambda z: native.gate(z, None, Logistic(1.0, 0.0)), z)
    _assert_one_call(lambda z, u: native.gate_gradient(z, u, u, Logistic(1.0, 0.0)), z, u)
