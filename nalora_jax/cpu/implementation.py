"""The implementation "cpu"; the other modules of this package register functions with it.

See `nalora_jax.ops.dispatch`.
"""

from __future__ import annotations

from nalora_jax.cpu import native
from nalora_jax.ops.dispatch import Implementation, Numerics

CPU = Implementation("cpu", platform="cpu")


def usable(numerics: Numerics) -> bool:
    """Returns True if native kernels compile and support programs with these numerics.

    They support programs on one device; the plain ones support several.
    """
    return native.available(numerics.platform.devices)
