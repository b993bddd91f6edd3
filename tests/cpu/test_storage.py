"""bf16 arrays as their bits: views that share memory, on one device and on several, and what is left alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.cpu.storage import Bits, view_bits
from nalora_jax.ops.dispatch import Platform, numerics_for
from nalora_jax.ops.storage import matmul, prepare, take_rows

SEVERAL = numerics_for("bfloat16", Platform("cpu", "", 8))  # devices, where no kernel is native


def _params() -> dict:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    up = {"kernel": draw(2, 16, 32), "bias": draw(2, 32)}
    ffn = {"up_proj": up, "router": {"kernel": draw(2, 16, 4)}}
    return {"layers": {"ffn": ffn}, "embed": {"embedding": draw(40, 16)}}


def _pointers(array: jax.Array) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


@pytest.mark.parametrize("tables", [True, False])
def test_views_share_memory_and_stand_for_the_same_numbers(tables):
    params = _params()
    prepared = prepare({"params": params, "lora": {}}, SEVERAL, tables=tables)
    assert prepared.keys() == {"params", "lora"}
    found, given = prepared["params"]["layers"]["ffn"], params["layers"]["ffn"]
    kernel = found["up_proj"]["kernel"]
    assert isinstance(kernel, Bits)
    assert _pointers(kernel.bits) == _pointers(given["up_proj"]["kernel"])
    np.testing.assert_array_equal(kernel.expand(), given["up_proj"]["kernel"])
    assert found["router"]["kernel"] is given["router"]["kernel"]
    assert isinstance(prepared["params"]["embed"]["embedding"], Bits) == tables


def test_views_of_sharded_arrays_are_sharded_alike():
    mesh = jax.make_mesh((8,), ("fsdp",))
    array = jax.device_put(
        _params()["layers"]["ffn"]["up_proj"]["kernel"], NamedSharding(mesh, P(None, "fsdp"))
    )
    view = view_bits(array)
    assert view.bits.sharding == array.sharding
    assert _pointers(view.bits) == _pointers(array)
    np.testing.assert_array_equal(jax.jit(lambda view: view.expand())(view), array)


def test_scanned_kernels_give_the_same_bits():
    kernel = _params()["layers"]["ffn"]["up_proj"]["kernel"]
    x, view = jax.random.normal(jax.random.key(0), (3, 16)), view_bits(kernel)

    @jax.jit
    def through(stack: object) -> jax.Array:
        return jax.lax.scan(lambda c, k: (c, matmul(x, k, SEVERAL)), 0, stack)[1]

    np.testing.assert_array_equal(through(view), through(kernel))


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_of_a_table(axis):
    table, rows = _params()["embed"]["embedding"], jnp.array([3, 0, 3])
    for held in (table, view_bits(table)):
        np.testing.assert_array_equal(
            take_rows(held, rows, SEVERAL, axis), jnp.take(table, rows, axis=axis)
        )


def test_what_is_prepared_and_floats_are_left_alone():
    floats = jax.tree.map(lambda x: x.astype(jnp.float32), _params())
    for given in (prepare({"params": _params()}, SEVERAL), {"params": floats}):
        for one, other in zip(*map(jax.tree.leaves, (given, prepare(given, SEVERAL))), strict=True):
            assert one is other
