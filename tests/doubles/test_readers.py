"""Whatever else reads devices, on the double of every machine."""

from __future__ import annotations

import jax
import pytest

from nalora_jax.cli import doctor
from nalora_jax.config import MeshConfig
from nalora_jax.layout import distributed
from nalora_jax.layout.distributed import platform_of
from nalora_jax.study.execution import peak_bytes
from nalora_jax.train.machine import describe_device, peak_memory
from tests.doubles.machines import NAMES, machine


@pytest.fixture(params=NAMES)
def devices(request, monkeypatch):
    """The devices of a machine, which JAX gives to process 0."""
    found = machine(request.param)
    local = [device for device in found if device.process_index == 0]
    monkeypatch.setattr(jax, "devices", lambda *_: list(found))
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: local)
    return found


def test_the_doctor_and_the_log_name_the_devices(devices):
    shown, problems = doctor._devices()
    kind = devices[0].device_kind
    assert shown["platform"] == devices[0].platform
    assert shown["devices"] == f"{len(devices)} ({kind})"
    assert problems == []
    assert describe_device() == f"{len(devices)} x {devices[0].platform} ({kind})"


def test_the_peak_of_memory_is_of_local_devices(devices, monkeypatch):
    local = jax.local_devices()
    for index, device in enumerate(local):
        monkeypatch.setattr(device, "memory_stats", lambda index=index: {"peak_bytes_in_use": 1000 + index})
    assert peak_memory()["peak_device_memory"] == 1000 + len(local) - 1
    assert peak_bytes() == 1000 + len(local) - 1


def test_a_step_is_compiled_for_the_platform_of_its_mesh(devices):
    nodes = 1 + max(device.true_domain for device in devices)
    mesh = distributed.make_mesh(MeshConfig(data=nodes, fsdp=-1))
    platform = platform_of(mesh)
    assert (platform.name, platform.kind, platform.devices) == (
        devices[0].platform,
        devices[0].device_kind,
        mesh.size,
    )
    prefixes = {name.split("_")[1] for name in distributed.compiler_options(mesh)}
    if platform.name == "gpu":
        assert prefixes == {"gpu"}
    else:
        assert bool(prefixes) == (mesh.shape["fsdp"] > 1)
