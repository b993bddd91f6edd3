"""Accelerator kernels against the plain path: the TPU kernel interpreted, the GPU one by what it is given."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.models.config import GLOBAL_WINDOW
from nalora_jax.ops import attention_gpu
from nalora_jax.ops.attention import AttentionConfig, Keys, attention
from nalora_jax.ops.attention_gpu import compiles
from nalora_jax.ops.attention_tpu import block_sizes, computed_pairs
from nalora_jax.ops.dispatch import Numerics, Platform, numerics_for
from nalora_jax.ops.storage import SAVED
from tests.ops.in_float64 import packed_rows

FAR = 2**30
SEQ, HEADS, KV_HEADS, DIM = 256, 4, 2, 64


def operands(batch: int):
    rng = np.random.default_rng(0)
    q, g = rng.normal(size=(2, batch, SEQ, HEADS, DIM)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, SEQ, KV_HEADS, DIM)).astype(np.float32)
    return q, k, v, g, *packed_rows(batch, SEQ)


def values_and_gradients(
    implementation: str, window: int, config: AttentionConfig, batch: int = 2, sinks=None, **dtypes: str
):
    q, k, v, g, *places = operands(batch)
    numerics = Numerics(**dtypes, implementation=implementation)

    @jax.jit
    def run(q, k, v, window):
        def attend(q, k, v):
            return attention(q, Keys(k, v, *places, None, sinks), window, config, numerics)

        out, back = jax.vjp(attend, q, k, v)
        return out, *back(g.astype(out.dtype))

    return run(q, k, v, jnp.int32(window))


MESH = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
SHARDING = NamedSharding(MESH, P(("data", "fsdp"), None, None))


@pytest.mark.parametrize(
    ("name", "window", "windows", "softcap", "sharding"),
    [
        ("splash", FAR, (FAR,), 0.0, None),
        ("splash", 40, (40, FAR), 1.5, SHARDING),
        ("triton", FAR, (FAR,), 0.0, SHARDING),
    ],
)
def test_kernels_equal_the_plain_function(name, window, windows, softcap, sharding):
    config = AttentionConfig(0.125, softcap, windows=windows, sharding=sharding, interpret=True)
    sinks = jnp.linspace(-2.0, 3.0, HEADS) if len(windows) > 1 else None
    ours, plain = (values_and_gradients(of, window, config, 4, sinks) for of in (name, "xla"))
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_layer_that_saves_products_does_not_run_splash_again():
    config = AttentionConfig(0.125, windows=(FAR,), sharding=SHARDING, interpret=True)
    q, k, v, _, *places = operands(4)

    def layer(q, k, v):
        return jnp.sin(attention(q, Keys(k, v, *places), FAR, config, Numerics(implementation="splash")))

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
    sizes = block_sizes(seq, window, head_dim)
    block = sizes["block_q"]
    assert seq % block == 0
    assert block % 128 == 0
    assert block == 128 or (4 * block <= seq and 2 * block <= window)
    assert block * head_dim <= 1024 * 128
    assert ("block_q_dq" in sizes) != sizes.get("use_fused_bwd_kernel", False)
    if window < seq or seq > 8192:  # sums of queries' gradients would be as many as blocks
        assert "use_fused_bwd_kernel" not in sizes
    if seq <= 2048:
        q, k = np.mgrid[:seq, :seq]
        seen = (k <= q) & (k > q - window)
        blocks = seen.reshape(seq // block, block, seq // block, block).any(axis=(1, 3))
        assert computed_pairs(seq, window, head_dim) == blocks.sum() * block**2


def test_cudnn_with_sinks_equals_the_plain_function(monkeypatch):
    """Results and gradients, with JAX's own function on its XLA implementation in place of cuDNN."""
    shapes = []
    monkeypatch.setattr(attention_gpu, "compiles", lambda q, k, *_: shapes.append((q, k)) or True)

    def in_float32(q, k, v, visible, scale):
        return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], scale=scale, is_causal=True)

    monkeypatch.setattr(attention_gpu, "dot_product", in_float32)
    sinks = jnp.array([-2.0, 0.5, 3.0, 20.0])  # the last one takes all
    half = {"operand": "bfloat16", "residual": "float32"}
    ours, plain = (
        values_and_gradients(name, 40, AttentionConfig(0.125), sinks=sinks, **options)
        for name, options in (("cudnn", half), ("xla", {}))
    )
    assert shapes == [((2, SEQ + 2, HEADS, DIM + 8), (2, SEQ + 2, KV_HEADS, DIM + 8))]
    without = values_and_gradients("xla", 40, AttentionConfig(0.125))
    for array, expected, other in zip(ours, plain, without, strict=True):
        np.testing.assert_allclose(array, expected, atol=2e-4)
        assert np.max(np.abs(expected - other)) > 0.1


H100 = {"seq": 16384, "kind": "NVIDIA H100 80GB HBM3"}  # where visibility as an array has 512 MB a row


@pytest.mark.parametrize(
    ("platform", "changes", "expected"),
    [
        ("cpu", {}, ""),
        ("gpu", {}, "cudnn"),
        ("gpu", {"dtype": "float32"}, "triton"),
        ("gpu", {"dtype": "float32", "named": "cudnn"}, ""),
        ("gpu", {"softcap": 2.0}, ""),
        ("gpu", {"seq": 255}, ""),
        ("gpu", {"dropout": True}, ""),
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
    of = {"seq": 256, "kind": "", "devices": 1, "named": "auto", "dtype": "bfloat16", "windows": (FAR,)}
    of |= {"softcap": 0.0, "dropout": False} | changes
    monkeypatch.setattr(attention_gpu, "compiles", lambda *_: True)
    asked = []
    monkeypatch.setattr(attention_gpu, "dot_product", lambda q, *_, **__: asked.append("cudnn") or q)
    q, k = (jax.ShapeDtypeStruct((1, of["seq"], heads, DIM), jnp.bfloat16) for heads in (HEADS, KV_HEADS))
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
    half = {"operand": "bfloat16", "residual": "bfloat16"}
    ours, plain = (
        values_and_gradients(name, 40, AttentionConfig(0.125), **half) for name in ("cudnn", "xla")
    )
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=0.1)
