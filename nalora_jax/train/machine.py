"""What a run's log and card say of the machine and the libraries."""

from __future__ import annotations

import platform as python
from importlib.metadata import PackageNotFoundError, version

from nalora_jax.ops.numerics import Numerics, platform_of
from nalora_jax.ops.programs import device_name


def describe_device() -> str:
    """Kind and number of devices, and the processor behind a CPU device."""
    platform = platform_of()
    return f"{platform.devices} x {platform.name} ({device_name(Numerics(platform=platform))})"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run computes."""
    names = ("nalora_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": python.python_version()} | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # this library, run from a checkout that was never installed
        return "not installed"
