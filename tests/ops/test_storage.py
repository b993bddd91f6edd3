"""Frozen matmuls against float64 in every implementation, roundings, and bf16 as its bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.errors import NaloraError
from nalora_jax.mesh.distributed import platform_of
from nalora_jax.ops.dispatch import Platform, numerics_for
from nalora_jax.ops.storage import (
    Bits,
    matmul,
    prepare,
    round_and_save,
    round_to,
    take_rows,
    view_bits,
)

SEVERAL = numerics_for("bfloat16", Platform("cpu", "", 8))  # devices, where no kernel is native
RNG = np.random.default_rng(0)


def exact(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.bfloat16), np.float64)


# Few rows are not native everywhere.
@pytest.mark.parametrize(("result", "rows"), [("float32", 3), ("float32", 40), ("bfloat16", 40)])
def test_low_precision_rounds_operands_and_accumulates_in_float32(result, rows, numerics):
    x, kernel, g = (
        jnp.asarray(RNG.normal(size=s), jnp.float32) for s in [(2, rows, 16), (16, 8), (2, rows, 8)]
    )
    half = numerics("bfloat16", result=result)
    value, back = jax.vjp(lambda x: matmul(x, kernel.astype(jnp.bfloat16), half), x)
    near = 1e-5 if result == "float32" else 1e-2
    assert value.dtype == result
    np.testing.assert_allclose(np.float64(value), exact(x) @ exact(kernel), rtol=near, atol=near)
    (dx,) = back(g.astype(result))
    assert dx.dtype == jnp.float32
    np.testing.assert_allclose(dx, exact(g) @ exact(kernel).T, rtol=1e-5, atol=1e-5)
    # float32, and no gradient of a frozen kernel
    value, back = jax.vjp(lambda *of: matmul(*of, numerics()), x, kernel)
    np.testing.assert_allclose(value, x @ kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(back(g)[0], g @ kernel.T, rtol=1e-5, atol=1e-6)
    assert not np.any(back(g)[1])


def test_the_platform_is_the_meshs():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4])
    assert platform_of(mesh) == Platform("cpu", "cpu", 4, 2)
    assert platform_of().devices == 8


def test_an_implementation_that_is_not_there_is_refused_by_name():
    with pytest.raises(NaloraError, match="compute.implementation.*auto, xla.*'fastest'"):
        numerics_for("bfloat16", "cpu", "fastest")
    with pytest.raises(NaloraError, match="'splash', which is for tpu"):
        numerics_for("bfloat16", "cpu", "splash")


def test_rounding_is_the_conversion_to_bf16_and_differentiable(numerics):
    ties = np.array(
        [1.00390625, 1.01171875, -1.00390625]
    )  # halfway between two bf16 numbers: to even
    edges = np.array(
        [0.0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 1e-39, np.finfo(np.float32).max]
    )
    bits = RNG.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    x = jnp.asarray(np.concatenate([ties, edges, bits[np.isfinite(bits)]]).astype(np.float32))
    got = jax.jit(lambda x: round_to(x, "bfloat16", numerics()))(x)
    want = np.asarray(x).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint16), want.view(np.uint16))
    assert np.isnan(
        round_to(jnp.asarray([np.nan, -np.nan]), "bfloat16", numerics()).astype(jnp.float32)
    ).all()
    slope = jax.grad(
        lambda x: jnp.sum(round_to(x, "bfloat16", numerics()).astype(jnp.float32) ** 2)
    )(x[:3])
    np.testing.assert_array_equal(slope, 2 * np.asarray(got[:3], np.float32))
    # What is saved for the backward pass passes the gradient on.
    value, back = jax.vjp(lambda x: round_and_save(x, numerics(residual="bfloat16")), x[:3])
    np.testing.assert_array_equal(value, got[:3].astype(jnp.float32))
    np.testing.assert_array_equal(back(x[:3])[0], x[:3])
    np.testing.assert_array_equal(round_and_save(x, numerics()), x)


def bf16_params() -> dict:
    draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.bfloat16)  # noqa: E731
    ffn = {
        "up_proj": {"kernel": draw(2, 16, 32), "bias": draw(2, 32)},
        "router": {"kernel": draw(2, 16, 4)},
    }
    return {"layers": {"ffn": ffn}, "embed": {"embedding": draw(40, 16)}}


def pointers(array: jax.Array) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


@pytest.mark.parametrize("tables", [True, False])
def test_views_share_memory_and_stand_for_the_same_numbers(tables):
    params = bf16_params()
    ffn = params["layers"]["ffn"]
    place = NamedSharding(jax.make_mesh((8,), ("fsdp",)), P(None, "fsdp"))
    stored = ffn["up_proj"]["kernel"] = jax.device_put(ffn["up_proj"]["kernel"], place)
    prepared = prepare({"params": params, "lora": {}}, SEVERAL, tables=tables)
    assert prepared.keys() == {"params", "lora"}
    kernel = prepared["params"]["layers"]["ffn"]["up_proj"]["kernel"]
    assert isinstance(kernel, Bits)
    assert (kernel.bits.sharding, pointers(kernel.bits)) == (stored.sharding, pointers(stored))
    np.testing.assert_array_equal(jax.jit(Bits.expand)(kernel), stored)
    assert prepared["params"]["layers"]["ffn"]["router"]["kernel"] is ffn["router"]["kernel"]
    assert isinstance(prepared["params"]["embed"]["embedding"], Bits) == tables
    # What is prepared, and floats, are left alone.
    floats = {"params": jax.tree.map(lambda x: x.astype(jnp.float32), params)}
    for held in (prepared, floats) if tables else (floats,):
        for one, other in zip(*map(jax.tree.leaves, (held, prepare(held, SEVERAL))), strict=True):
            assert one is other


def test_scanned_kernels_and_rows_of_tables_are_the_same_bits():
    params = bf16_params()
    kernel, table = params["layers"]["ffn"]["up_proj"]["kernel"], params["embed"]["embedding"]
    x, rows = jax.random.normal(jax.random.key(0), (3, 16)), jnp.array([3, 0, 3])

    def through(stack: object, table: object) -> list[jax.Array]:
        products = jax.lax.scan(lambda c, k: (c, matmul(x, k, SEVERAL)), 0, stack)[1]
        return [products, *(take_rows(table, rows, SEVERAL, axis) for axis in (0, 1))]

    views = jax.jit(through)(view_bits(kernel), view_bits(table))
    jax.tree.map(np.testing.assert_array_equal, views, jax.jit(through)(kernel, table))
    np.testing.assert_array_equal(views[1], np.asarray(table)[rows])
