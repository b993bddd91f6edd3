"""Products, attention and the sums over a vocabulary: against NumPy in float64, on random shapes
and inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.cpu.attention import Heads, native_attention, native_gradient, needs_result
from nalora_jax.cpu.cross_entropy import over_vocabulary
from nalora_jax.cpu.matmul import Sum, Term, products
from nalora_jax.ops.losses import Head
from nalora_jax.ops.storage import Bits
from tests.ops.in_float64 import attention64, packed_rows, visible

pytestmark = pytest.mark.usefixtures("kernels")
EVERY_KIND = True


def draw(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> jax.Array:
    # Not `jnp.asarray`, which compiles a program for every shape.
    return jax.device_put((scale * rng.standard_normal(shape, np.float32)).astype(jnp.bfloat16))


def exact(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def worst(got: jax.Array, want: np.ndarray) -> float:
    """Largest difference over the largest value."""
    assert got.shape == want.shape
    return float(np.abs(exact(got) - want).max() / np.abs(want).max())


def in_stack(rng: np.random.Generator, y: jax.Array) -> Bits:
    """``y`` among two other matrices."""
    at = int(rng.integers(3))
    stack = np.array(draw(rng, 3, *y.shape))
    stack[at] = y
    return Bits(jax.device_put(stack.view(np.uint16)), jax.device_put(np.int32(at)))


@pytest.mark.parametrize("seed", range(3))
def test_sums_of_products(seed):
    """Of terms with half of their kernels in stacks."""
    rng = np.random.default_rng(seed)
    sums, wanted = [], []
    for most in (4, 200, 200):
        rows, columns = (int(n) for n in rng.integers(1, most, 2))
        terms, want = [], np.zeros((rows, columns))
        for depth in rng.choice([1, 8, 31, 32, 64, 100, 300], rng.integers(1, 4)):
            turned = bool(rng.integers(2))
            x, y = (
                draw(rng, rows, depth),
                draw(rng, *((columns, depth) if turned else (depth, columns))),
            )
            terms.append(Term(x, in_stack(rng, y) if rng.integers(2) else y, turned))
            want += exact(x) @ (exact(y).T if turned else exact(y))
        sums.append(Sum(terms, ["float32", "bfloat16"][rng.integers(2)]))
        wanted.append(want)
    run = jax.jit(
        lambda *sums: products(*sums)
    )  # a new function: JAX would take the program of another kind
    for got, want, asked in zip(run(*sums), wanted, sums, strict=True):
        assert got.dtype == asked.dtype
        # Sums in float32, or rounded once to 8 bits.
        assert worst(got, want) < (1e-6 if asked.dtype == "float32" else 2**-8)


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1000, 40, 33), (300, 1100, 700), (33, 20_000, 70)]
)
def test_groups_of_columns_are_shared_by_rows(rows, depth, columns):
    """Several groups, and rows that are no whole number of what a thread takes; a panel beyond a
    group's size."""
    rng = np.random.default_rng(0)
    x, y = draw(rng, rows, depth), draw(rng, depth, columns)
    assert worst(products(Sum([Term(x, y)]))[0], exact(x) @ exact(y)) < 1e-5


def test_what_is_not_a_number_is_passed_on():
    x = jnp.ones((40, 40), jnp.bfloat16).at[3, 5].set(jnp.nan)
    for dtype in ("float32", "bfloat16"):
        (y,) = products(Sum([Term(x, jnp.ones((40, 50), jnp.bfloat16))], dtype))
        np.testing.assert_array_equal(jnp.isnan(y).all(1), np.arange(40) == 3)
        np.testing.assert_array_equal(jnp.isnan(y).any(1), np.arange(40) == 3)
    # A score is seen by who sees its key.
    rng = np.random.default_rng(0)
    q, k, v = (draw(rng, 1, 40, 1, 32) for _ in "qkv")
    given = Heads(
        q, k.at[0, 20].set(jnp.nan), v, jnp.arange(40)[None], jnp.ones((1, 40), jnp.int32), 2**30
    )
    out, _ = native_attention(given)
    np.testing.assert_array_equal(jnp.isnan(out[0]).any((1, 2)), np.arange(40) >= 20)


@pytest.mark.parametrize("at", [-1, 1])
def test_an_index_outside_of_its_stack_is_refused(at):
    x, stack = (
        jnp.zeros((4, 8), jnp.bfloat16),
        Bits(jnp.zeros((1, 8, 4), jnp.uint16), jnp.asarray(at)),
    )
    with pytest.raises(Exception, match="an index is outside of its stack"):
        jax.block_until_ready(products(Sum([Term(x, stack)])))


@pytest.mark.parametrize(
    ("batch", "seq", "heads", "kv_heads", "dim", "window", "softcap", "packed"),
    [
        (2, 128, 3, 1, 64, 2**30, 0.0, False),
        (2, 100, 2, 2, 32, 17, 0.0, True),
        (2, 300, 4, 2, 64, 2**30, 5.0, True),
        (1, 520, 2, 1, 80, 200, 0.0, True),
        (3, 7, 2, 1, 16, 2**30, 0.0, False),
        (2, 33, 1, 1, 8, 3, 2.0, True),
    ],
)
def test_attention_and_its_gradient(batch, seq, heads, kv_heads, dim, window, softcap, packed):
    rng = np.random.default_rng(seq)
    q, k, v = (
        draw(rng, batch, seq, heads, dim, scale=dim**-0.5),
        *(draw(rng, batch, seq, kv_heads, dim) for _ in "kv"),
    )
    places = packed_rows(batch, seq) if packed else (np.arange(seq)[None], np.ones((1, seq), int))
    given = Heads(q, k, v, *map(jax.device_put, places), window)
    g = draw(rng, *q.shape)
    attend = jax.jit(lambda *arrays: native_attention(Heads(*arrays, window), softcap))
    out, logsumexp = attend(*given[:5])
    want = attention64(q, k, v, g, visible(*given[3:5], window), softcap=softcap)
    assert worst(logsumexp, want[1]) < 1e-6
    # Weights and slopes are rounded to 8 bits before they are summed, the result afterwards.
    assert worst(out, want[0]) < 2**-7
    gradient = jax.jit(
        lambda arrays, *others: native_gradient(Heads(*arrays, window), *others, softcap)
    )
    for held in (out,) if needs_result(seq, softcap) else (out, None):
        gradients = gradient(given[:5], held, logsumexp, g)
        for got, expected in zip(gradients, want[2:], strict=True):
            assert worst(got, expected) < 2**-7


@pytest.mark.parametrize(
    ("rows", "d_model", "vocab", "transposed", "scale", "softcap", "count", "gradient"),
    [
        (70, 64, 1000, True, 1.0, 0.0, 70, True),
        (33, 48, 513, False, 0.5, 0.0, 20, True),
        (600, 96, 2000, True, 1.0, 30.0, 600, True),
        (40, 100, 512, False, 1.0, 5.0, 40, False),
        (600, 2080, 270, True, 1.0, 0.0, 550, True),  # more sums than one thread keeps at a time
        (5, 32, 9, True, 1.0, 0.0, 0, True),
    ],
)
def test_sums_over_a_vocabulary(rows, d_model, vocab, transposed, scale, softcap, count, gradient):
    rng = np.random.default_rng(rows)
    hidden, table = draw(rng, rows, d_model, scale=d_model**-0.5), draw(rng, vocab, d_model)
    given = table if transposed else table.T
    head = Head(transposed, softcap, scale)
    run = jax.jit(lambda *arrays: over_vocabulary(*arrays, count, head, gradient))
    top, total, attended = run(hidden, given)
    logits, slope = scale * exact(hidden) @ exact(table).T, scale * np.ones((rows, vocab))
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
        slope *= 1 - (logits / softcap) ** 2
    if count:
        np.testing.assert_allclose(top[:count], logits.max(1)[:count], rtol=1e-5, atol=1e-5)
        exps = np.exp(logits - exact(top)[:, None])
        np.testing.assert_allclose(total[:count], exps.sum(1)[:count], rtol=1e-4)
        if gradient:
            assert worst(attended[:count], ((exps * slope) @ exact(table))[:count]) < 2**-7
    np.testing.assert_array_equal(top[count:], 0)
    np.testing.assert_array_equal(total[count:], 1)
    np.testing.assert_array_equal(attended[count:], 0)
    assert attended.shape == (rows, d_model if gradient else 0)
