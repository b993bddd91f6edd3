"""Attributes of JAX devices. Only this module reads them: their meaning depends on the platform.

- ``slice_index``: on TPUs the slice, absent if a compiler describes a single slice. On GPUs the
  NVLink domain: a host by its boot id, or an NVL72 rack. Absent on CPUs.
- ``partition_index``: on GPUs the NVLink domain; ``slice_index`` is its deprecated alias.
- ``coords``: on TPUs the chip's coordinates in the slice's torus (x, y, z). On GPUs the local
  device; in newer clients domain, process and local device.
- ``memory_stats()``: available for devices of this process; None on CPUs.

Sources: XLA (`pjrt/gpu/se_gpu_pjrt_client.cc`, `pjrt/gpu/se_gpu_topology_description.cc`,
`pjrt/distributed/topology_util.cc`) and libtpu's topology descriptions. `tests/doubles` has a
double of every machine.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax  # imported late, for types alone: help needs no JAX

# Axes of meshes, and the fields of `nalora_jax.config.MeshConfig` with their sizes.
DATA = "data"
FSDP = "fsdp"
CONTEXT = "context"
TENSOR = "tensor"
RUN_AXIS = "run"
AXES = (DATA, FSDP, CONTEXT, TENSOR)
BATCH_AXES = (DATA, FSDP)  # both split the rows of a batch; fsdp also splits weights
WEIGHT_AXES = (FSDP, CONTEXT)  # both split weights, which are gathered layer by layer


def platform_name(device: jax.Device) -> str:
    """Returns "tpu", "gpu" or "cpu"."""
    return device.platform


def kind_of(device: jax.Device) -> str:
    """Returns the product name, e.g. "TPU v5 lite" or "NVIDIA H100 80GB HBM3"."""
    return device.device_kind


def process_of(device: jax.Device) -> int:
    """Returns the index of the process that the device belongs to."""
    return device.process_index


def memory_statistics(device: jax.Device) -> Mapping[str, int]:
    """Returns the allocator's statistics of one of this process's devices, empty on a CPU."""
    return device.memory_stats() or {}


def domains(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Returns the devices grouped by the fast network that joins them.

    A domain is a TPU slice (ICI), or the GPUs of one node or NVL72 rack (NVLink), with any
    number of processes. If the client gives no domain, GPUs are grouped by process. CPU
    devices are one domain.

    Returns:
      Groups in ascending order of their index. GPUs within a group are in ascending order of their
      id, TPU chips in the given order.
    """
    groups: dict[int, list[jax.Device]] = defaultdict(list)
    for device in devices:
        groups[_domain(device)].append(device)
    if platform_name(devices[0]) == "gpu":
        groups = {
            index: sorted(group, key=lambda device: device.id)
            for index, group in groups.items()
        }
    return [groups[index] for index in sorted(groups)]


def slice_count(devices: Sequence[jax.Device]) -> int:
    """Returns the number of TPU slices, joined by a data-centre network; elsewhere 1."""
    if platform_name(devices[0]) == "tpu":
        return len(domains(devices))
    return 1


def torus(devices: Sequence[jax.Device]) -> tuple[int, ...] | None:
    """Returns the dimensions (x, y, z) of the box of chips that a TPU slice fills.

    It is None if the box has holes.
    """
    chips = {tuple(device.coords) for device in devices}
    box = tuple(max(axis) - min(axis) + 1 for axis in zip(*chips, strict=True))
    # Chips have one or two devices (cores), all of them the same number.
    if len(chips) != math.prod(box) or len(devices) % len(chips):
        return None
    return box


def _domain(device: jax.Device) -> int:
    """Returns the index of a device's domain, as `domains` groups them."""
    names = {"tpu": ("slice_index",), "gpu": ("partition_index", "slice_index")}
    for name in names.get(platform_name(device), ()):
        # a client may have the attribute without a value
        index: Any = getattr(device, name, None)
        if index is not None:
            return int(index)
    if platform_name(device) == "gpu":
        return process_of(device)
    return 0
