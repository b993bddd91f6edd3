"""Rows of a batch on meshes whose devices are not in the order of their processes, as those of TPU pods are not."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.config import MeshConfig
from nalora_jax.layout import distributed
from tests.doubles.machines import V5E, V5P, V6E, tpu

# Kind and shape of a slice; axes data, fsdp and tensor.
MESHES = [
    (V5E, (4, 4, 1), (1, 16, 1)),
    (V6E, (16, 16, 1), (4, 32, 2)),
    (V5P, (8, 8, 16), (4, 64, 4)),
]


@pytest.mark.parametrize(("kind", "shape", "sizes"), MESHES, ids=str)
def test_every_row_of_a_pod_s_batch_is_read_once(kind, shape, sizes):
    mesh = distributed.make_mesh(MeshConfig(*sizes), tpu(*kind, shape))
    data, fsdp, tensor = sizes
    rows = 2 * data * fsdp
    held = distributed.rows_of_processes(mesh, rows)
    assert set(held) == {device.process_index for device in mesh.devices.flat}
    assert all(len(of_process) == len(set(of_process)) for of_process in held.values())
    # Every device's two rows are among those of its process, and a process reads no others.
    for part, (d, f) in enumerate(np.ndindex(data, fsdp)):
        holders = {device.process_index for device in mesh.devices[d, f]}
        assert {p for p, mine in held.items() if 2 * part in mine and 2 * part + 1 in mine} == holders
    if tensor == 1:
        np.testing.assert_array_equal(np.sort(np.concatenate(list(held.values()))), np.arange(rows))


@pytest.mark.parametrize("accumulate", [None, 3])
def test_rows_go_to_their_devices_in_any_order_of_devices(accumulate):
    devices = np.array(jax.devices())[[5, 0, 3, 6, 1, 7, 2, 4]].reshape(2, 2, 2)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    lead = () if accumulate is None else (accumulate,)
    batch = {"tokens": np.random.default_rng(0).integers(0, 99, (*lead, 8, 6))}
    placed = distributed.make_global_batch(batch, mesh, rows_axis=len(lead))["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    expected = jax.device_put(
        batch["tokens"], NamedSharding(mesh, P(*[None] * len(lead), ("data", "fsdp")))
    )
    for one, other in zip(placed.addressable_shards, expected.addressable_shards, strict=True):
        assert one.device == other.device
        np.testing.assert_array_equal(one.data, other.data)
