"""What a run's log and card say of the machine and the libraries."""

from __future__ import annotations

import platform as python
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from nalora_jax.distributed import platform_of
from nalora_jax.distributed.devices import memory_statistics
from nalora_jax.ops.dispatch import hooks_of


def describe_device() -> str:
    """Kind and number of devices, and the processor behind a CPU device."""
    platform = platform_of()
    return f"{platform.devices} x {platform.name} ({hooks_of(platform).device_name(platform)})"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run computes."""
    names = ("nalora_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": python.python_version()} | {name: _version(name) for name in names}


def peak_memory() -> dict[str, int]:
    """The most memory that this process has held so far, in bytes: what of it the machine tells.

    Returns:
      ``peak_memory``, of the host's; ``peak_device_memory``, of the fullest of this process's devices, where they have
      memory of their own.
    """
    found = {}
    status = Path("/proc/self/status")
    # Not getrusage, whose maximum a process inherits from the one that started it.
    held = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if held:
        found["peak_memory"] = 1024 * int(held[1])
    on_devices = [memory_statistics(device).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if any(on_devices):
        found["peak_device_memory"] = max(on_devices)
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # this library, run from a checkout that was never installed
        return "not installed"
