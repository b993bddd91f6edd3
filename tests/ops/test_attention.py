"""Attention against a float64 loop, block by block, cached, capped, windowed, packed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.ops import attention as module
from nalora_jax.ops.attention import AttentionConfig, CachedKeys, Keys, attention, full_attention
from nalora_jax.ops.dispatch import Numerics, Platform, numerics_for

BATCH, HEADS, KV_HEADS, DIM = 2, 6, 2, 8
FAR = 2**30
PLAIN = Numerics()
SEVERAL = Platform("cpu", "", 8)  # devices: what a CPU runs without native kernels


def draw(seq: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(BATCH, seq, HEADS, DIM))
    k, v = rng.normal(size=(2, BATCH, seq, KV_HEADS, DIM))
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def plain(q, k, v, positions, segments, window, scale, softcap=0.0, sinks=None):
    """Every query on its own, in float64."""
    out = np.zeros(q.shape)
    for b, s, h in np.ndindex(*q.shape[:3]):
        kv = h // (HEADS // KV_HEADS)
        ahead = positions[b, s] - positions[b]
        seen = np.flatnonzero((segments[b] == segments[b, s]) & (ahead >= 0) & (ahead < window))
        scores = k[b, seen, kv].astype(np.float64) @ q[b, s, h].astype(np.float64) * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        lost = 0.0 if sinks is None else np.exp(sinks[h] - scores.max())
        out[b, s, h] = weights @ v[b, seen, kv].astype(np.float64) / (weights.sum() + lost)
    return out


def layout(seq: int):
    """Row 0: three segments and padding; row 1: left padding and one segment."""
    lengths = [[seq // 2, seq // 4, seq - seq // 2 - seq // 4 - 3, 3], [5, seq - 5]]
    segments = np.array([np.repeat([1, 2, 3, 0], lengths[0]), np.repeat([0, 1], lengths[1])])
    positions = np.array([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    return positions.astype(np.int32), segments.astype(np.int32)


@pytest.mark.parametrize(
    ("seq", "window", "softcap"),
    [(24, FAR, 1.5), (24, 7, 0.0), (150, FAR, 0.0), (150, 7, 1.5), (150, 70, 1.5)],
)
def test_equals_the_plain_loop(seq, window, softcap, numerics):
    q, k, v = draw(seq)
    positions, segments = layout(seq)
    keys, config = Keys(k, v, positions, segments), AttentionConfig(0.4, softcap)
    want = plain(q, k, v, positions, segments, window, 0.4, softcap)
    attend = jax.jit(attention, static_argnums=(3, 4))
    np.testing.assert_allclose(attend(q, keys, window, config, numerics()), want, atol=2e-6)
    seen = segments > 0  # what padding gets is nobody's
    rounded = attend(q, keys, window, config, numerics("bfloat16", result="float32"))
    np.testing.assert_allclose(rounded[seen], want[seen], atol=0.05)


SINKS = np.array([-2.0, 0.5, 3.0, -1e4, 20.0, 1.0], np.float32)  # one that loses little, one that takes all


@pytest.mark.parametrize(
    ("block", "window", "softcap", "sinks"),
    [(10, FAR, 0.0, None), (10, 7, 1.5, SINKS), (10, FAR, 1.5, SINKS), (1024, 7, 1.5, SINKS)],
)
def test_blocks_of_a_cache_equal_the_plain_loop(monkeypatch, block, window, softcap, sinks):
    """A cache of 24 slots in blocks of 10, or as a whole; the last 4 slots are empty and hold anything."""
    monkeypatch.setattr(module, "CACHE_BLOCK", block)
    q, k, v = draw(90)
    positions, segments = layout(90)
    want = plain(q, k, v, positions, segments, window, 0.4, softcap, sinks)
    before = [
        np.concatenate([x[:, :20], np.full_like(x[:, :4], 7)], axis=1) for x in (k, v, positions, segments)
    ]
    before[3][:, 20:] = 0
    cached = CachedKeys(before[0].transpose(0, 2, 3, 1), before[1].transpose(0, 2, 1, 3), *before[2:])
    keys = Keys(*(x[:, 20:] for x in (k, v, positions, segments)))
    ours = np.asarray(
        attention(q[:, 20:], keys, window, AttentionConfig(0.4, softcap), PLAIN, cached=cached, sinks=sinks)
    )
    real = segments[:, 20:] > 0
    np.testing.assert_allclose(ours[real], want[:, 20:][real], atol=2e-6)
    assert np.isfinite(ours).all()  # padding too: its values are multiplied by 0 later


def dense(q, k, v, positions, segments, window, config, sinks=None):
    """All scores at once, for autodiff."""
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * config.scale
    if config.softcap:
        scores = config.softcap * jnp.tanh(scores / config.softcap)
    ahead = positions[:, :, None] - positions[:, None, :]
    seen = (segments[:, :, None] == segments[:, None, :]) & (ahead >= 0) & (ahead < window)
    scores = jnp.where(seen[:, None], scores, -1e30)
    if sinks is not None:
        scores = jnp.concatenate(
            [scores, jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))], axis=-1
        )
    weights = jax.nn.softmax(scores)[..., : k.shape[1]]
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("seq", [24, 150])
def test_a_sink_takes_its_share_of_every_query(seq, numerics):
    q, k, v = draw(seq)
    positions, segments = layout(seq)
    keys, config = Keys(k, v, positions, segments), AttentionConfig(0.4, 1.5)
    want = plain(q, k, v, positions, segments, 7, 0.4, 1.5, SINKS)
    attend = jax.jit(
        lambda q, of: attention(q, keys, 7, config, of, sinks=jnp.asarray(SINKS)), static_argnums=1
    )
    np.testing.assert_allclose(attend(q, numerics()), want, atol=2e-6)
    rounded = attend(q, numerics("bfloat16", result="float32"))
    np.testing.assert_allclose(rounded[segments > 0], want[segments > 0], atol=0.05)


@pytest.mark.parametrize(  # one block, of which a native kernel keeps no result; three; the most there are
    ("seq", "softcap", "sinks"), [(40, 0.0, SINKS), (150, 0.0, SINKS), (150, 2.0, None), (600, 2.0, None)]
)
def test_gradients_are_autodiffs(seq, softcap, sinks, numerics):
    q, k, v = draw(seq)
    positions, segments = layout(seq)
    config, sinks = AttentionConfig(0.4, softcap), None if sinks is None else jnp.asarray(sinks)

    def gradients(attend):
        def loss(q, k, v, sinks):
            return jnp.sum(jnp.where(segments[..., None, None] > 0, jnp.sin(attend(q, k, v, sinks)), 0.0))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2) if sinks is None else (0, 1, 2, 3)))(q, k, v, sinks)

    def ours(of):
        return gradients(
            lambda q, k, v, s: attention(q, Keys(k, v, positions, segments), 40, config, of, sinks=s)
        )

    want = gradients(lambda q, k, v, s: dense(q, k, v, positions, segments, 40, config, s))
    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.03)):
        got = ours(numerics(precision))
        for a, b in zip(got[:3], want[:3], strict=True):
            assert np.abs(np.asarray(a, np.float32) - b).max() <= tolerance * np.abs(b).max()
        assert not np.any(got[3:])  # sinks are frozen


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_long_blocks_go_in_pieces(monkeypatch, softcap):
    q, k, v = draw(300)
    positions, segments = layout(300)
    weights = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def value_and_gradients():
        def loss(q, k, v):
            out = attention(q, Keys(k, v, positions, segments), 70, AttentionConfig(0.4, softcap), PLAIN)
            return jnp.sum(out * weights)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    whole = value_and_gradients()
    monkeypatch.setattr(module, "PIECE", 16)
    assert list(module.blocks(300)) == [
        *((start, start + 64) for start in (0, 64, 128, 192)),
        (256, 288),
        (288, 300),
    ]
    for one, other in zip(jax.tree.leaves(value_and_gradients()), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_memory_of_a_long_sequence_is_linear():
    def temporary(seq):
        x = jax.ShapeDtypeStruct((1, seq, 1, 8), jnp.float32)
        row = jax.ShapeDtypeStruct((1, seq), jnp.int32)

        def loss(q, k, v, positions, segments):
            return jnp.sum(attention(q, Keys(k, v, positions, segments), FAR, AttentionConfig(0.4), PLAIN))

        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, row, row).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.3 * temporary(4096)


@pytest.mark.parametrize(
    ("seq", "batch", "heads", "kv_heads", "dim"),
    [(1, 8, 9, 3, 64), (200, 8, 9, 3, 64), (65, 1, 8, 1, 128), (64, 1, 1, 1, 8)],
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


def test_the_upper_triangle_is_skipped():
    q, k, v = draw(256)
    keys = Keys(k, v, np.arange(256, dtype=np.int32)[None], np.ones((1, 256), np.int32))
    program = jax.jit(lambda q: attention(q, keys, FAR, AttentionConfig(0.4), PLAIN)).lower(q).compile()
    flops = program.cost_analysis()["flops"]
    products = 2 * 2 * BATCH * HEADS * 256 * 256 * DIM
    assert flops < 0.8 * products + 20 * BATCH * HEADS * 256 * 256  # the masks and the softmax, generously


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

SCALE = 0.3


def in_float64(q, k, v, g, mask, causal):
    """The result, and the gradients of q, k and v for its cotangent g; all ``[batch, seq, heads, head_dim]``."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    if mask is not None:
        scores = np.where(mask[:, None, None], scores, -np.inf)
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    of_weights = np.einsum("bqhd,bkhd->bhqk", g, v)
    slopes = weights * (of_weights - np.sum(weights * of_weights, axis=-1, keepdims=True)) * SCALE
    return (
        np.einsum("bhqk,bkhd->bqhd", weights, v),
        np.einsum("bhqk,bkhd->bqhd", slopes, k),
        np.einsum("bhqk,bqhd->bkhd", slopes, q),
        np.einsum("bhqk,bqhd->bkhd", weights, g),
    )


# 300 tokens are more than the kernels' gradient takes at a time.
@pytest.mark.parametrize("seq", [37, 300])
@pytest.mark.parametrize("kind", ["all", "causal", "masked"])
def test_whole_rows_equal_float64(seq, kind, numerics):
    rng = np.random.default_rng(seq)
    arrays = [
        jnp.asarray(rng.normal(size=(2, seq, 2, 8)), jnp.bfloat16).astype(jnp.float32) for _ in range(4)
    ]
    mask = rng.random((2, seq)) < 0.7 if kind == "masked" else None
    causal = kind == "causal"
    want = in_float64(*arrays, mask, causal)

    def run(numerics, q, k, v, g):
        def of(*x):
            return full_attention(*x, numerics, scale=SCALE, mask=mask, causal=causal)

        y, pull = jax.vjp(of, q, k, v)
        return y, *pull(g)

    made = jax.jit(run, static_argnums=0)
    for found, right in zip(made(numerics(), *arrays), want, strict=True):
        np.testing.assert_allclose(found, right, atol=2e-6 * np.abs(right).max(), rtol=0)
    for found, right in zip(made(numerics("bfloat16"), *arrays), want, strict=True):
        np.testing.assert_allclose(found, right, atol=0.02 * np.abs(right).max(), rtol=0)
