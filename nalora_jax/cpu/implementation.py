"""The implementation "cpu", which the modules beside this one fill (`nalora_jax.ops.dispatch`)."""

from __future__ import annotations

from nalora_jax.cpu import native
from nalora_jax.ops.dispatch import Implementation, Numerics

CPU = Implementation("cpu", platform="cpu")


def usable(numerics: Numerics) -> bool:
    """Whether native kernels serve programs of these numerics: on one device, where they compile."""
    return native.available(numerics.platform.devices)
