"""Layouts of runs on devices, simulated and abstract."""

from __future__ import annotations

import jax
import pytest

from nalora_jax.cli.planning.auto import laid_out
from nalora_jax.cli.planning.models import architecture
from nalora_jax.config import DataConfig, MeshConfig, RunConfig, TrainConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout.machines import of_devices
from tests.doubles.machines import machine


@pytest.mark.parametrize(
    ("name", "chip", "dims", "slices"),
    [
        ("v5litepod-256", "v5e", (16, 16, 1), 1),
        ("v5p-2048", "v5p", (8, 8, 16), 1),
        ("2 x v6e-16", "v6e", (4, 4, 1), 2),
        ("2 x 8 H100", "h100", (2, 8), 1),
        ("2 x 8 H100, a process a GPU", "h100", (2, 8), 1),
        ("2 x 8 A100", "a100-40", (2, 8), 1),
        ("8 A100 80GB", "a100-80", (1, 8), 1),
        ("L4", "l4", (1, 1), 1),
        ("GB200 NVL72", "gb200", (1, 72), 1),
    ],
)
def test_a_machine_is_recognised_by_its_devices(name, chip, dims, slices):
    where = of_devices(machine(name))
    assert where is not None
    assert (where.kind, where.dims, where.slices) == (chip, dims, slices)


def test_chips_without_a_data_sheet_are_left_alone():
    assert of_devices(machine("T4")) is None
    config = RunConfig(train=TrainConfig(batch_size=4))
    assert laid_out(config, architecture("llama-3.1-8b"), machine("T4")) == config


def test_a_pod_s_run_is_laid_out_by_what_fits():
    config = RunConfig(train=TrainConfig(batch_size=256), data=DataConfig(max_length=4096))
    found = laid_out(config, architecture("llama-3.1-8b"), machine("v6e-256"))
    assert found.mesh == MeshConfig(256, 1, 1)
    assert found.compute.remat == "dots"
    fixed = laid_out(
        RunConfig(train=config.train, data=config.data, mesh=MeshConfig(fsdp=64)),
        architecture("llama-3.1-8b"),
        machine("v6e-256"),
    )
    assert fixed.mesh == MeshConfig(4, 64, 1)
    with pytest.raises(NaloraError, match=r"to fit in 16\.40 GB a chip"):
        laid_out(config, architecture("llama-3.1-70b"), machine("v5litepod-16")[:4])


def test_cpus_take_the_simplest_mesh():
    assert of_devices(jax.devices()) is None
    found = laid_out(RunConfig(), architecture("llama-3.1-8b"))
    assert found == RunConfig()  # left open: `make_mesh` takes the simplest mesh
