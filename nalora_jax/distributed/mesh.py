"""The mesh of a run: the axes ("data", "fsdp", "tensor") over the devices of all processes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.config import MeshConfig
from nalora_jax.errors import NaloraError
from nalora_jax.ops.dispatch import Platform

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # both split the rows of a batch; fsdp splits weights as well


def platform_of(mesh: Mesh | None = None) -> Platform:
    """Returns the platform of a mesh; by default of this process's devices."""
    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    return Platform(devices[0].platform, devices[0].device_kind, len(devices))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The run's mesh over ``devices`` (default: all devices of all processes).

    Neighbours on an axis are neighbours on a TPU's torus; an axis takes part of a torus dimension where the sizes ask
    for it. Axes that are left open (0) are the simplest that work, all devices on "data" and one on the others; a run
    asks `nalora_jax.plan.layouts` first. Slices, which only a data-centre network joins, split the axis "data" and no
    other: between them travel the gradients of the adapters and nothing else. Axis types are Auto, chosen here: JAX's
    own default may be Explicit, under which these programs don't trace.

    Raises:
      NaloraError: more than one axis is -1, an axis is below -1, the product is not the number of devices, or the
        slices do not divide the axis "data".
    """
    available = list(jax.devices() if devices is None else devices)
    sizes = resolve_sizes(config, len(available))
    slices = len({getattr(device, "slice_index", 0) for device in available})
    if sizes[0] % slices:
        raise NaloraError(
            "--mesh.data",
            expected=f"a multiple of the {slices} slices, between which only data parallelism pays",
            found=sizes[0],
        )
    if slices > 1:
        per_slice = (sizes[0] // slices, *sizes[1:])
        placed = mesh_utils.create_hybrid_device_mesh(
            per_slice, (slices, 1, 1), available, allow_split_physical_axes=True
        )
    else:
        placed = mesh_utils.create_device_mesh(sizes, available, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def smallest_mesh(config: MeshConfig) -> Mesh:
    """The mesh over no more devices than its axes ask for: all of them where "data" is left open, or an axis is -1."""
    sizes = (config.data, config.fsdp, config.tensor)
    wanted = None if min(sizes) < 0 or config.data == 0 else math.prod(max(size, 1) for size in sizes)
    return make_mesh(config, jax.devices()[:wanted])


def resolve_sizes(config: MeshConfig, n_devices: int) -> tuple[int, ...]:
    """Axis sizes with 0 and -1 replaced by what is left of ``n_devices``; see `make_mesh`."""
    sizes = {name: int(getattr(config, name)) for name in AXES}
    if sizes["data"] == 0 and -1 not in sizes.values():
        sizes = {**sizes, "data": -1}
    sizes = {name: size or 1 for name, size in sizes.items()}
    shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if any(size < -1 for size in sizes.values()):
        raise NaloraError("--mesh", expected="axis sizes of 1 or more, 0 (chosen), or -1 (what is left)", found=shown)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise NaloraError("--mesh", expected="at most one axis of -1", found=shown, remedy="give the others a size")
    if (free and n_devices % fixed) or (not free and fixed != n_devices):
        relation = "divides" if free else "equals"
        raise NaloraError(
            "--mesh",
            expected=f"a product that {relation} the {n_devices} device(s)",
            found=f"{shown} (product of the fixed axes: {fixed})",
            remedy="set one axis to -1 to take what is left" if not free else "change the sizes of the other axes",
        )
    return tuple(n_devices // fixed if size == -1 else size for size in sizes.values())


def batch_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def row_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """Where ``[batch, seq, d_model]`` lives: rows over ("data", "fsdp"); None on one device."""
    return NamedSharding(mesh, P(BATCH_AXES)) if mesh is not None and mesh.size > 1 else None


def check_heads(mesh: Mesh, *, n_heads: int, n_kv_heads: int) -> None:
    """Refuse a tensor axis that would cut an attention head in two.

    Any other dimension that an axis does not divide is replicated (see `shardings`); a split head would move its
    halves between devices in every layer, which nobody asking for tensor parallelism wants silently.

    Raises:
      NaloraError: the tensor axis does not divide the query heads or the key/value heads.
    """
    size = mesh.shape["tensor"]
    if n_heads % size or n_kv_heads % size:
        fits = [n for n in range(1, n_kv_heads + 1) if n_heads % n == 0 and n_kv_heads % n == 0]
        raise NaloraError(
            "--mesh.tensor",
            expected=f"a divisor of the model's {n_heads} query heads and {n_kv_heads} key/value heads",
            found=size,
            remedy=f"use {' or '.join(map(str, fits))}, and --mesh.fsdp for the rest of the devices",
        )
