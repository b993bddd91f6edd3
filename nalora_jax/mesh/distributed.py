"""The mesh of a run and its global batches: axes "data", "fsdp", "context", "tensor" over all
processes' devices.

A mesh has the axis "context" only if it splits the tokens of rows (`nalora_jax.ops.split_rows`). A
sweep's mesh has an outermost axis "run": its groups of devices train different adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common.devices import (
    AXES,
    BATCH_AXES,
    CONTEXT,
    DATA,
    RUN_AXIS,
    TENSOR,
    WEIGHT_AXES,
    domains,
    kind_of,
    platform_name,
    process_of,
    slice_count,
    torus,
)
from nalora_jax.config import MeshConfig
from nalora_jax.errors import NaloraError
from nalora_jax.ops.dispatch import Platform
from nalora_jax.ops.shardings import RowSharding, ways


def platform_of(mesh: Mesh | None = None) -> Platform:
    """Returns the platform of a mesh; by default of this process's devices."""
    if mesh is None:
        devices = jax.devices()
        tensor = 1
    else:
        devices = list(mesh.devices.flat)
        tensor = int(mesh.shape.get(TENSOR, 1))
    return Platform(
        platform_name(devices[0]), kind_of(devices[0]), len(devices), tensor
    )


def platform_of_step(mesh: Mesh) -> Platform:
    """Returns the platform of a training step: one device if each run of a sweep has one.

    Simulated devices of a CPU share the threads of its kernels, and keep the plain functions.
    """
    platform = platform_of(mesh)
    if platform.name == "cpu" or devices_per_run(mesh) > 1:
        return platform
    return replace(platform, devices=1)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the run's mesh over ``devices`` (default: all devices of all processes).

    Neighbours on an axis are neighbours on a TPU's torus; an axis takes part of a torus dimension
    if the sizes require it. On GPUs the axis "tensor" stays within a node as long as its size
    divides the node's. Open axes (0) get the simplest sizes that work, all devices on "data" and
    one on the others; a run asks `nalora_jax.planner.layouts` first. TPU slices, joined by a
    data-centre network, split the axis "data" and no other: only gradients of the adapters travel
    between them. Axis types are Auto; JAX's default may be Explicit, which these programs do not
    support.

    With ``config.run`` above 1 the other axes describe one group of devices.

    Raises:
      NaloraError: more than one axis is -1, an axis is below -1, the product is not the number of
        devices, the groups of "run" are not equal, or the slices do not divide the axis "data".
    """
    available = list(devices or jax.devices())
    groups = max(config.run, 1)
    sizes = axis_sizes(config, len(available), slice_count(available))
    if sizes[CONTEXT] == 1:
        del sizes[CONTEXT]
    data, *inner_sizes = sizes.values()
    axes: tuple[str, ...] = tuple(sizes)
    grid = _place(available, (groups * data, *inner_sizes))
    if groups > 1:
        grid = grid.reshape(groups, data, *inner_sizes)
        axes = (RUN_AXIS, *axes)
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def _place(available: list[jax.Device], sizes: tuple[int, ...]) -> np.ndarray:
    """Returns the devices in the order of the mesh's axes, "data" first."""
    groups = domains(available)
    boxes: set[tuple[int, ...] | None] = {None}
    if platform_name(available[0]) == "tpu":
        boxes = set(map(torus, groups))
    # Not TPUs, or slices that are not equal and complete boxes of chips.
    if len(boxes) > 1 or None in boxes:
        grid = np.empty(len(available), dtype=object)
        grid[:] = [device for group in groups for device in group]
        return grid.reshape(sizes)
    if len(groups) == 1:
        return mesh_utils.create_device_mesh(
            sizes, available, allow_split_physical_axes=True
        )
    data, *inner_sizes = sizes
    per_slice = (data // len(groups), *inner_sizes)
    return mesh_utils.create_hybrid_device_mesh(
        per_slice,
        (len(groups), *[1] * len(inner_sizes)),
        available,
        allow_split_physical_axes=True,
    )


def smallest_mesh(config: MeshConfig) -> Mesh:
    """Returns the mesh over the devices that its axes need: all if "data" is open or an axis is
    -1."""
    sizes = [int(getattr(config, name)) for name in AXES]
    required = None
    if min(sizes) >= 0 and config.data > 0:
        required = math.prod(max(size, 1) for size in [*sizes, config.run])
    return make_mesh(config, jax.devices()[:required])


def multi_device_mesh(mesh: Mesh) -> Mesh | None:
    """Returns ``mesh``; None if it has one device."""
    if mesh.size == 1:
        return None
    return mesh


def axis_sizes(
    config: MeshConfig, n_devices: int, slices: int, *, keep_open: bool = False
) -> dict[str, int]:
    """Returns the axes' sizes within a group of "run", -1 replaced by what remains of
    ``n_devices``.

    Without an axis of -1, "data" takes what remains if it is open (0), and other open axes are 1;
    or they stay 0 if ``keep_open``, except "context" next to sized axes.

    Raises:
      NaloraError: see `make_mesh`.
    """
    groups = max(config.run, 1)
    if n_devices % groups:
        fits = [n for n in range(1, n_devices + 1) if n_devices % n == 0]
        expected = (
            f"a divisor of the {n_devices} device(s): {', '.join(map(str, fits))}"
        )
        raise NaloraError("--mesh.run", expected=expected, found=groups)
    n_devices //= groups
    sizes = {name: int(getattr(config, name)) for name in AXES}
    if not keep_open or -1 in sizes.values():
        if sizes[DATA] == 0 and -1 not in sizes.values():
            sizes[DATA] = -1
        sizes = {name: size or 1 for name, size in sizes.items()}
    elif min(size for name, size in sizes.items() if name != CONTEXT) > 0:
        sizes[CONTEXT] = sizes[CONTEXT] or 1
    axes = describe_axes(sizes)
    free = [name for name, size in sizes.items() if size == -1]
    if any(size < -1 for size in sizes.values()):
        raise NaloraError(
            "--mesh",
            expected="axis sizes of 1 or more, 0 (chosen), or -1 (what is left)",
            found=axes,
        )
    if len(free) > 1:
        raise NaloraError(
            "--mesh",
            expected="at most one axis of -1",
            found=axes,
            remedy="give the others a size",
        )
    fixed = math.prod(size for size in sizes.values() if size > 0)
    is_open = min(sizes.values()) < 1
    if n_devices % fixed or (not is_open and fixed != n_devices):
        relation = "equals"
        remedy = "set one axis to -1 to take what is left"
        if is_open:
            relation = "divides"
            remedy = "change the sizes of the other axes"
        raise NaloraError(
            "--mesh",
            expected=f"a product that {relation} the {n_devices} device(s)",
            found=f"{axes} (product of the fixed axes: {fixed})",
            remedy=remedy,
        )
    sizes |= dict.fromkeys(free, n_devices // fixed)
    data = groups * (sizes[DATA] or n_devices // fixed)
    if data % slices:
        raise NaloraError(
            "--mesh.data",
            expected=f"a multiple of the {slices} slices, "
            "because fsdp and tensor stay within a slice",
            found=data,
            remedy=f"use --mesh.data {slices} --mesh.fsdp -1",
        )
    return sizes


def describe_axes(sizes: Mapping[str, int]) -> str:
    """Returns the axes with a size, e.g. ``data 2 x fsdp 4 x tensor 1``; "context" only above 1."""
    return " x ".join(
        f"{name} {size}"
        for name, size in sizes.items()
        if size and (name, size) != (CONTEXT, 1)
    )


def context_size(mesh: Mesh | None) -> int:
    """Returns the number of parts that the tokens of a row are split into."""
    if mesh is None:
        return 1
    return mesh.shape.get(CONTEXT, 1)


def row_sharding(mesh: Mesh | None) -> RowSharding:
    """Returns the sharding of ``[batch, seq, d_model]`` by rows; None if each run has one device.

    The parts of split rows are rows of this array (`nalora_jax.ops.split_rows`).
    """
    if mesh is None or devices_per_run(mesh) == 1:
        return None
    axes: tuple[str, ...] = BATCH_AXES
    if CONTEXT in mesh.shape:
        axes = (CONTEXT, *axes)
    return NamedSharding(mesh, P(axes))


def batch_sharding(mesh: Mesh, *lead: str | None) -> NamedSharding:
    """Returns the sharding of a batch by rows, after axes that are split over ``lead``."""
    return NamedSharding(mesh, P(*lead, BATCH_AXES))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device has as a whole."""
    return NamedSharding(mesh, P())


def stacked_sharding(mesh: Mesh, solo: NamedSharding) -> NamedSharding:
    """Returns the sharding of ``[runs, ...]`` for the sharding of one run's array."""
    axis = None
    if RUN_AXIS in mesh.shape:
        axis = RUN_AXIS
    return NamedSharding(mesh, P(axis, *solo.spec))


def devices_per_run(mesh: Mesh) -> int:
    """Returns the number of devices that train a run together."""
    return mesh.size // mesh.shape.get(RUN_AXIS, 1)


def check_heads(tensor: int, *, n_heads: int, n_kv_heads: int) -> None:
    """Checks that an axis "tensor" does not split an attention head.

    Any other dimension that an axis does not divide is replicated (see `shardings`). The halves of
    a split head would move between devices in every layer.

    Raises:
      NaloraError: ``tensor`` does not divide the query heads or the key/value heads.
    """
    if n_heads % tensor or n_kv_heads % tensor:
        fits = [
            n
            for n in range(1, n_kv_heads + 1)
            if n_heads % n == 0 and n_kv_heads % n == 0
        ]
        raise NaloraError(
            "--mesh.tensor",
            expected=f"a divisor of the model's {n_heads} query heads "
            f"and {n_kv_heads} key/value heads",
            found=tensor,
            remedy=f"use {' or '.join(map(str, fits))}, "
            "and --mesh.fsdp for the rest of the devices",
        )


# ---------------------------------------------------------------- batches


def rows_of_processes(mesh: Mesh, rows: int) -> dict[int, np.ndarray]:
    """Returns the rows of a global batch on each process's devices, ascending, by process index.

    A mesh over TPU chips follows their torus, so a process's rows are in general not contiguous;
    processes whose devices differ only along "context" or "tensor" have the same rows.

    Example (v6e:16x16 with fsdp 256: each host has a square of two by two chips):
      >>> rows_of_processes(mesh, 256)[0]
      array([ 0,  1, 16, 17])
    """
    processes = np.vectorize(process_of, otypes=[int])(mesh.devices)
    data, fsdp = (mesh.shape[axis] for axis in BATCH_AXES)
    groups = mesh.shape.get(RUN_AXIS, 1)
    # [run, data, fsdp, others] -> [data, fsdp, others x run]: a process reads one set of rows.
    processes = np.moveaxis(processes.reshape(groups, data, fsdp, -1), 0, -1).reshape(
        data, fsdp, -1
    )
    _check_rows(rows, data * fsdp)
    # [data x fsdp, rows of one part]: parts of a batch are in the order of the axes that split it.
    parts = np.arange(rows).reshape(data * fsdp, -1)
    of_part = processes.reshape(data * fsdp, -1)
    return {
        int(process): parts[(of_part == process).any(axis=1)].ravel()
        for process in np.unique(processes)
    }


def process_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Returns the rows of a global batch that this process has to read, ascending.

    They depend on the mesh, not on the process index.

    Example (two processes of four devices, mesh 8 x 1 x 1, 16 rows, on process 1):
      >>> process_rows(mesh, 16)
      array([ 8,  9, 10, 11, 12, 13, 14, 15])
    """
    return rows_of_processes(mesh, rows)[jax.process_index()]


def make_global_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, *, rows_axis: int = 0
) -> dict[str, jax.Array]:
    """Returns global arrays, split over ("data", "fsdp"), from the rows of each process.

    Args:
      batch: numpy arrays whose axis ``rows_axis`` has the rows of `process_rows`, in that order.
      rows_axis: 0 for ``[rows, seq]``, 1 for micro-batches ``[accumulate, rows, seq]``, 2 for a
        sweep's ``[runs, accumulate, rows, seq]``, whose first axis is split over the mesh's axis
        "run".

    Raises:
      NaloraError: the rows cannot be split evenly.
    """
    parts = prompt_shards(mesh)
    local_parts = len(process_rows(mesh, parts))
    lead: list[str | None] = [None] * rows_axis
    if rows_axis == 2 and RUN_AXIS in mesh.shape:
        lead[0] = RUN_AXIS
    sharding = batch_sharding(mesh, *lead)

    def whole(value: np.ndarray) -> jax.Array:
        rows = value.shape[rows_axis] * parts // local_parts
        _check_rows(rows, parts)
        shape = (*value.shape[:rows_axis], rows, *value.shape[rows_axis + 1 :])
        held = process_rows(mesh, rows)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            # A device's rows are contiguous in the global batch, and so in this process's rows.
            start, stop, _ = index[rows_axis].indices(rows)
            first = int(np.searchsorted(held, start))
            return value[
                (
                    *index[:rows_axis],
                    slice(first, first + stop - start),
                    *index[rows_axis + 1 :],
                )
            ]

        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: whole(value) for name, value in batch.items()}


def global_batches(
    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    """Yields the global arrays of micro-batches ``[accumulate, rows, ...]``; see
    `make_global_batch`."""
    for batch in batches:
        yield make_global_batch(batch, mesh, rows_axis=1)


def _check_rows(rows: int, parts: int) -> None:
    if rows % parts:
        raise NaloraError(
            "--train.batch-size",
            expected=f"rows per micro-batch in multiples of {parts} (mesh axes data x fsdp)",
            found=rows,
            remedy="change the batch size or --train.accumulate, "
            "or move devices to --mesh.context or --mesh.tensor",
        )


_GPU_ALWAYS: dict[str, Any] = {
    # Do not merge small matmuls into larger ones with the same operand: the merged matmul has the
    # more precise of both dtypes. With merging, the misalignment probe made a gate's matmuls
    # float32, 2% of a step's HBM traffic.
    "xla_gpu_dot_merger_threshold_mb": 0,
    # Percentage of the memory that XLA's rematerialization and scheduler may plan with. They
    # estimate 1.5 times the memory that a step over scanned layers needs; at the default of 95 they
    # recompute matmuls and delay gathers although memory is free.
    "xla_gpu_memory_limit_slop_factor": 200,
}
# Multiply gathered kernels as a whole. By default the partitioner turns matmuls with large kernels
# into loops that multiply one shard and permute the next: on v5e:4x8, three kernels of 178 MB
# became 110 GB of exposed permutes, with float32 sums in between.
_WHOLE_KERNELS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# Overlap gathers of kernels with matmuls: without these options, v5e's compiler overlaps only some
# of them. On other TPUs, libtpu rejects the first option starting at version 0.0.50, because of
# wrong results and hangs.
_V5E = (
    _WHOLE_KERNELS
    | {
        "xla_tpu_enable_async_collective_fusion": "true",  # fuse steps of a collective into matmuls
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",  # also of gathers
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",  # over several matmuls
        "xla_tpu_overlap_compute_collective_tc": "true",  # on the same core
        "xla_enable_async_all_gather": "true",
    }
)
# The same on v5p and v6e, whose SparseCores gather while the TensorCore computes.
_SPARSE_CORES = _WHOLE_KERNELS | {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    # over two dimensions of the torus
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_all_gather_offload_tracing": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}
# Keys are JAX's names of device kinds.
_TPU = {"tpu v5 lite": _V5E, "tpu v5e": _V5E} | dict.fromkeys(
    ("tpu v5", "tpu v5p", "tpu v6 lite", "tpu v6e"), _SPARSE_CORES
)
# Schedule by latency, so that a layer's kernels are gathered while the previous layer is computed.
_GPU: dict[str, Any] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_while_loop_double_buffering": True,  # two layers in one iteration of the scan
}
# One option, with its names in the XLA of JAX 0.10 and of 0.12.
_PIPELINED: dict[str, Any] = {
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON",
}


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """Returns the ``compiler_options`` of `jax.jit` for a step on ``mesh``."""
    device = mesh.devices.flat[0]
    gathers = any(mesh.shape.get(axis, 1) > 1 for axis in WEIGHT_AXES)
    if platform_name(device) == "gpu":
        if not gathers:
            return dict(_GPU_ALWAYS)
        pipelined = {
            name: value for name, value in _PIPELINED.items() if _is_known(name, value)
        }
        return _GPU_ALWAYS | _GPU | pipelined
    if platform_name(device) != "tpu" or not gathers:
        return {}
    return dict(_TPU.get(kind_of(device).lower(), {}))


@cache
def _is_known(name: str, value: Any) -> bool:
    """Returns True if the installed XLA has this option; it rejects unknown options."""
    try:
        jax.jit(lambda: 0.0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return False
        raise
    return True


def prompt_shards(mesh: Mesh | None) -> int:
    """Returns the number of parts into which the mesh splits a batch of evaluation or
    generation."""
    if mesh is None:
        return 1
    return ways(mesh, BATCH_AXES)


def place_batch(tree: Any, mesh: Mesh | None) -> Any:
    """Returns host arrays ``[batch, ...]`` placed on the mesh; without a mesh, unchanged."""
    if mesh is None:
        return tree
    return jax.device_put(tree, batch_sharding(mesh))


# Rows that are generated at once on each shard of a batch.
GENERATED_ROWS = 64


def program_shape(
    prompts: int, samples: int, shards: int, rows: int = GENERATED_ROWS
) -> tuple[int, int, int]:
    """Returns how groups of samples are divided among programs and shards.

    A mesh with more shards than prompts divides each group into parts, which process the same
    prompt.

    Args:
      prompts: of a step.
      samples: of a prompt.
      shards: parts that the mesh splits a batch into.
      rows: that are generated at once on each shard.

    Returns:
      Prompts of one program, its prompts with repetitions, a multiple of ``shards``, and samples of
      each.

    Example:
      >>> program_shape(64, 16, 256), program_shape(64, 16, 8), program_shape(8, 8, 1)
      ((64, 256, 4), (32, 32, 16), (8, 8, 8))
    """
    # Parts of a group: the fewest equal ones of which every shard gets one.
    divisors = (n for n in range(1, samples + 1) if samples % n == 0)
    parts = next((n for n in divisors if n * prompts >= shards), samples)
    # Parts on each shard: as many as its rows hold, at most those that all prompts have.
    that_fit = max(rows * parts // samples, 1)
    of_all_prompts = math.ceil(prompts * parts / shards)
    of_shard = min(that_fit, of_all_prompts)
    return of_shard * shards // parts, of_shard * shards, samples // parts
