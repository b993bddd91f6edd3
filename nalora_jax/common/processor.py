"""Name and instruction sets of the CPU, as reported by the system."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

_DESCRIPTION = Path("/proc/cpuinfo")
# The ways to compute bf16 matmuls, fastest first: CPU features that each needs, named as in Linux.
_VECTORS = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16", "fma"}
_FEATURES = {
    "tiles": {"amx_tile", "amx_bf16", *_VECTORS},
    "vectors": _VECTORS,
    "floats": {"avx2", "fma"},
}
_INSTRUCTIONS = {
    "tiles": " with AMX",
    "vectors": " with AVX512-BF16",
    "floats": " with AVX2",
}


def name() -> str:
    """Returns the CPU's model name.

    On systems other than Linux it is `platform.processor`, which may be empty.
    """
    return _fields().get("model name", platform.processor())


def processor_name() -> str:
    """Returns the CPU's model, its fastest bf16 instructions, and the number of cores.

    Virtual machines give several generations one name, and they sum in another order.
    """
    fastest = next((_INSTRUCTIONS[kind] for kind in kinds()), "")
    return f"{name()}{fastest}, {os.cpu_count()} cores"


@cache
def kinds() -> tuple[str, ...]:
    """Returns the ways in which this CPU can compute bf16 matmuls, fastest first.

    They are "tiles" (AMX), "vectors" (AVX512-BF16) and "floats" (AVX2).
    """
    has = features()
    return tuple(kind for kind, needed in _FEATURES.items() if needed <= has)


def features() -> frozenset[str]:
    """Returns the instruction sets of an x86-64 CPU as Linux names them ("avx512_bf16").

    For other CPUs the set is empty.
    """
    if platform.machine() != "x86_64":
        return frozenset()
    return frozenset(_fields().get("flags", "").split())


def _fields() -> dict[str, str]:
    """Returns the fields of the first core in Linux's description; empty on other systems."""
    try:
        first = _DESCRIPTION.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
