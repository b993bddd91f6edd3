"""Attention kernels of accelerators and attention of split rows, against the plain function on
whole rows.

The TPU kernel and Triton's are interpreted, cuDNN's is tested by what it is given.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.config import MeshConfig
from nalora_jax.mesh import distributed
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.config import GLOBAL_WINDOW
from nalora_jax.models.decoder import run_starts, whole_row_weights
from nalora_jax.ops import attention_gpu
from nalora_jax.ops.attention import AttentionConfig, Keys, attention, self_attention
from nalora_jax.ops.attention_gpu import compiles
from nalora_jax.ops.attention_tpu import block_sizes, computed_pairs
from nalora_jax.ops.dispatch import Numerics, Platform, numerics_for, register_all
from nalora_jax.ops.reductions import sample_positions, sampled_weights
from nalora_jax.ops.split_attention import split_attention
from nalora_jax.ops.split_rows import (
    Row,
    block_length,
    join_parts,
    pad_to_blocks,
    shards_of,
    split_parts,
)
from nalora_jax.ops.storage import SAVED
from tests.ops.in_float64 import packed_rows

FAR, PLAIN = 2**30, Numerics(implementation="xla")
HEADS, KV_HEADS, DIM = 4, 2, 64
WHOLE, SPLIT = (
    distributed.row_sharding(distributed.make_mesh(mesh))
    for mesh in (MeshConfig(2, 2, 2), MeshConfig(2, 1, 2, 2))
)


def operands(batch: int, seq: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    q, g = rng.normal(size=(2, batch, seq, HEADS, DIM)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, seq, KV_HEADS, DIM)).astype(np.float32)
    return q, k, v, g, *packed_rows(batch, seq)


def results(
    numerics: Numerics,
    window: int,
    config: AttentionConfig,
    *,
    batch=2,
    seq=256,
    starts=None,
    sinks=None,
) -> tuple[jax.Array, ...]:
    """Returns the result of real tokens and the gradients, of whole rows or of rows that the
    sharding splits."""
    q, k, v, g, *places = operands(batch, seq)
    real = (places[1] > 0)[..., None, None]

    def whole(window, *heads):
        return attention(
            heads[0], Keys(*heads[1:], *places, starts, sinks), window, config, numerics
        )

    def in_parts(window, *heads):
        row = Row(
            *(None if x is None else pad_to_blocks(x, config.sharding) for x in (*places, starts))
        )
        parts = tuple(split_parts(x, config.sharding) for x in heads)
        out = split_attention(parts, row, window, config, numerics, sinks=sinks)
        return join_parts(out, config.sharding, seq)

    @jax.jit
    def run(window, *heads):
        attend = partial(whole if shards_of(config.sharding) == 1 else in_parts, window)
        out, back = jax.vjp(attend, *heads)
        return jnp.where(real, out, 0), *back((g * real).astype(out.dtype))

    return run(jnp.int32(window), q, k, v)


@pytest.mark.parametrize(
    ("name", "sharding", "window", "windows"),
    [
        ("splash", None, FAR, (FAR,)),
        ("splash", WHOLE, 40, (40, FAR)),
        ("triton", WHOLE, FAR, (FAR,)),
        ("xla", SPLIT, 40, (40, FAR)),
        ("splash", SPLIT, 150, (40, 150)),
        ("triton", SPLIT, 40, (40, FAR)),
    ],
)
def test_kernels_and_split_rows_equal_the_plain_function(
    name, sharding, window, windows, monkeypatch
):
    """With several windows also with a soft cap and sinks."""
    softcap, sinks = (1.5, jnp.linspace(-2.0, 3.0, HEADS)) if len(windows) > 1 else (0.0, None)
    config = partial(AttentionConfig, 0.125, softcap, windows=windows, interpret=True)
    # Split rows are padded to 512: blocks of 128 on two shards.
    given = {"batch": 4, "seq": 510 if sharding is SPLIT else 256, "sinks": sinks}
    plain = results(PLAIN, window, config(), **given)
    if name != "xla":
        register_all()
        for operation in (self_attention, split_attention):
            monkeypatch.setattr(operation, "plain", None)  # the kernel supports the arguments
    # Of these chips split gradients are summed differently.
    platform = Platform("tpu", "TPU v5 lite", 8) if window == 150 else Platform()
    numerics = Numerics(implementation=name, platform=platform)
    ours = results(numerics, window, config(sharding=sharding), **given)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_tokens_of_an_image_that_shards_divide_see_each_other():
    positions, segments = packed_rows(2, 510)
    places = (np.arange(510) // 60 % 2 == 1)[None] & (segments > 0)
    starts = np.asarray(run_starts(*map(jnp.asarray, (places, positions, segments))))
    ours, whole = (
        results(
            PLAIN, FAR, AttentionConfig(0.125, windows=(FAR,), sharding=of), seq=510, starts=starts
        )
        for of in (SPLIT, None)
    )
    for one, other in zip(ours, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("seq", "strides"), [(1024, (16, 64)), (500, (4, 5))])
def test_positions_are_sampled_as_of_whole_rows(seq, strides):
    """The positions with weight in samples of the parts; strides may exceed a block's positions."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.uniform(size=(2, seq)) < 0.7, jnp.float32)
    places = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.float32), weights.shape)
    parts, config = partial(split_parts, sharding=SPLIT), GateStatsConfig(*strides)
    taken = jax.jit(lambda w: whole_row_weights(w, config, block_length(seq, 2), parts))(weights)
    for own, stride, inner in zip((taken.gate, taken.probe), strides, taken.strides, strict=True):
        values = (
            sample_positions(x[..., None], own, inner)[..., 0] for x in (parts(places) + 1, own)
        )
        ours = np.sort(np.asarray(jnp.prod(jnp.stack(list(values)), axis=0)).ravel())
        expected = np.sort(np.asarray(sampled_weights(weights, stride) * (places + 1)).ravel())
        np.testing.assert_array_equal(ours[ours > 0], expected[expected > 0])


def test_a_layer_that_saves_products_does_not_run_splash_again():
    config = AttentionConfig(0.125, windows=(FAR,), sharding=WHOLE, interpret=True)
    q, k, v, _, *places = operands(4, 256)

    def layer(q, k, v):
        return jnp.sin(
            attention(q, Keys(k, v, *places), FAR, config, Numerics(implementation="splash"))
        )

    def forward_runs(policy) -> int:
        loss = jax.checkpoint(layer, policy=policy)
        gradient = jax.jit(jax.value_and_grad(lambda *x: jnp.sum(loss(*x)), argnums=(0, 1, 2)))
        program = gradient.lower(q, k, v).compile().as_text().splitlines()
        # The interpreted kernel is a loop.
        return sum(" while(" in line and "splash_mha_fwd" in line for line in program)

    once = forward_runs(jax.checkpoint_policies.save_only_these_names(SAVED))
    assert forward_runs(jax.checkpoint_policies.nothing_saveable) == 2 * once > 0


@pytest.mark.parametrize("seq", [384, 2048, 32768])
@pytest.mark.parametrize(("window", "head_dim"), [(40, 64), (1024, 128), (GLOBAL_WINDOW, 256)])
def test_blocks_divide_the_row_and_their_pairs_are_counted(seq, window, head_dim):
    block = block_sizes(seq, window, head_dim)["block_q"]
    assert seq % block == 0
    assert block % 128 == 0
    assert block * head_dim <= 1024 * 128
    if seq <= 2048:
        q, k = np.mgrid[:seq, :seq]
        seen = (k <= q) & (k > q - window)
        blocks = seen.reshape(seq // block, block, seq // block, block).any(axis=(1, 3))
        assert computed_pairs(seq, window, head_dim) == blocks.sum() * block**2


def test_cudnn_with_sinks_equals_the_plain_function(monkeypatch):
    """Results and gradients, with JAX's own function on its XLA implementation in place of
    cuDNN."""
    shapes = []
    monkeypatch.setattr(attention_gpu, "compiles", lambda q, k, *_: shapes.append((q, k)) or True)

    def in_float32(q, k, v, visible, scale):
        return jax.nn.dot_product_attention(
            q, k, v, mask=visible[:, None], scale=scale, is_causal=True
        )

    monkeypatch.setattr(attention_gpu, "dot_product", in_float32)
    sinks = jnp.array([-2.0, 0.5, 3.0, 20.0])  # the last one takes all
    cudnn, config = (
        Numerics("bfloat16", residual="float32", implementation="cudnn"),
        AttentionConfig(0.125),
    )
    ours, plain = (results(numerics, 40, config, sinks=sinks) for numerics in (cudnn, PLAIN))
    assert shapes == [((2, 258, HEADS, DIM + 8), (2, 258, KV_HEADS, DIM + 8))]
    without = results(PLAIN, 40, config)
    for array, expected, other in zip(ours, plain, without, strict=True):
        np.testing.assert_allclose(array, expected, atol=2e-4)
        assert np.max(np.abs(expected - other)) > 0.1


H100 = {
    "seq": 16384,
    "kind": "NVIDIA H100 80GB HBM3",
}  # where visibility as an array has 512 MB a row


@pytest.mark.parametrize(
    ("platform", "changes", "expected"),
    [
        ("cpu", {}, ""),
        ("gpu", {}, "cudnn"),
        ("gpu", {"dtype": "float32"}, "triton"),
        ("gpu", {"dtype": "float32", "named": "cudnn"}, ""),
        ("gpu", {"softcap": 2.0}, ""),
        ("gpu", {"seq": 255}, ""),
        ("gpu", H100, "triton"),
        ("gpu", H100 | {"named": "cudnn"}, "cudnn"),
        ("gpu", H100 | {"windows": (4096, FAR)}, ""),  # in blocks, without visibility as an array
        ("tpu", {}, "splash"),
        ("tpu", {"devices": 8}, ""),  # without a sharding to map the kernel over
        ("tpu", {"named": "xla"}, ""),
        ("tpu", {"softcap": 2.0}, "splash"),
        ("tpu", {"seq": 200}, ""),
        ("tpu", {"dropout": True}, ""),
    ],
)
def test_the_numerics_platform_chooses(monkeypatch, platform, changes, expected):
    """Whatever this machine has: the program is traced for the platform of its mesh."""
    of = {
        "seq": 256,
        "kind": "",
        "devices": 1,
        "named": "auto",
        "dtype": "bfloat16",
        "windows": (FAR,),
    }
    of |= {"softcap": 0.0, "dropout": False} | changes
    monkeypatch.setattr(attention_gpu, "compiles", lambda *_: True)
    asked = []
    monkeypatch.setattr(
        attention_gpu, "dot_product", lambda q, *_, **__: asked.append("cudnn") or q
    )
    q, k = (
        jax.ShapeDtypeStruct((1, of["seq"], heads, DIM), jnp.bfloat16)
        for heads in (HEADS, KV_HEADS)
    )
    row = jax.ShapeDtypeStruct((1, of["seq"]), jnp.int32)
    numerics = numerics_for(of["dtype"], Platform(platform, of["kind"], of["devices"]), of["named"])
    config = AttentionConfig(0.125, of["softcap"], 0.1, windows=of["windows"])
    rng = jax.random.key(0) if of["dropout"] else None

    def run(q, k, row):
        return attention(q, Keys(k, k, row, row), FAR, config, numerics, dropout_rng=rng)

    program = str(jax.make_jaxpr(run)(q, k, row))
    kernels = {"splash": "splash_mha", "triton": "mha_forward"}
    asked += [name for name, kernel in kernels.items() if kernel in program]
    assert asked == ([expected] if expected else [])


def test_a_gpu_whose_cudnn_refuses_gets_xla(caplog):
    """There is no cuDNN here, so that the probe fails as it would on an old GPU."""
    for _ in range(2):
        assert not compiles((1, 8, 4, 64), (1, 8, 2, 64), 0.125, "NVIDIA H100 80GB HBM3")
    assert caplog.text.count("XLA's is used") == 1


@pytest.mark.accelerator
@pytest.mark.skipif(jax.devices()[0].platform != "gpu", reason="needs a GPU with cuDNN")
def test_cudnn_equals_the_plain_function():
    half = partial(Numerics, operand="bfloat16", residual="bfloat16")
    ours, plain = (
        results(half(implementation=name), 40, AttentionConfig(0.125)) for name in ("cudnn", "xla")
    )
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=0.1)
