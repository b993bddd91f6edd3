"""The doubles give what real clients give."""

from __future__ import annotations

import json

import jax
import pytest

from tests.doubles.describe import FILE, digest
from tests.doubles.machines import NAMES, machine

DESCRIPTIONS = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_the_compilers_describe_the_same_devices(name):
    assert digest(machine(name)) == DESCRIPTIONS[name]


@pytest.mark.parametrize("name", NAMES)
def test_devices_have_the_attributes_of_their_platform_and_no_others(name):
    devices = machine(name)
    assert len({device.id for device in devices}) == len(devices)
    assert sorted({device.process_index for device in devices}) == list(
        range(len({device.process_index for device in devices}))
    )
    for device in devices:
        assert hasattr(device, "core_on_chip") == (device.platform == "tpu")
        assert hasattr(device, "partition_index") == (device.platform == "gpu" and "old client" not in name)
        assert (device.local_hardware_id is None) == (device.process_index > 0)
    assert not hasattr(jax.devices("cpu")[0], "slice_index")
