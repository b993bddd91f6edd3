"""Layouts of runs on devices, simulated and abstract."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from nalora_jax.config import DataConfig, MeshConfig, RunConfig, TrainConfig
from nalora_jax.errors import NaloraError
from nalora_jax.plan.auto import laid_out
from nalora_jax.plan.machines import of_devices
from nalora_jax.plan.models import architecture


def chips(kind: str, shape: tuple[int, ...], slices: int = 1):
    """Devices as JAX describes those of a TPU."""
    return [
        SimpleNamespace(device_kind=kind, coords=coords, slice_index=slice_index, process_index=0)
        for slice_index in range(slices)
        for coords in [(x, y, z) for x in range(shape[0]) for y in range(shape[1]) for z in range(shape[2])]
    ]


@pytest.mark.parametrize(
    ("kind", "shape", "slices", "chip"),
    [
        ("TPU v5 lite", (4, 8, 1), 1, "v5e"),
        ("TPU v6 lite", (16, 16, 1), 1, "v6e"),
        ("TPU v5", (4, 4, 4), 1, "v5p"),
        ("TPU v6 lite", (4, 4, 1), 2, "v6e"),
    ],
)
def test_a_machine_is_recognised_by_its_devices(kind, shape, slices, chip):
    where = of_devices(chips(kind, shape, slices))
    assert where is not None
    assert (where.kind, where.dims, where.slices) == (chip, shape, slices)


def test_gpus_are_counted_by_node():
    gpus = [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", process_index=i // 8) for i in range(16)]
    where = of_devices(gpus)
    assert where is not None
    assert (where.kind, where.dims) == ("h100", (2, 8))


def test_a_pod_s_run_is_laid_out_by_what_fits():
    config = RunConfig(train=TrainConfig(batch_size=256), data=DataConfig(max_length=4096))
    found = laid_out(config, architecture("llama-3.1-8b"), chips("TPU v6 lite", (16, 16, 1)))
    assert found.mesh == MeshConfig(256, 1, 1)
    assert found.compute.remat == "dots"
    fixed = laid_out(
        RunConfig(train=config.train, data=config.data, mesh=MeshConfig(fsdp=64)),
        architecture("llama-3.1-8b"),
        chips("TPU v6 lite", (16, 16, 1)),
    )
    assert fixed.mesh == MeshConfig(4, 64, 1)
    with pytest.raises(NaloraError, match="to fit in 17 GB a chip"):
        laid_out(config, architecture("llama-3.1-70b"), chips("TPU v5 lite", (2, 2, 1)))


def test_cpus_take_the_simplest_mesh():
    assert of_devices(jax.devices()) is None
    found = laid_out(RunConfig(), architecture("llama-3.1-8b"))
    assert found == RunConfig()  # left open: `make_mesh` takes the simplest mesh
