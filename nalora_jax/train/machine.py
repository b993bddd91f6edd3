"""What a run's log and card say of the machine and the libraries."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import jax

from nalora_jax.cpu import processor


def describe_device() -> str:
    """Kind and number of devices, and the processor behind a CPU device."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"{processor.name()}, {os.cpu_count()} cores"
    return f"{jax.device_count()} x {device.platform} ({kind})"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run computes."""
    names = ("nalora_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # this library, run from a checkout that was never installed
        return "not installed"
