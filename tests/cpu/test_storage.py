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
    # What is prepared, and floats, are left alone.
    floats = {"params": jax.tree.map(lambda x: x.astype(jnp.float32), params)}
    for held in (prepared, floats) if tables else (floats,):
        for one, other in zip(*map(jax.tree.leaves, (held, prepare(held, SEVERAL))), strict=True):
            assert one is other


def test_views_of_sharded_arrays_are_sharded_alike():
    place = NamedSharding(jax.make_mesh((8,), ("fsdp",)), P(None, "fsdp"))
    array = jax.device_put(_params()["layers"]["ffn"]["up_proj"]["kernel"], place)
    view = view_bits(array)
    assert view.bits.sharding == array.sharding
    assert _pointers(view.bits) == _pointers(array)
    np.testing.assert_array_equal(jax.jit(lambda view: view.expand())(view), array)


def test_scanned_kernels_and_rows_of_tables_are_the_same_bits():
    params = _params()
    kernel, table = params["layers"]["ffn"]["up_proj"]["kernel"], params["embed"]["embedding"]
    x, rows = jax.random.normal(jax.random.key(0), (3, 16)), jnp.array([3, 0, 3])

    @jax.jit
    def through(stack: object, table: object) -> tuple[jax.Array, ...]:
        products = jax.lax.scan(lambda c, k: (c, matmul(x, k, SEVERAL)), 0, stack)[1]
        return products, *(take_rows(table, rows, SEVERAL, axis) for axis in (0, 1))

    views = through(view_bits(kernel), view_bits(table))
    jax.tree.map(np.testing.assert_array_equal, views, through(kernel, table))
    np.testing.assert_array_equal(views[1], np.asarray(table)[rows])
