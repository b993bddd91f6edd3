"""Meshes of a run on the double of every machine: their devices, rows of each process, and `nalora
plan`."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

from nalora_jax.config import DataConfig, MeshConfig, RunConfig, TrainConfig
from nalora_jax.errors import NaloraError
from nalora_jax.mesh import distributed
from nalora_jax.mesh.machine import peak_memory
from nalora_jax.models.config import ModelConfig
from nalora_jax.planner.layouts import choose_axes, fastest, fitting_layouts
from nalora_jax.planner.machines import describe_machine, topology
from tests import tiny
from tests.doubles.describe import FILE, digest
from tests.doubles.machines import NAMES, machine

DESCRIPTIONS = json.loads(FILE.read_text())
SMALL = ModelConfig.from_hf(tiny.GROUPED)
# Those of the pages, and an axis that takes what is left or stays within a node.
FORMS = (
    MeshConfig(),
    MeshConfig(fsdp=8),
    MeshConfig(2, -1),
    MeshConfig(1, -1),
    MeshConfig(tensor=2),
)


def run(mesh: MeshConfig, rows: int) -> RunConfig:
    return RunConfig(
        mesh=mesh, train=TrainConfig(batch_size=rows), data=DataConfig(max_length=1024)
    )


def fits(name: str, form: MeshConfig) -> bool:
    """Whether arithmetic alone allows the axes that have a size."""
    sizes, devices = (form.data, form.fsdp, form.tensor), machine(name)
    fixed = math.prod(size for size in sizes if size > 0)
    data = form.data or (1 if -1 in sizes else len(devices) // fixed)
    # Of a data-centre network: GPU nodes are none.
    slices = 1 + max(device.true_domain * (device.platform == "tpu") for device in devices)
    return len(devices) % fixed == 0 and data % slices == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_mesh_holds_every_device_or_names_the_axis(name):
    devices = machine(name)
    for form in FORMS:
        config = run(form, 2 * len(devices))
        if not fits(name, form):
            with pytest.raises(NaloraError, match=r"--mesh"):
                distributed.make_mesh(choose_axes(config, SMALL, devices).mesh, devices)
            continue
        mesh = distributed.make_mesh(choose_axes(config, SMALL, devices).mesh, devices)
        assert set(mesh.devices.flat) == set(devices)
        data, fsdp, tensor = mesh.devices.shape
        assert all(getattr(form, axis) in (0, -1, size) for axis, size in mesh.shape.items())
        # Only the axis data crosses slices, and tensor stays within a node.
        domain = np.vectorize(lambda device: device.true_domain)(mesh.devices).reshape(data, -1)
        if devices[0].platform == "tpu":
            assert all(len(set(part)) == 1 for part in domain)
        elif np.sum(domain == 0) % tensor == 0:
            assert all(len(set(heads)) == 1 for heads in domain.reshape(-1, tensor))
        # Every process reads the rows of its devices, and every row is read.
        rows = distributed.rows_of_processes(mesh, 2 * data * fsdp)
        assert set(rows) == {device.process_index for device in devices}
        assert set(np.concatenate(list(rows.values()))) == set(range(2 * data * fsdp))


@pytest.mark.parametrize(
    ("name", "planned"),
    [("v5p-2048", "v5p:8x8x16"), ("2 x v6e-16", "2xv6e:4x4"), ("2 x 8 H100, cyclic", "16xh100")],
)
def test_nalora_plan_and_training_choose_the_same_layout(name, planned):
    where, planned = describe_machine(machine(name)), topology(planned)
    assert where is not None
    assert (where.chip, where.size, where.slices) == (planned.chip, planned.size, planned.slices)
    config = run(MeshConfig(), 2 * where.size)
    found, expected = (
        fastest(fitting_layouts(config, SMALL, machine)) for machine in (where, planned)
    )
    assert found == expected


def test_a_sweep_with_a_run_a_device_compiles_a_program_of_one_device():
    """Kernels that the compiler cannot split (splash attention) run in it."""
    for mesh, devices in ((MeshConfig(run=8), 1), (MeshConfig(run=4, fsdp=2), 8)):
        mesh = distributed.make_mesh(mesh, machine("v6e-8"))
        assert distributed.platform_of_step(mesh).devices == devices


def test_the_peak_of_memory_is_of_local_devices(monkeypatch):
    local = [device for device in machine("2 x 8 H100") if device.process_index == 0]
    monkeypatch.setattr(jax, "local_devices", lambda: local)
    for index, device in enumerate(local):
        monkeypatch.setattr(
            device, "memory_stats", lambda index=index: {"peak_bytes_in_use": 1000 + index}
        )
    assert peak_memory()["peak_device_memory"] == 1000 + len(local) - 1


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_the_compilers_describe_the_same_devices(name):
    assert digest(machine(name)) == DESCRIPTIONS[name]
