"""Facts about the machine and the library versions for a run's log and model card."""

from __future__ import annotations

import platform as python
import re
from pathlib import Path

import jax

from nalora_jax.common import processor
from nalora_jax.common.devices import memory_statistics
from nalora_jax.common.imports import installed_version
from nalora_jax.mesh.distributed import platform_of


def describe_device() -> str:
    """Returns number and kind of the devices, with the processor name of CPU devices."""
    platform = platform_of()
    if platform.name == "cpu":
        kind = processor.processor_name()
    else:
        kind = platform.kind
    return f"{platform.devices} x {platform.name} ({kind})"


def versions() -> dict[str, str]:
    """Returns versions of Python and of the libraries that determine a run's results."""
    names = (
        "nalora_jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
    )
    return {"python": python.python_version()} | {
        name: installed_version(name) for name in names
    }


def peak_memory() -> dict[str, int]:
    """Returns the peak memory of this process so far in bytes, as far as the system reports it.

    Returns:
      ``peak_memory`` of the host, and ``peak_device_memory`` of the fullest local device, if the
      devices have separate memory.
    """
    peaks = {}
    status = Path("/proc/self/status")
    # Not getrusage: a child process inherits its parent's maximum.
    held = None
    if status.exists():
        held = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    if held:
        peaks["peak_memory"] = 1024 * int(held[1])
    on_devices = [
        memory_statistics(device).get("peak_bytes_in_use", 0)
        for device in jax.local_devices()
    ]
    if any(on_devices):
        peaks["peak_device_memory"] = max(on_devices)
    return peaks


def host_memory(
    info: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")
) -> tuple[int, int]:
    """Returns free and total bytes of host or container memory, the smaller; zeros if unknown."""
    if not info.exists():
        return 0, 0
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB", info.read_text(), re.MULTILINE))
    free, total = (
        1024 * int(lines.get(name, 0)) for name in ("MemAvailable", "MemTotal")
    )
    try:
        texts = {
            name: (group / f"memory.{name}").read_text()
            for name in ("max", "current", "stat")
        }
        limit = int(texts["max"])
    except (OSError, ValueError):  # "max" without a limit
        return free, total
    # Pages of files that the kernel can drop count as used, but are free when needed.
    cached = re.findall(r"^inactive_file (\d+)", texts["stat"], re.MULTILINE)
    used = int(texts["current"]) - sum(map(int, cached))
    return min(free, max(0, limit - used)), min(total, limit)


def device_memory() -> float:
    """Returns the bytes of a device's memory; devices of a CPU share the memory of
    `host_memory`."""
    devices = jax.local_devices()
    limit = memory_statistics(devices[0]).get("bytes_limit")
    if limit:
        return float(limit)
    _, total = host_memory()
    return total / len(devices)
