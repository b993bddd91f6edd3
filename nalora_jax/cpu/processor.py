"""Name and features of the CPU, as reported by the system."""

from __future__ import annotations

import platform
from pathlib import Path

_DESCRIPTION = Path("/proc/cpuinfo")


def name() -> str:
    """Returns the CPU's model name.

    On systems other than Linux it is `platform.processor`, which may be empty.
    """
    return _fields().get("model name", platform.processor())


def features() -> frozenset[str]:
    """Returns the instruction sets of an x86-64 CPU as Linux names them ("avx512_bf16").

    For other CPUs the set is empty.
    """
    if platform.machine() != "x86_64":
        return frozenset()
    return frozenset(_fields().get("flags", "").split())


def _fields() -> dict[str, str]:
    """Returns the fields of the first core."""
    try:
        first = _DESCRIPTION.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
