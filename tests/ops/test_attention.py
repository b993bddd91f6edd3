"""Attention against a float64 loop, block by block, cached, capped, windowed, packed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.ops import attention as module
from nalora_jax.ops.attention import AttentionConfig, CachedKeys, Keys, attention
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


def test_shared_layout_may_have_one_row():
    q, k, v = draw(20)
    positions, segments = np.arange(20, dtype=np.int32)[None], np.ones((1, 20), np.int32)
    one = attention(q, Keys(k, v, positions, segments), 6, AttentionConfig(0.4), PLAIN)
    wide = [np.repeat(x, BATCH, axis=0) for x in (positions, segments)]
    np.testing.assert_array_equal(one, attention(q, Keys(k, v, *wide), 6, AttentionConfig(0.4), PLAIN))


@pytest.mark.parametrize("window", [FAR, 6])
def test_cached_keys_equal_one_run(window):
    q, k, v = draw(30)
    positions = np.tile(np.arange(30, dtype=np.int32), (BATCH, 1))
    segments = np.ones_like(positions)
    sinks = jnp.asarray(SINKS)
    whole = attention(q, Keys(k, v, positions, segments), window, AttentionConfig(0.4), PLAIN, sinks=sinks)
    # The cache has room to spare: slots of segment 0 that hold anything.
    spare = [np.concatenate([x[:, :20], np.full_like(x[:, :4], 7)], axis=1) for x in (k, v, positions)]
    empty = np.concatenate([segments[:, :20], np.zeros_like(segments[:, :4])], axis=1)
    new = Keys(*(x[:, 20:] for x in (k, v, positions, segments)))
    k, v = spare[0].transpose(0, 2, 3, 1), spare[1].transpose(0, 2, 1, 3)
    cached = CachedKeys(k, v, spare[2], empty)
    ours = attention(q[:, 20:], new, window, AttentionConfig(0.4), PLAIN, cached=cached, sinks=sinks)
    np.testing.assert_allclose(ours, whole[:, 20:], atol=2e-6)


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


@pytest.mark.parametrize(  # one block, three, the most there are
    ("seq", "softcap"), [(40, 2.0), (150, 0.0), (150, 2.0), (600, 2.0)]
)
def test_gradients_are_autodiffs(seq, softcap):
    q, k, v = draw(seq)
    positions, segments = layout(seq)
    config = AttentionConfig(0.4, softcap)

    def gradients(attend):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attend(q, k, v)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    ours = gradients(lambda q, k, v: attention(q, Keys(k, v, positions, segments), 40, config, PLAIN))
    want = gradients(lambda q, k, v: dense(q, k, v, positions, segments, 40, config))
    for a, b in zip(ours, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


SINKS = np.array([-2.0, 0.5, 3.0, -1e4, 20.0, 1.0], np.float32)  # one that loses little, one that takes all


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


@pytest.mark.parametrize("seq", [40, 150])  # a native kernel keeps no result of rows of 40
def test_gradients_with_sinks_are_autodiffs(seq, numerics):
    q, k, v = draw(seq)
    positions, segments = layout(seq)
    sinks = jnp.asarray(SINKS)

    def gradients(attend):
        def loss(q, k, v, sinks):
            return jnp.sum(jnp.where(segments[..., None, None] > 0, jnp.sin(attend(q, k, v, sinks)), 0.0))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, sinks)

    def ours(of):
        config = AttentionConfig(0.4)
        attend = lambda q, k, v, s: attention(q, Keys(k, v, positions, segments), 40, config, of, sinks=s)  # noqa: E731
        return gradients(attend)

    want = gradients(lambda q, k, v, s: dense(q, k, v, positions, segments, 40, AttentionConfig(0.4), s))
    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.03)):
        got = ours(numerics(precision))
        for a, b in zip(got[:3], want[:3], strict=True):
            assert np.abs(np.asarray(a, np.float32) - b).max() <= tolerance * np.abs(b).max()
        assert not np.any(got[3])  # sinks are frozen


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


def test_what_is_saved_in_bf16_costs_its_rounding_only(numerics):
    q, k, v = draw(100)
    keys = Keys(k, v, *layout(100))

    def gradients(dtype):
        def loss(q, k, v):
            chosen = numerics(residual=dtype)
            return jnp.sum(
                jnp.sin(attention(q, keys._replace(k=k, v=v), FAR, AttentionConfig(0.4), chosen))
            )

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    for a, b in zip(gradients("bfloat16"), gradients("float32"), strict=True):
        assert 0 < np.abs(a - b).max() < 0.03 * np.abs(b).max()


@pytest.mark.parametrize(
    ("seq", "batch", "heads", "kv_heads", "dim"),
    [
        *[(seq, 8, 9, 3, 64) for seq in (1, 8, 64, 65, 128, 200)],
        *[(seq, 1, 8, 1, 128) for seq in (1, 65)],
        *[(seq, 2, 4, 4, 64) for seq in (8, 200)],
        *[(seq, 1, 1, 1, 8) for seq in (64, 128)],
    ],
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


def test_dropout_in_blocks_recomputes_the_same(monkeypatch):
    q, k, v = draw(150)
    positions, segments = layout(150)

    def gradients():  # a new function each time: jit would keep the first program
        def loss(q, k, v):
            keys, rng = Keys(k, v, positions, segments), jax.random.key(3)
            config = AttentionConfig(0.4, dropout=0.3)
            return jnp.sum(jnp.sin(attention(q, keys, FAR, config, PLAIN, dropout_rng=rng)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    saved = gradients()
    monkeypatch.setattr(module, "_RECOMPUTE_FROM", 64)
    for a, b in zip(saved, gradients(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


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


def test_low_precision_operands_stay_close():
    q, k, v = draw(64)
    positions, segments = layout(64)
    exact = attention(q, Keys(k, v, positions, segments), FAR, AttentionConfig(0.4), PLAIN)
    rounded = attention(q, Keys(k, v, positions, segments), FAR, AttentionConfig(0.4), Numerics("bfloat16"))
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.05)
