from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def machines(script):
    return script("machines")


@pytest.mark.parametrize(
    ("cpu", "generation", "widest", "name"),
    [
        ("AMD EPYC", "", "avx512_bf16", "amd-epyc-avx512-bf16"),
        ("AMD EPYC", "Zen 4", "avx512_bf16", "amd-epyc-zen-4-avx512-bf16"),
        ("AMD EPYC", "Zen 3", "avx2", "amd-epyc-zen-3-avx2"),
        ("Intel(R) Xeon(R) Processor", "", "amx_bf16", "intel-xeon-amx"),
    ],
)
def test_a_machine_s_folder_is_named_after_its_processor(machines, cpu, generation, widest, name):
    sets = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = {each: sets.index(each) <= sets.index(widest) for each in sets}
    assert machines.machine_name({"cpu": cpu, "generation": generation, "flags": flags}) == name
