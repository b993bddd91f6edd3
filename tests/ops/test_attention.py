"""Attention against its formula in float64, block by block, cached, capped, windowed, packed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.ops import attention as module
from nalora_jax.ops.attention import AttentionConfig, CachedKeys, Keys, attention, full_attention
from nalora_jax.ops.dispatch import Numerics, Platform, numerics_for
from tests.ops.in_float64 import attention64, packed_rows, visible

BATCH, HEADS, KV_HEADS, DIM = 2, 6, 2, 8
FAR = 2**30
PLAIN = Numerics()
SEVERAL = Platform("cpu", "", 8)  # devices: what a CPU runs without native kernels


def draw(seq: int):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(BATCH, seq, HEADS, DIM))
    k, v = rng.normal(size=(2, BATCH, seq, KV_HEADS, DIM))
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


SINKS = np.array([-2.0, 0.5, 3.0, -1e4, 20.0, 1.0], np.float32)  # one that loses little, one that takes all


@pytest.mark.parametrize(
    ("seq", "window", "softcap", "sinks"),
    [(24, FAR, 1.5, None), (150, 7, 0.0, None), (150, 70, 1.5, SINKS), (24, 7, 1.5, SINKS)],
)
def test_equals_the_formula(seq, window, softcap, sinks, numerics):
    q, k, v = draw(seq)
    positions, segments = packed_rows(BATCH, seq)
    config = AttentionConfig(0.4, softcap)
    want = attention64(q, k, v, q, visible(positions, segments, window), 0.4, softcap, sinks)[0]
    keys = Keys(k, v, positions, segments, sinks=None if sinks is None else jnp.asarray(sinks))
    attend = jax.jit(lambda q, of: attention(q, keys, window, config, of), static_argnums=1)
    np.testing.assert_allclose(attend(q, numerics()), want, atol=2e-6)
    seen = segments > 0  # what padding gets is nobody's
    rounded = attend(q, numerics("bfloat16", result="float32"))
    np.testing.assert_allclose(rounded[seen], want[seen], atol=0.05)


@pytest.mark.parametrize(
    ("block", "window", "softcap", "sinks"),
    [(10, FAR, 0.0, None), (10, 7, 1.5, SINKS), (1024, 7, 1.5, SINKS)],
)
def test_blocks_of_a_cache_equal_the_formula(monkeypatch, block, window, softcap, sinks):
    """A cache of 24 slots in blocks of 10, or as a whole; the last 4 slots are empty and hold anything."""
    monkeypatch.setattr(module, "CACHE_BLOCK", block)
    q, k, v = draw(90)
    positions, segments = packed_rows(BATCH, 90)
    want = attention64(q, k, v, q, visible(positions, segments, window), 0.4, softcap, sinks)[0]
    before = [
        np.concatenate([x[:, :20], np.full_like(x[:, :4], 7)], axis=1) for x in (k, v, positions, segments)
    ]
    before[3][:, 20:] = 0
    cached = CachedKeys(before[0].transpose(0, 2, 3, 1), before[1].transpose(0, 2, 1, 3), *before[2:])
    keys = Keys(*(x[:, 20:] for x in (k, v, positions, segments)), None, sinks, cached)
    config = AttentionConfig(0.4, softcap)
    attend = jax.jit(lambda q, keys: attention(q, keys, window, config, PLAIN))
    ours = np.asarray(attend(q[:, 20:], keys))
    real = segments[:, 20:] > 0
    np.testing.assert_allclose(ours[real], want[:, 20:][real], atol=2e-6)
    assert np.isfinite(ours).all()  # padding too: its values are multiplied by 0 later


@pytest.mark.parametrize(  # one block, of which a native kernel keeps no result; five, in pieces
    ("seq", "softcap", "sinks"), [(40, 0.0, SINKS), (150, 2.0, None)]
)
def test_gradients_are_those_of_the_formula(seq, softcap, sinks, numerics, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 16 if seq == 150 else 256)
    q, k, v = draw(seq)
    positions, segments = packed_rows(BATCH, seq)
    config, real = AttentionConfig(0.4, softcap), (segments > 0)[..., None, None]
    given = visible(positions, segments, 40), 0.4, softcap, sinks
    result = attention64(q, k, v, q, *given)[0]
    want = attention64(q, k, v, np.where(real, np.cos(result), 0.0), *given)[2:]
    sinks = jnp.zeros(HEADS) if sinks is None else jnp.asarray(sinks)

    def loss(q, k, v, s, of):
        keys = Keys(k, v, positions, segments, sinks=None if given[3] is None else s)
        out = attention(q, keys, 40, config, of)
        return jnp.sum(jnp.where(real, jnp.sin(out), 0.0))

    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.03)):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), static_argnums=4)
        *got, of_sinks = gradient(q, k, v, sinks, numerics(precision))
        for a, b in zip(got, want, strict=True):
            assert np.abs(np.asarray(a, np.float32) - b).max() <= tolerance * np.abs(b).max()
        assert not np.any(of_sinks)  # they are frozen


def test_memory_of_a_long_sequence_is_linear_and_the_upper_triangle_is_skipped():
    def compiled(seq, gradient=True):
        q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(seq))
        row = jax.ShapeDtypeStruct((1, seq), jnp.int32)

        def loss(q, k, v, *places):
            return jnp.sum(attention(q, Keys(k, v, *places), FAR, AttentionConfig(0.4), PLAIN))

        return jax.jit(jax.grad(loss, (0, 1, 2)) if gradient else loss).lower(q, k, v, row, row).compile()

    memory = [compiled(seq).memory_analysis().temp_size_in_bytes for seq in (2048, 4096)]
    assert memory[1] < 2.3 * memory[0]
    flops = compiled(256, False).cost_analysis()["flops"]
    products = 2 * 2 * BATCH * HEADS * 256 * 256 * DIM
    assert flops < 0.8 * products + 20 * BATCH * HEADS * 256 * 256  # the masks and the softmax, generously


@pytest.mark.parametrize(
    ("seq", "batch", "heads", "kv_heads", "dim"),
    [(1, 8, 9, 3, 64), (65, 1, 8, 1, 128)],
)
def test_bf16_products_run_at_every_shape(seq, batch, heads, kv_heads, dim):
    # XLA:CPU folds a transposed operand or result into a product, and knows few of those that come of it in bf16.
    rng = np.random.default_rng(seq)
    q = rng.normal(size=(batch, seq, heads, dim)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, seq, kv_heads, dim)).astype(np.float32)
    positions, segments = np.arange(seq, dtype=np.int32)[None], np.ones((1, seq), np.int32)

    def gradients(dtype):
        chosen, config = numerics_for(dtype, SEVERAL), AttentionConfig(dim**-0.5)

        def loss(q, k, v):
            return jnp.sum(jnp.sin(attention(q, Keys(k, v, positions, segments), FAR, config, chosen)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for low, high in zip(gradients("bfloat16"), gradients("float32"), strict=True):
        assert np.abs(low - high).max() < 0.05 * max(1.0, np.abs(high).max())


def test_dropout_keeps_the_mean_and_needs_its_key():
    q, k, v = draw(16)
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
        for found, want in zip(made(numerics(precision), q, k, v, g), (out, *gradients), strict=True):
            np.testing.assert_allclose(found, want, atol=tolerance * np.abs(want).max(), rtol=0)
