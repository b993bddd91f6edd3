"""Rows of a batch on meshes whose devices are not in the order of their processes, as those of TPU pods are not."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax import distributed
from nalora_jax.distributed.batches import rows_by_process

# What the TPU compiler says of real topologies (make_topologies.py).
MESHES = json.loads(Path(__file__).with_name("topologies.json").read_text())


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh['topology']}-{'x'.join(map(str, mesh['sizes']))}")
def test_every_row_of_a_pod_s_batch_is_read_once(mesh):
    data, fsdp, tensor = mesh["sizes"]
    processes = np.array(mesh["processes"]).reshape(data, fsdp, tensor)
    rows = 2 * data * fsdp
    found = rows_by_process(processes, rows)
    assert set(found) == set(mesh["processes"])
    assert all(len(held) == len(set(held)) for held in found.values())
    # Every device's own two rows are among those of its process, and a process reads no others.
    for part, (d, f) in enumerate(np.ndindex(data, fsdp)):
        holders = {int(p) for p in processes[d, f]}
        assert {p for p, held in found.items() if 2 * part in held and 2 * part + 1 in held} == holders
    if tensor == 1:
        np.testing.assert_array_equal(np.sort(np.concatenate(list(found.values()))), np.arange(rows))


def test_the_example_of_the_docstring():
    (mesh,) = (mesh for mesh in MESHES if mesh["topology"] == "v6e:16x16" and mesh["sizes"] == [1, 256, 1])
    found = rows_by_process(np.array(mesh["processes"]).reshape(1, 256, 1), 256)
    assert found[0].tolist() == [0, 1, 16, 17]


@pytest.mark.parametrize("accumulate", [None, 3])
def test_rows_go_to_their_devices_in_any_order_of_devices(accumulate):
    devices = np.array(jax.devices())[[5, 0, 3, 6, 1, 7, 2, 4]].reshape(2, 2, 2)
    mesh = Mesh(devices, distributed.AXES, axis_types=(AxisType.Auto,) * 3)
    lead = () if accumulate is None else (accumulate,)
    batch = {"tokens": np.random.default_rng(0).integers(0, 99, (*lead, 8, 6))}
    placed = distributed.make_global_batch(batch, mesh, rows_axis=len(lead))["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    expected = jax.device_put(batch["tokens"], NamedSharding(mesh, P(*[None] * len(lead), ("data", "fsdp"))))
    for one, other in zip(placed.addressable_shards, expected.addressable_shards, strict=True):
        assert one.device == other.device
        np.testing.assert_array_equal(one.data, other.data)
