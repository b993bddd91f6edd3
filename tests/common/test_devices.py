"""What is read from devices of every machine."""

import pytest

from nalora_jax.common import devices
from tests.doubles.machines import machine

# Machine: fast domains, slices of a data-centre network, devices.
DOMAINS = {
    "2 x v6e-16": (2, 2, 32),
    "v5p-2048": (1, 1, 1024),
    "2 x 8 H100": (2, 1, 16),
    "2 x 8 H100, a process a GPU": (2, 1, 16),
    "2 x 8 H100, cyclic": (2, 1, 16),
    "2 x 8 H100, old client": (2, 1, 16),
    "T4": (1, 1, 1),
    "GB200 NVL72": (1, 1, 72),
}


@pytest.mark.parametrize("name", DOMAINS)
def test_domains_are_slices_nodes_or_racks(name):
    domains, slices, count = DOMAINS[name]
    groups = devices.domains(machine(name))
    assert [len(group) for group in groups] == [count // domains] * domains
    assert devices.slice_count(machine(name)) == slices
    assert {device for group in groups for device in group} == set(machine(name))


def test_a_torus_has_no_holes():
    chips = machine("v5litepod-16")
    assert devices.torus(chips) == (4, 4, 1)
    assert devices.torus(chips[:8]) == (4, 2, 1)
    assert devices.torus(chips[:3]) is None
    assert devices.torus(machine("v5p-2048")) == (8, 8, 16)
