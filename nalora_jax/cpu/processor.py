"""What the system says of its CPU."""

from __future__ import annotations

import platform
from pathlib import Path

_DESCRIPTION = Path("/proc/cpuinfo")


def name() -> str:
    """The model's name; off Linux what Python knows of it, which may be nothing."""
    return _fields().get("model name", platform.processor())


def features() -> frozenset[str]:
    """Instruction sets of an x86-64 CPU, in the words of Linux ("avx512_bf16"); empty elsewhere."""
    return frozenset(_fields().get("flags", "").split() if platform.machine() == "x86_64" else ())


def _fields() -> dict[str, str]:
    """Of the first core."""
    try:
        first = _DESCRIPTION.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
