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


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name"),
    [  # family and model as /proc/cpuinfo of these processors has them
        ("AuthenticAMD", "25", "1", "Zen 3"),  # EPYC 7763
        ("AuthenticAMD", "25", "17", "Zen 4"),  # EPYC 9554
        ("AuthenticAMD", "26", "2", "Zen 5"),  # EPYC 9755
        ("AuthenticAMD", "23", "49", "Zen 2"),  # EPYC 7742
        ("GenuineIntel", "6", "143", "Sapphire Rapids"),  # Xeon Platinum 8481C
        ("GenuineIntel", "6", "1", ""),
        ("HygonGenuine", "24", "1", ""),
    ],
)
def test_a_processor_s_generation_is_known_by_its_numbers(machines, vendor, family, model, name):
    assert machines.generation({"vendor_id": vendor, "cpu family": family, "model": model}) == name
    assert machines.generation({}) == ""
