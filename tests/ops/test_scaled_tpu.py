"""The TPU's matmul with blocks, interpreted, against the plain one, and what rematerialized layers
keep."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nalora_jax.ops import scaled_tpu
from nalora_jax.ops.dispatch import Numerics, Platform, numerics_for
from nalora_jax.ops.quantize import quantize
from nalora_jax.ops.scaled import Scaled, Scaling
from nalora_jax.ops.storage import dot, matmul

FORMATS = {
    "DeepSeek's fp8": Scaling("e4m3", (128, 128)),
    "fp8 in wide blocks": Scaling("e5m2", (256, 384), "bfloat16"),
    "fp8 with powers of two": Scaling("e4m3", (128, 128), "e8m0"),
    "fp8, one column of blocks": Scaling("e4m3", (128, 0)),
    "int8 in groups": Scaling("int8", (128, 1), "bfloat16", "bfloat16"),
}


def random_kernel(scaling: Scaling, shape: tuple[int, int]) -> Scaled:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 30, shape)
    if scaling.element == "int8":
        codes = np.clip(np.round(values), -127, 127).astype(np.int8)
    else:
        kind = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[scaling.element]
        codes = values.astype(kind).view(np.uint8)
    scales: Any = rng.uniform(0.001, 0.01, scaling.blocks(shape)).astype(np.float32)
    if scaling.scale == "e8m0":
        scales = rng.integers(118, 122, scales.shape).astype(np.uint8)
    else:
        scales = jnp.asarray(scales, scaling.scale)
    return Scaled(jnp.asarray(codes), jnp.asarray(scales), None, None, None, scaling=scaling)


@pytest.fixture
def on_tpu(monkeypatch: pytest.MonkeyPatch) -> Numerics:
    """Numerics of one TPU, whose kernel is interpreted."""
    compiled = scaled_tpu.block_matmul

    def interpreted(*args: Any, **options: Any) -> jax.Array:
        return compiled(*args, **options, interpret=True)

    monkeypatch.setattr(scaled_tpu, "block_matmul", interpreted)
    return numerics_for("bfloat16", "tpu")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 24, 1100])
def test_products_and_gradients_are_the_plain_ones(name, rows, on_tpu):
    kernel = random_kernel(FORMATS[name], (768, 384))
    assert scaled_tpu.supports_blocks(kernel)
    x = jax.random.normal(jax.random.key(0), (rows, 768), jnp.bfloat16)
    g = jax.random.normal(jax.random.key(1), (rows, 384), jnp.bfloat16)
    plain = replace(on_tpu, implementation="xla")
    results = []
    for numerics in (on_tpu, plain):
        y, back = jax.vjp(lambda x, numerics=numerics: matmul(x, kernel, numerics), x)
        assert y.dtype == jnp.bfloat16
        results.append((y, *back(g)))
    for ours, theirs in zip(*results, strict=True):
        # sums in another order, rounded to bf16
        scale = np.abs(np.asarray(theirs, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(ours, np.float32),
            np.asarray(theirs, np.float32),
            rtol=2**-7,
            atol=2e-3 * scale,
        )


def test_sums_are_in_float32(on_tpu):
    """A product in float32 agrees beyond bf16."""
    kernel = random_kernel(FORMATS["DeepSeek's fp8"], (1536, 256))
    x = jax.random.normal(jax.random.key(0), (16, 1536), jnp.bfloat16)
    expected = x.astype(jnp.float32) @ kernel.expand(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(dot(x, kernel, on_tpu), expected, rtol=1e-4, atol=1e-3)


def test_the_kernel_is_chosen_where_it_applies():
    scaling = FORMATS["DeepSeek's fp8"]
    numerics = numerics_for("bfloat16", "tpu")
    many = numerics_for("bfloat16", Platform("tpu", devices=8))
    wide = numerics_for("float32", "tpu")
    x = jax.ShapeDtypeStruct((16, 512), jnp.bfloat16)

    def calls_kernel(kernel: Scaled, numerics: Numerics) -> bool:
        program = jax.make_jaxpr(lambda x: matmul(x, kernel, numerics))(x)
        return "pallas_call" in str(program)

    kernel = random_kernel(scaling, (512, 256))
    assert calls_kernel(kernel, numerics)
    assert not calls_kernel(kernel, many)
    assert not calls_kernel(kernel, wide)
    assert not calls_kernel(kernel, replace(numerics, implementation="xla"))
    others = {
        "scales of channels, which XLA fuses": (Scaling("e4m3", (0, 1)), (512, 256)),
        "a block at the edge": (Scaling("e4m3", (384, 128)), (512, 256)),
        "narrow blocks": (Scaling("e4m3", (64, 128)), (512, 256)),
        "outputs that fill no register": (scaling, (512, 192)),
        "rounded to float16": (Scaling("int8", (128, 1), "float16", "float16"), (512, 256)),
    }
    for name, (other, shape) in others.items():
        assert not calls_kernel(random_kernel(other, shape), numerics), name


@pytest.mark.parametrize("kind", ["nf4", "mxfp4", "NVFP4"])
def test_a_rematerialized_scan_keeps_no_array_of_a_kernel_s_size(kind):
    """Broadcast levels were its constants, 16 arrays in float32: 6.4 GB in a program for an H100."""
    layers, shape = 3, (256, 384)
    weights = np.random.default_rng(0).normal(0, 1, (layers, *shape)).astype(np.float32)
    if kind == "NVFP4":
        codes = np.random.default_rng(1).integers(0, 256, (layers, 128, 384)).astype(np.uint8)
        scales = jnp.ones((layers, 16, 384), jnp.bfloat16)
        scaling = Scaling("e2m1", (16, 1), "bfloat16")
        kernel: Any = Scaled(jnp.asarray(codes), scales, None, None, None, scaling=scaling)
    else:
        kernel = quantize(jnp.asarray(weights), kind)
    numerics = numerics_for("bfloat16", "gpu")

    def loss(x: jax.Array) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, kernel: Any) -> tuple[jax.Array, None]:
            return matmul(x, kernel, numerics)[:, :256], None

        return jax.lax.scan(layer, x, kernel)[0].astype(jnp.float32).sum()

    program = jax.make_jaxpr(jax.grad(loss))(jnp.ones((4, 256), jnp.bfloat16))
    largest = 0
    for equation in program.eqns:
        if equation.primitive.name != "scan":
            sizes = [math.prod(output.aval.shape) for output in equation.outvars]
            largest = max([largest, *sizes])
    assert largest < math.prod(shape)
