"""Accelerator kernels against the plain path: the TPU kernel interpreted, the GPU one by what it is given."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.nn import attention_kernels
from nalora_jax.nn.attention import Keys, Scoring, attention, visibility
from nalora_jax.nn.attention_kernels import Kernel, choose, dot_product

FAR = 2**30
SEQ, HEADS, KV_HEADS, DIM = 256, 4, 2, 64


def operands(batch: int):
    rng = np.random.default_rng(0)
    q, g = rng.normal(size=(2, batch, SEQ, HEADS, DIM)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, SEQ, KV_HEADS, DIM)).astype(np.float32)
    rows = [[100, 80, 60, 16], [20, 236]]
    segments = [np.repeat([1, 2, 3, 0], rows[0]), np.repeat([0, 1], rows[1])]
    positions = [np.concatenate([np.arange(n) for n in row]) for row in rows]
    layout = (np.resize(np.array(x, np.int32), (batch, SEQ)) for x in (positions, segments))
    return q, k, v, g, *layout


def values_and_gradients(kernel: Kernel, window: int, scoring: Scoring, batch: int = 2):
    q, k, v, g, positions, segments = operands(batch)

    @jax.jit
    def run(q, k, v, window):
        out, back = jax.vjp(
            lambda q, k, v: attention(q, Keys(k, v, positions, segments), window, scoring, kernel=kernel), q, k, v
        )
        return out, *back(g)

    return run(q, k, v, jnp.int32(window))


@pytest.mark.parametrize(
    ("window", "windows", "softcap"), [(FAR, (FAR,), 0.0), (40, (40, FAR), 1.5), (FAR, (40, FAR), 0.0)]
)
def test_splash_equals_the_plain_path(window, windows, softcap):
    scoring = Scoring(0.125, softcap)
    ours = values_and_gradients(Kernel("splash", windows, interpret=True), window, scoring)
    plain = values_and_gradients(Kernel("xla"), window, scoring)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_splash_on_a_mesh_equals_the_plain_path():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    sharding = NamedSharding(mesh, P(("data", "fsdp"), None, None))
    kernel = Kernel("splash", (40, FAR), sharding, interpret=True)
    ours = values_and_gradients(kernel, 40, Scoring(0.125), batch=4)
    plain = values_and_gradients(Kernel("xla"), 40, Scoring(0.125), batch=4)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("window", [FAR, 40])
def test_what_cudnn_is_given_equals_the_plain_path(window):
    """The same call of JAX's own function, on its XLA implementation."""
    q, k, v, _, positions, segments = operands(2)
    visible = visibility(positions, segments, positions, segments, window)
    ours = dot_product(q, k, v, visible, Scoring(0.125), "xla")
    np.testing.assert_allclose(ours, values_and_gradients(Kernel("xla"), window, Scoring(0.125))[0], atol=1e-5)


HALF = Scoring(0.125, operand="bfloat16")


@pytest.mark.parametrize(
    ("platform", "seq", "scoring", "plain_only", "expected"),
    [
        ("cpu", 256, HALF, False, "xla"),
        ("gpu", 256, HALF, False, "cudnn"),
        ("gpu", 256, Scoring(0.125), False, "xla"),  # float32
        ("gpu", 256, Scoring(0.125, 2.0, "bfloat16"), False, "xla"),  # capped scores
        ("gpu", 255, HALF, False, "xla"),
        ("gpu", 256, HALF, True, "xla"),  # cached keys, dropout
        ("tpu", 256, HALF, False, "splash"),
        ("tpu", 256, Scoring(0.125, 2.0), False, "splash"),
        ("tpu", 200, HALF, False, "xla"),
        ("tpu", 256, HALF, True, "xla"),
    ],
)
def test_platform_chooses(monkeypatch, platform, seq, scoring, plain_only, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(attention_kernels, "_cudnn_compiles", lambda *_: True)
    q, k = jnp.zeros((1, seq, HEADS, DIM)), jnp.zeros((1, seq, KV_HEADS, DIM))
    keys = Keys(k, k, jnp.zeros((1, seq), int), jnp.zeros((1, seq), int))
    assert choose(Kernel(), q, keys, scoring, plain_only=plain_only) == expected
    if platform == "tpu":  # several devices and no sharding to map the kernel over
        monkeypatch.setattr(jax, "device_count", lambda: 8)
        assert choose(Kernel(), q, keys, scoring, plain_only=plain_only) == "xla"


def test_a_gpu_whose_cudnn_refuses_gets_xla(caplog):
    """There is no cuDNN here, so that the probe fails as it would on an old GPU."""
    probe = functools.partial(attention_kernels._cudnn_compiles, (1, 8, 4, 64), (1, 8, 2, 64))
    assert not probe(HALF)
    assert "XLA's is used" in caplog.text
    caplog.clear()
    assert not probe(HALF)
    assert not caplog.text  # once


@pytest.mark.accelerator
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU with cuDNN")
def test_cudnn_equals_the_plain_path():
    ours = values_and_gradients(Kernel("cudnn"), 40, HALF)
    plain = values_and_gradients(Kernel("xla"), 40, HALF)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=0.1)
