"""The doubles give what real clients give."""

from __future__ import annotations

import json

import pytest

from tests.doubles.describe import FILE, digest
from tests.doubles.machines import machine

DESCRIPTIONS = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_the_compilers_describe_the_same_devices(name):
    assert digest(machine(name)) == DESCRIPTIONS[name]
