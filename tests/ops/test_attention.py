"""Attention against its formula in float64, block by block, cached, capped, windowed, packed."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.ops import attention as module
from nalora_jax.ops.attention import AttentionConfig, CachedKeys, Keys, attention, full_attention
from nalora_jax.ops.dispatch import Numerics
from tests.ops.in_float64 import attention64, packed_rows, visible

FAR = 2**30
PLAIN = Numerics()


def draw(batch: int, seq: int, heads: int = 6, kv_heads: int = 2, dim: int = 8):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(batch, seq, heads, dim))
    k, v = rng.normal(size=(2, batch, seq, kv_heads, dim))
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


SINKS = np.array(
    [-2.0, 0.5, 3.0, -1e4, 20.0, 1.0], np.float32
)  # one that loses little, one that takes all


@pytest.mark.parametrize(
    ("shape", "window", "softcap", "sinks"),
    [
        ((2, 24, 6, 2, 8), FAR, 1.5, SINKS),
        ((2, 40, 6, 2, 8), 7, 0.0, SINKS),  # one block, of which a native kernel keeps no result
        ((2, 150, 6, 2, 8), 70, 1.5, None),  # five, in pieces
        # XLA:CPU folds a transposed operand or result into a product, and can run few of the
        # results in bf16.
        ((8, 1, 9, 3, 64), FAR, 0.0, None),
        ((1, 65, 8, 1, 128), FAR, 0.0, None),
    ],
)
def test_values_and_gradients_equal_the_formula(
    shape, window, softcap, sinks, numerics, monkeypatch
):
    monkeypatch.setattr(module, "PIECE", 16 if shape[1] == 150 else 256)
    q, k, v = draw(*shape)
    rows = shape[:2]
    positions, segments = (
        packed_rows(*rows) if rows[1] > 1 else (np.zeros(rows, int), np.ones(rows, int))
    )
    config, real = AttentionConfig(shape[-1] ** -0.5, softcap), (segments > 0)[..., None, None]
    given = visible(positions, segments, window), config.scale, softcap, sinks
    result = attention64(q, k, v, q, *given)[0]
    _, _, *want = attention64(q, k, v, np.where(real, np.cos(result), 0.0), *given)

    @partial(jax.jit, static_argnums=4)
    def run(q, k, v, s, of):
        def attend(q, k, v, s):
            keys = Keys(k, v, positions, segments, sinks=None if sinks is None else s)
            return jnp.where(
                real, attention(q, keys, window, config, of), 0.0
            )  # padding's are never used

        out, back = jax.vjp(attend, q, k, v, s)
        return out, *back(jnp.cos(out) * real)

    for precision, tolerance in (("float32", 5e-6), ("bfloat16", 0.03)):
        s = jnp.zeros(shape[2]) if sinks is None else jnp.asarray(sinks)
        *got, of_sinks = run(q, k, v, s, numerics(precision, result="float32"))
        for a, b in zip(got, (np.where(real, result, 0.0), *want), strict=True):
            assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())
        assert not np.any(of_sinks)  # they are frozen


@pytest.mark.parametrize(
    ("block", "window", "softcap", "sinks"),
    [(10, FAR, 0.0, None), (10, 7, 1.5, SINKS), (1024, 7, 1.5, SINKS)],
)
def test_blocks_of_a_cache_equal_the_formula(monkeypatch, block, window, softcap, sinks):
    """A cache of 24 slots in blocks of 10, or as a whole; the last 4 slots are empty and hold
    anything."""
    monkeypatch.setattr(module, "CACHE_BLOCK", block)
    q, k, v = draw(2, 90)
    positions, segments = packed_rows(2, 90)
    want = attention64(q, k, v, q, visible(positions, segments, window), 0.4, softcap, sinks)[0]
    before = [
        np.concatenate([x[:, :20], np.full_like(x[:, :4], 7)], axis=1)
        for x in (k, v, positions, segments)
    ]
    before[3][:, 20:] = 0
    cached = CachedKeys(
        before[0].transpose(0, 2, 3, 1), before[1].transpose(0, 2, 1, 3), *before[2:]
    )
    keys = Keys(*(x[:, 20:] for x in (k, v, positions, segments)), None, sinks, cached)
    config = AttentionConfig(0.4, softcap)
    attend = jax.jit(lambda q, keys: attention(q, keys, window, config, PLAIN))
    ours = np.asarray(attend(q[:, 20:], keys))
    real = segments[:, 20:] > 0
    np.testing.assert_allclose(ours[real], want[:, 20:][real], atol=2e-6)
    assert np.isfinite(ours).all()  # padding too: its values are multiplied by 0 later


def test_memory_of_a_long_sequence_is_linear_and_the_upper_triangle_is_skipped():
    def compiled(seq, gradient=True):
        q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(2, seq))
        row = jax.ShapeDtypeStruct((1, seq), jnp.int32)

        def loss(q, k, v, *places):
            return jnp.sum(attention(q, Keys(k, v, *places), FAR, AttentionConfig(0.4), PLAIN))

        return (
            jax.jit(jax.grad(loss, (0, 1, 2)) if gradient else loss)
            .lower(q, k, v, row, row)
            .compile()
        )

    memory = [compiled(seq).memory_analysis().temp_size_in_bytes for seq in (2048, 4096)]
    assert memory[1] < 2.3 * memory[0]
    flops = compiled(256, False).cost_analysis()["flops"]
    products = 2 * 2 * 2 * 6 * 256 * 256 * 8
    assert flops < 0.8 * products + 20 * 2 * 6 * 256 * 256  # the masks and the softmax, generously


def test_dropout_keeps_the_mean_and_needs_its_key():
    q, k, v = draw(2, 16)
    keys = Keys(k, v, np.arange(16, dtype=np.int32)[None], np.ones((1, 16), np.int32))
    config = AttentionConfig(0.4, dropout=0.3)
    still = attention(q, keys, FAR, config, PLAIN)
    np.testing.assert_array_equal(still, attention(q, keys, FAR, AttentionConfig(0.4), PLAIN))
    drop = jax.jit(jax.vmap(lambda key: attention(q, keys, FAR, config, PLAIN, dropout_rng=key)))
    many = drop(jax.random.split(jax.random.key(0), 300))
    assert np.abs(many[0] - still).max() > 0.1
    np.testing.assert_allclose(many.mean(0), still, atol=0.3)


# ---------------------------------------------------------------- whole rows


# 300 tokens are more than the kernels' gradient takes at a time.
@pytest.mark.parametrize(("seq", "kind"), [(37, "all"), (300, "causal"), (37, "masked")])
def test_whole_rows_equal_the_formula(seq, kind, numerics):
    rng = np.random.default_rng(seq)
    q, k, v, g = (
        jnp.asarray(rng.normal(size=(2, seq, 2, 8)), jnp.bfloat16).astype("float32") for _ in "qkvg"
    )
    mask, causal = rng.random((2, seq)) < 0.7 if kind == "masked" else None, kind == "causal"
    seen = np.ones((2, seq, seq), bool) if mask is None else np.repeat(mask[:, None], seq, axis=1)
    out, _, *gradients = attention64(q, k, v, g, np.tril(seen) if causal else seen, 0.3)

    def run(numerics, q, k, v, g):
        def of(*x):
            return full_attention(*x, numerics, scale=0.3, mask=mask, causal=causal)

        y, pull = jax.vjp(of, q, k, v)
        return y, *pull(g)

    made = jax.jit(run, static_argnums=0)
    for precision, tolerance in (("float32", 2e-6), ("bfloat16", 0.02)):
        for found, want in zip(
            made(numerics(precision), q, k, v, g), (out, *gradients), strict=True
        ):
            np.testing.assert_allclose(found, want, atol=tolerance * np.abs(want).max(), rtol=0)
