"""Topologies that users name, and their descriptions for the compilers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.planner.machines import describe_machine, shapes, topology
from tests.doubles.machines import machine as devices_of


def test_slices_that_do_not_exist_are_refused_with_those_that_do():
    for name, known in (
        ("v5e:4x4x2", "16x16, found 'v5e:4x4x2'"),  # aborts libtpu's compiler
        ("v5p:4x4", "4x4x4"),
        ("v5p:4x4x6", "4a x 4b x 4c"),
        ("v5litepod-5", "v5e: 1x1"),
    ):
        with pytest.raises(NaloraError, match=f"--topology: expected a slice of .*{known}"):
            topology(name)


def test_accelerator_types_are_names():
    for name, shape in (  # cloud.google.com/tpu/docs: v5e, v6e, v5p
        ("v5litepod-16", "v5e:4x4"),
        ("v6e-256", "v6e:16x16"),
        ("2xv6e-16", "2xv6e:4x4"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-2048", "v5p:8x8x16"),
    ):
        assert replace(topology(name), name=shape) == topology(shape)


def test_slices_have_the_sizes_of_cloud_tpu():
    for kind in ("v5e", "v6e"):
        assert [math.prod(shape) for shape in shapes(kind)] == [1, 4, 8, 16, 32, 64, 128, 256]
    v5p = list(shapes("v5p"))
    documented = [
        (2, 2, 1),
        (2, 4, 4),
        (4, 4, 4),
        (4, 4, 8),
        (4, 8, 8),
        (8, 8, 8),
        (8, 8, 16),
        (8, 16, 16),
    ]
    assert {*documented, (16, 16, 16), (16, 16, 24)} <= set(v5p)
    assert math.prod(v5p[-1]) == 6144


def test_the_compilers_are_asked_for_the_slice_or_for_nodes_and_gpus():
    one_chip = {"platform": "tpu", "topology_name": "v5e:1x1", "chips_per_host_bounds": (1, 1, 1)}
    assert topology("v5e:1x1").description() == one_chip
    two_slices = {"platform": "tpu", "topology_name": "v6e:16x16", "num_slices": 2}
    assert topology("2xv6e:16x16").description() == two_slices
    arguments = topology("64xh100").description()
    assert "H100" in arguments.pop("target_config")
    assert arguments == {"platform": "cuda", "topology_name": "h100", "topology": "8x1x8"}
    assert "H200" in topology("8xh200").description()["target_config"]


@pytest.mark.parametrize(
    ("name", "chip", "dims"),
    [
        ("v5litepod-16", "v5e", (4, 4, 1)),
        ("2 x 8 H100, old client", "h100", (2, 8)),
        ("2 x 8 A100", "a100-40", (2, 8)),
        ("8 A100 80GB", "a100-80", (1, 8)),
        ("GB200 NVL72", "gb200", (1, 72)),
    ],
)
def test_a_machine_is_recognised_by_its_devices(name, chip, dims):
    """tests/doubles/test_launches.py has several slices, and processes in cyclic order."""
    where = describe_machine(devices_of(name))
    assert where is not None
    assert (where.kind, where.dims, where.slices) == (chip, dims, 1)
    if chip == "v5e":
        assert describe_machine(devices_of(name)[:3]) is None  # a torus has no holes
