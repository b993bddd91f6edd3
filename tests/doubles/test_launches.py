"""Every documented launch, on the double of every machine: mesh, rows of each process and plan."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from nalora_jax.cli.planning.program import architecture
from nalora_jax.config import DataConfig, MeshConfig, RunConfig, TrainConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.layout.layouts import fastest, fitting, laid_out
from nalora_jax.layout.machines import of_devices, topology
from nalora_jax.models.config import ModelConfig
from nalora_jax.train.machine import peak_memory
from tests.doubles.describe import FILE, digest
from tests.doubles.machines import NAMES, machine

ROOT = Path(__file__).parents[2]
DESCRIPTIONS = json.loads(FILE.read_text())
_FLAG = re.compile(r"--mesh(?:\.(data|fsdp|tensor)(?:\s+|=)(-?\d+)|\s+(auto))")
# Names by which `nalora plan` knows the machines, and the dimensions that training finds.
PLANNED = {
    "v5e-8, one host": "v5e:2x4",
    "v5e-8, two hosts": "v5e:2x4",
    "v5litepod-16": "v5e:4x4",
    "v6e-8": "v6e:2x4",
    "v6e-16": "v6e:4x4",
    "v6e-256": "v6e:16x16",
    "v5p-2048": "v5p:8x8x16",
    "2 x v6e-16": "2xv6e:4x4",
} | {name: f"{len(machine(name))}xh100" for name in NAMES if "H100" in name}
SMALL = ModelConfig.from_hf({
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False,
})  # fmt: skip


def _mesh(text: str) -> MeshConfig:
    return MeshConfig(**{axis: int(size) for axis, size, _ in _FLAG.findall(text) if axis})


def _documented() -> Iterator[MeshConfig]:
    """Meshes of README, docs and deploy files: of a line of a page, of all lines of a deploy file."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = [line for page in pages for line in page.read_text().replace("\\\n", " ").splitlines()]
    texts += [path.read_text() for path in sorted((ROOT / "deploy").rglob("*")) if path.is_file()]
    return (_mesh(text) for text in texts if _FLAG.search(text))


FORMS = sorted({*_documented(), MeshConfig(1, -1), MeshConfig(tensor=2)}, key=str)


def run(mesh: MeshConfig, rows: int) -> RunConfig:
    return RunConfig(mesh=mesh, train=TrainConfig(batch_size=rows), data=DataConfig(max_length=1024))


def laid(name: str, form: MeshConfig) -> Mesh:
    """The mesh of a training run with the flags ``form``."""
    devices = machine(name)
    config = laid_out(run(form, 2 * len(devices)), SMALL, devices)
    return distributed.make_mesh(config.mesh, devices)


def fits(name: str, form: MeshConfig) -> bool:
    """Whether arithmetic alone allows the axes that have a size."""
    sizes, devices = (form.data, form.fsdp, form.tensor), machine(name)
    fixed = math.prod(size for size in sizes if size > 0)
    data = form.data or (1 if -1 in sizes else len(devices) // fixed)
    # Of a data-centre network: GPU nodes are none.
    slices = 1 + max(device.true_domain * (device.platform == "tpu") for device in devices)
    return len(devices) % fixed == 0 and data % slices == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_documented_mesh_holds_every_device_or_names_the_axis(name):
    devices = machine(name)
    for form in FORMS:
        if not fits(name, form):
            with pytest.raises(NaloraError, match=r"--mesh"):
                laid(name, form)
            continue
        mesh = laid(name, form)
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
    ("file", "name"),
    [
        ("slurm.sbatch", "2 x 8 H100, a process a GPU"),
        ("slurm.sbatch", "2 x 8 H100, cyclic"),
        ("slurm.sbatch", "2 x 8 A100"),
        ("jobset.yaml", "v6e-16"),
        ("tpu_pod.sh", "v5litepod-16"),
        ("tpu_pod.sh", "v6e-256"),
    ],
)
def test_deploy_files_start_on_their_machines(file, name):
    """Llama-3.1-8B with the flags of the file, and the default batch size of a row per device if it has none."""
    text, devices = (ROOT / "deploy" / file).read_text(), machine(name)
    batch = re.search(r"--train\.batch-size[ =](\d+)", text)
    config = run(_mesh(text), int(batch[1]) if batch else len(devices))
    placed = laid_out(config, architecture("llama-3.1-8b"), devices)
    rows = distributed.rows_of_processes(
        distributed.make_mesh(placed.mesh, devices), config.train.batch_size
    )
    assert set(rows) == {device.process_index for device in devices}


@pytest.mark.parametrize("name", PLANNED)
def test_nalora_plan_and_training_choose_the_same_layout(name):
    where, planned = of_devices(machine(name)), topology(PLANNED[name])
    assert where is not None
    assert (where.chip, where.size, where.slices) == (planned.chip, planned.size, planned.slices)
    config = run(MeshConfig(), 2 * where.size)
    found, expected = (fastest(fitting(config, SMALL, machine)) for machine in (where, planned))
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
        monkeypatch.setattr(device, "memory_stats", lambda index=index: {"peak_bytes_in_use": 1000 + index})
    assert peak_memory()["peak_device_memory"] == 1000 + len(local) - 1


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_the_compilers_describe_the_same_devices(name):
    assert digest(machine(name)) == DESCRIPTIONS[name]
