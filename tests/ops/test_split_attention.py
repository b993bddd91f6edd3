"""Attention of split rows against whole rows: the plain function and the TPU kernel, interpreted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.config import MeshConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.decoder import run_starts, sampled_as_whole
from nalora_jax.ops.attention import AttentionConfig, Keys, attention
from nalora_jax.ops.dispatch import Numerics, Platform, register_all
from nalora_jax.ops.reductions import sampled, sampled_weights
from nalora_jax.ops.split_attention import split_attention
from nalora_jax.ops.split_rows import Row, block_length, joined, padded, shards_of, split
from tests.ops.in_float64 import packed_rows

FAR = 2**30
SEQ, HEADS, KV_HEADS, DIM = 510, 4, 2, 64  # padded to 512: blocks of 128 on two shards
SHARDING = distributed.row_sharding(distributed.make_mesh(MeshConfig(2, 1, 2, 2), jax.devices()))


def operands() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    q, g = rng.normal(size=(2, 2, SEQ, HEADS, DIM)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, SEQ, KV_HEADS, DIM)).astype(np.float32)
    return q, k, v, g, *packed_rows(2, SEQ)


def results(implementation: str, window: int, config: AttentionConfig, **options: Any) -> tuple[Any, ...]:
    """Returns the result of real tokens and the gradients, of whole or of split rows."""
    q, k, v, g, positions, segments = operands()
    numerics, starts = Numerics(implementation=implementation), options.pop("starts", None)
    if window == 150:  # gradients are summed differently there
        numerics = replace(numerics, platform=Platform("tpu", "TPU v5 lite", 8))
    parts = partial(split, sharding=config.sharding)

    def whole(q: Any, k: Any, v: Any) -> Any:
        keys = Keys(k, v, positions, segments, starts, options.get("sinks"))
        return attention(q, keys, window, config, numerics)

    def of_parts(q: Any, k: Any, v: Any) -> Any:
        integers = (
            None if x is None else padded(x, config.sharding) for x in (positions, segments, starts)
        )
        heads = tuple(map(parts, (q, k, v)))
        out = split_attention(heads, Row(*integers), window, config, numerics, **options)
        return joined(out, config.sharding, SEQ)

    @jax.jit
    def run(q: Any, k: Any, v: Any) -> Any:
        out, back = jax.vjp(whole if shards_of(config.sharding) == 1 else of_parts, q, k, v)
        real = (segments > 0)[..., None, None]
        return jnp.where(real, out, 0), *back(g * real)

    return tuple(run(q, k, v))


@pytest.mark.parametrize(
    ("implementation", "window", "windows"),
    [("xla", 40, (40, FAR)), ("splash", 150, (40, 150)), ("triton", 40, (40, FAR))],
)
def test_split_rows_attend_as_whole_rows(implementation, window, windows, monkeypatch):
    if implementation != "xla":
        register_all()
        monkeypatch.setattr(split_attention, "plain", None)  # the kernel supports the arguments
    sinks = jnp.linspace(-2.0, 3.0, HEADS)
    config = partial(AttentionConfig, 0.125, 1.5, windows=windows, interpret=True)
    ours = results(implementation, window, config(sharding=SHARDING), sinks=sinks)
    for one, other in zip(ours, results("xla", window, config(), sinks=sinks), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_tokens_of_an_image_that_shards_divide_see_each_other():
    *_, positions, segments = operands()
    places = (np.arange(SEQ) // 60 % 2 == 1)[None] & (segments > 0)
    starts = np.asarray(run_starts(jnp.asarray(places), jnp.asarray(positions), jnp.asarray(segments)))
    config = partial(AttentionConfig, 0.125, windows=(FAR,))
    ours, whole = (results("xla", FAR, config(sharding=place), starts=starts) for place in (SHARDING, None))
    for one, other in zip(ours, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("seq", "strides"), [(1024, (16, 64)), (500, (4, 5))])
def test_positions_are_sampled_as_of_whole_rows(seq, strides):
    """The positions with weight in samples of the parts; strides may exceed a block's positions."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.uniform(size=(2, seq)) < 0.7, jnp.float32)
    places = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.float32), weights.shape)
    parts, config = partial(split, sharding=SHARDING), GateStatsConfig(*strides)
    taken = jax.jit(lambda w: sampled_as_whole(w, config, block_length(seq, 2), parts))(weights)
    for own, stride, inner in zip((taken.gate, taken.probe), strides, taken.strides, strict=True):
        values = (sampled(x[..., None], own, inner)[..., 0] for x in (parts(places) + 1, own))
        ours = np.sort(np.asarray(jnp.prod(jnp.stack(list(values)), axis=0)).ravel())
        expected = np.sort(np.asarray(sampled_weights(weights, stride) * (places + 1)).ravel())
        np.testing.assert_array_equal(ours[ours > 0], expected[expected > 0])


def test_rows_shorter_than_their_blocks_are_refused():
    message = "--mesh.context: expected at most 3 for rows of 7 tokens.*found 4"
    with pytest.raises(NaloraError, match=message):
        block_length(7, 4)
