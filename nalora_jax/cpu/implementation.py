"""Whether native kernels support a program."""

from __future__ import annotations

from nalora_jax.cpu import native
from nalora_jax.ops.dispatch import Numerics


def usable(numerics: Numerics) -> bool:
    """Returns True if native kernels compile and support programs with these numerics.

    They support programs on one device; the plain ones support several.
    """
    return native.available(numerics.platform.devices)
