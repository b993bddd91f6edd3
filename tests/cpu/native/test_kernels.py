"""Products, attention and the sums over a vocabulary: against NumPy in float64, on random shapes and inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.cpu import native
from nalora_jax.cpu.native import Heads, Slice, Sum, Term
from tests.ops.in_float64 import attention64, visible

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


def in_stack(rng: np.random.Generator, y: jax.Array) -> Slice:
    """``y`` among two other matrices."""
    at = int(rng.integers(3))
    stack = np.array(draw(rng, 3, *y.shape))
    stack[at] = y
    return Slice(jax.device_put(stack.view(np.uint16)), jax.device_put(np.int32(at)))


def compiled(function: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """What a function makes of arrays, as one program; its operations one by one would be many."""
    leaves, structure = jax.tree.flatten((given, options))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    @jax.jit
    def run(*arrays: jax.Array) -> Any:
        filled = dict(enumerate(leaves)) | dict(zip(places, arrays, strict=True))
        given, options = jax.tree.unflatten(structure, filled.values())
        return function(*given, **options)

    return run(*(leaves[i] for i in places))


def products(
    rng: np.random.Generator, rows: int, columns: int, depths: list[int], transposed: list[bool]
) -> Any:
    """Terms with half of their kernels in stacks, and their sum in float64."""
    terms, want = [], np.zeros((rows, columns))
    for depth, turned in zip(depths, transposed, strict=True):
        x, y = draw(rng, rows, depth), draw(rng, *((columns, depth) if turned else (depth, columns)))
        terms.append(Term(x, in_stack(rng, y) if rng.integers(2) else y, turned))
        want += exact(x) @ (exact(y).T if turned else exact(y))
    return terms, want


@pytest.mark.parametrize("seed", range(3))
def test_sums_of_products(seed):
    rng = np.random.default_rng(seed)
    sums, wanted = [], []
    for _ in range(rng.integers(1, 4)):
        rows, columns = (int(n) for n in rng.integers(1, 200, 2))
        depths = [int(depth) for depth in rng.choice([1, 8, 31, 32, 64, 100, 300], rng.integers(1, 4))]
        terms, want = products(rng, rows, columns, depths, [bool(rng.integers(2)) for _ in depths])
        sums.append(Sum(terms, ["float32", "bfloat16"][rng.integers(2)]))
        wanted.append(want)
    for got, want, asked in zip(compiled(native.products, *sums), wanted, sums, strict=True):
        assert got.dtype == asked.dtype
        # Sums in float32, or rounded once to 8 bits.
        assert worst(got, want) < (1e-6 if asked.dtype == "float32" else 2**-8)


@pytest.mark.parametrize(("rows", "transposed"), [(1, True), (3, False), (8, False), (32, True)])
def test_sums_of_few_rows(transposed, rows):
    """Several sums, two terms, edges everywhere, and depths and widths beyond what is packed at a time."""
    rng = np.random.default_rng(rows)
    sums, wanted, bounds = [], [], []
    for depths, columns, bound in (([577, 3], 1100, 1e-6), ([70], 45, 1e-6), ([2_070], 45, 2.5e-6)):
        terms, want = products(rng, rows, columns, depths, [transposed] * len(depths))
        sums += [Sum(terms, dtype) for dtype in ("float32", "bfloat16")]
        wanted += [want, want]
        bounds += [bound, 2**-8]
    for got, want, bound in zip(compiled(native.products, *sums), wanted, bounds, strict=True):
        assert worst(got, want) < bound


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1000, 40, 33), (300, 1100, 700), (33, 20_000, 70)])
def test_groups_of_columns_are_shared_by_rows(rows, depth, columns):
    """Several groups, and rows that are no whole number of what a thread takes; a panel beyond a group's size."""
    rng = np.random.default_rng(0)
    x, y = draw(rng, rows, depth), draw(rng, depth, columns)
    assert worst(native.products(Sum([Term(x, y)]))[0], exact(x) @ exact(y)) < 1e-5


def test_products_pass_on_what_is_not_a_number():
    x = jnp.ones((40, 40), jnp.bfloat16).at[3, 5].set(jnp.nan)
    for dtype in ("float32", "bfloat16"):
        (y,) = native.products(Sum([Term(x, jnp.ones((40, 50), jnp.bfloat16))], dtype))
        assert bool(jnp.isnan(y[3]).all())
        assert not bool(jnp.isnan(y[4]).any())


@pytest.mark.parametrize("at", [-1, 1])
def test_an_index_outside_of_its_stack_is_refused(at):
    x, stack = jnp.zeros((4, 8), jnp.bfloat16), Slice(jnp.zeros((1, 8, 4), jnp.uint16), jnp.asarray(at))
    with pytest.raises(Exception, match="an index is outside of its stack"):
        jax.block_until_ready(native.products(Sum([Term(x, stack)])))


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (1.5957691, 0.0713548)])
@pytest.mark.parametrize("factor", [True, False])
def test_gates_and_their_gradients(coefficients, factor):
    rng = np.random.default_rng(0)
    (a, b), logistic = coefficients, native.Logistic(*coefficients)
    z, g = draw(rng, 50, 70, scale=4), draw(rng, 50, 70)
    u = draw(rng, 50, 70) if factor else None
    z64, u64 = exact(z), exact(u) if factor else 1.0
    rho = 1 / (1 + np.exp(-(a * z64 + b * z64**3)))
    slope = rho * (1 - rho) * (a + 3 * b * z64**2)
    assert worst(compiled(native.gate, z, u, logistic), z64 * rho * u64) < 2**-8
    dz, du = compiled(native.gate_gradient, z, u, g, logistic)
    assert worst(dz, exact(g) * u64 * (rho + z64 * slope)) < 2**-8
    assert du is None if not factor else worst(du, exact(g) * z64 * rho) < 2**-8


def test_gates_far_from_zero_are_steps():
    z = jnp.asarray([[-3e38, -1e4, -200, 200, 1e4, 3e38, jnp.inf, jnp.nan]], jnp.bfloat16)
    for logistic in (native.Logistic(1.0, 0.0), native.Logistic(1.6, 0.07)):
        out = np.asarray(native.gate(z, jnp.ones_like(z), logistic), np.float32)
        np.testing.assert_allclose(out[0, 1:3], 0, atol=1e-25)
        np.testing.assert_array_equal(out[0, 3:7], np.asarray(z, np.float32)[0, 3:7])
        assert np.isnan(out[0, 7])


def places(rng: np.random.Generator, batch: int, seq: int, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of rows of three segments, the first row with padding; or of plain rows."""
    if not packed:
        return np.arange(seq)[None], np.ones((1, seq), int)
    segments, positions = np.zeros((batch, seq), int), np.zeros((batch, seq), int)
    for row in range(batch):
        starts = np.array([0, *np.sort(rng.choice(np.arange(1, seq), 2, replace=False))])
        segments[row] = np.searchsorted(starts, np.arange(seq), side="right")
        positions[row] = np.arange(seq) - starts[segments[row] - 1]
    segments[0, -3:] = 0
    return positions, segments


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
    given = Heads(q, k, v, *map(jax.device_put, places(rng, batch, seq, packed)), window)
    g = draw(rng, *q.shape)
    out, logsumexp = compiled(native.attention, given, softcap)
    want = attention64(q, k, v, g, visible(*given[3:5], window), softcap=softcap)
    assert worst(logsumexp, want[1]) < 1e-6
    # Weights and slopes are rounded to 8 bits before they are summed, the result afterwards.
    assert worst(out, want[0]) < 2**-7
    for held in (out,) if native.needs_result(seq, softcap) else (out, None):
        gradients = compiled(native.attention_gradient, given, held, logsumexp, g, softcap)
        for got, expected in zip(gradients, want[2:], strict=True):
            assert worst(got, expected) < 2**-7


def test_a_score_that_is_not_a_number_is_seen_by_who_sees_it():
    rng = np.random.default_rng(0)
    q, k, v = (draw(rng, 1, 40, 1, 32) for _ in "qkv")
    given = Heads(q, k.at[0, 20].set(jnp.nan), v, jnp.arange(40)[None], jnp.ones((1, 40), jnp.int32), 2**30)
    out, _ = native.attention(given)
    assert not bool(jnp.isnan(out[0, :20]).any())
    assert bool(jnp.isnan(out[0, 20:]).all())


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
    options = {"transposed": transposed, "scale": scale, "softcap": softcap, "gradient": gradient}
    top, total, attended = compiled(native.over_vocabulary, hidden, given, count, **options)
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
