"""Devices, and where every array lives on them.

One mesh with the axes ("data", "fsdp", "tensor"), ordered (path regex, PartitionSpec) rules for every tree of a run,
and the batch as a global array. A spec names the *trailing* axes of a leaf, so one rule serves a kernel ``[in, out]``,
its layer stack ``[L, in, out]`` and a stack of experts ``[L, E, in, out]``; leading axes are never split.

    layers/ffn/gate_proj/kernel [L, in, out]   P("fsdp", "tensor")  ->  P(None, "fsdp", "tensor")
    layers/ffn/gate_proj/a      [L, in, r]     P("fsdp", None)      ->  P(None, "fsdp")            in as the kernel's in
    layers/ffn/gate_proj/b      [L, r, out]    P(None, "tensor")    ->  P(None, None, "tensor")    out as its out

An optimizer's moments end in the path of the parameter that they belong to, so the same rules place them.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax import trees
from nalora_jax.config import MeshConfig
from nalora_jax.errors import NaloraError

T = TypeVar("T")
Rules = Sequence[tuple[str, P]]

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # both split the rows of a batch; fsdp splits weights as well


def _projection_rules() -> tuple[tuple[str, P], ...]:
    """Weights, biases and adapters of every projection, from one table of (name, axis of in, axis of out)."""
    table = (
        ("(q|k|v|gate|up|in)_proj", "fsdp", "tensor"),  # heads and FFN channels leave split over tensor ...
        ("(o|down|out)_proj", "tensor", "fsdp"),  # ... and are summed over it here
        ("router", "fsdp", None),
    )
    rules: list[tuple[str, P]] = []
    for name, inner, outer in table:
        rules += [
            (rf"(^|/){name}/kernel(/codes|/scales)?$", P(inner, outer)),
            (rf"(^|/){name}/a$", P(inner, None)),
            (rf"(^|/){name}/b$", P(None, outer)),
            (rf"(^|/){name}/(bias|magnitude)$", P(outer)),
        ]
    return tuple(rules)


# Frozen weights. No trailing default: a weight that nobody thought of is an error, not a silent replica.
PARAM_RULES: Rules = (
    *_projection_rules(),
    (r"(^|/)embed/embedding$", P("tensor", "fsdp")),
    (r"(^|/)lm_head/kernel$", P("fsdp", "tensor")),
    (r"norm/(scale|bias)$", P()),
)

# Everything that training changes: adapters, optimizer, gate averages (and the gate's masks and statistics), counters.
STATE_RULES: Rules = (
    (r"(^|/)v_(row|col)/", P()),  # factored second moments (Adafactor) are small and no longer shaped like a weight
    *_projection_rules(),
    (r"(^|/)(tokens|probe_tokens)$", P()),
    (r"(^|/)gate(_mask|_stats)?/.*(importance|occupancy|mask|scale|slope|feature|selection|linear)", P("tensor")),
    (r"", P()),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The run's mesh over ``devices`` (default: all devices of all processes).

    Axis types are Auto, chosen here: `jax.make_mesh` may default to Explicit, under which these programs don't trace.

    Raises:
      NaloraError: more than one axis is -1, an axis is 0 or below -1, or the product is not the number of devices.
    """
    available = list(jax.devices() if devices is None else devices)
    sizes = _resolve_sizes({name: getattr(config, name) for name in AXES}, len(available))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=available)


def _resolve_sizes(sizes: Mapping[str, int], n_devices: int) -> tuple[int, ...]:
    """Axis sizes with -1 replaced by what is left of ``n_devices``."""
    shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if any(size == 0 or size < -1 for size in sizes.values()):
        raise NaloraError("--mesh", expected="axis sizes of 1 or more, or -1", found=shown)
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


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """Where each leaf lives: a tree like ``tree`` with a `NamedSharding` per leaf.

    Args:
      tree: arrays or ``ShapeDtypeStruct`` leaves.
      rules: ordered (regex, spec) pairs, searched in the slash-joined path; the first match wins. A spec covers the
        trailing axes of the leaf. An axis that does not divide its dimension is dropped for that dimension only, and
        a leaf with fewer axes than its spec is replicated: a layout is never wrong, only less spread.

    Raises:
      NaloraError: a leaf that no rule matches.
    """
    uncovered = [path for path in trees.flatten(tree) if trees.first_match(rules, path) is None]
    if uncovered:
        raise NaloraError(
            "sharding rules",
            expected="a rule for every array",
            found="none for " + ", ".join(uncovered),
            remedy='add a (regex, PartitionSpec) rule, or the trailing default ("", P()) to replicate what is left',
        )

    def place(path: str, leaf: Any) -> NamedSharding:
        match = trees.first_match(rules, path)
        assert match is not None
        return NamedSharding(mesh, fit_spec(match[1], leaf.shape, mesh))

    return trees.map_named(place, tree)


def fit_spec(spec: P, shape: Sequence[int], mesh: Mesh) -> P:
    """``spec`` moved to the trailing axes of ``shape``, without the mesh axes that do not divide their dimension.

    Example (mesh 2 x 4 x 1):
      >>> fit_spec(P("fsdp", "tensor"), (30, 576, 1536), mesh)
      PartitionSpec(None, 'fsdp', 'tensor')
      >>> fit_spec(P("tensor", "fsdp"), (50257, 766), mesh)    # 766 is no multiple of 4
      PartitionSpec('tensor',)
    """
    lead = len(shape) - len(spec)
    if lead < 0:
        return P()
    entries = [None] * lead + [_fit_axis(axis, size, mesh) for axis, size in zip(spec, shape[lead:], strict=True)]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def _fit_axis(axis: Any, size: int, mesh: Mesh) -> Any:
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return axis if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None


def bytes_per_device(tree: Any) -> dict[jax.Device, int]:
    """Bytes that the arrays of ``tree`` occupy on each of this process's devices."""
    totals: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            totals[shard.device] = totals.get(shard.device, 0) + shard.data.nbytes
    return totals


def process_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Rows of a global batch that this process has to read, ascending; the mesh decides, not the process index.

    Example (two processes of four devices, mesh 8 x 1 x 1, 16 rows, on process 1):
      >>> process_rows(mesh, 16)
      array([ 8,  9, 10, 11, 12, 13, 14, 15])
    """
    _check_rows(rows, mesh.shape["data"] * mesh.shape["fsdp"])
    split = NamedSharding(mesh, P(BATCH_AXES))
    slices = {index[0].indices(rows)[:2] for index in split.addressable_devices_indices_map((rows,)).values() if index}
    return np.concatenate([np.arange(start, stop) for start, stop in sorted(slices)])


def make_global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, *, rows_axis: int = 0) -> dict[str, jax.Array]:
    """Global arrays from each process's own rows, split over ("data", "fsdp").

    Args:
      batch: numpy arrays whose axis ``rows_axis`` holds the rows of `process_rows`, in that order.
      rows_axis: 0 for ``[rows, seq]``, 1 for micro-batches ``[accumulate, rows, seq]``.

    Raises:
      NaloraError: the rows cannot be split evenly.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    local_parts = len(process_rows(mesh, parts))
    for value in batch.values():
        _check_rows(value.shape[rows_axis] * parts // local_parts, parts)
    sharding = NamedSharding(mesh, P(*[None] * rows_axis, BATCH_AXES))
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def fetch(x: jax.Array) -> np.ndarray:
    """``x`` on the host, also where its parts live on several hosts; all of them have to ask for it."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def on_first_process(action: Callable[[], T]) -> T | None:
    """Does ``action`` in process 0 alone, while the others wait; where it fails, all of them raise.

    For everything that writes to storage, which the processes share.

    Returns:
      What ``action`` returns, in process 0; None elsewhere.

    Raises:
      NaloraError: in the other processes, where ``action`` raised in process 0.
    """
    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except Exception as error:
            failure = error
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(failure is not None)):
        failure = failure or NaloraError("process 0", expected="to go on", found="that it stopped; it says why")
    if failure is not None:
        raise failure
    return result


def _check_rows(rows: int, parts: int) -> None:
    if rows % parts:
        raise NaloraError(
            "--train.batch-size",
            expected=f"rows per micro-batch in multiples of {parts} (mesh axes data x fsdp)",
            found=rows,
            remedy="change the batch size or --train.accumulate, or move devices to --mesh.tensor",
        )


def initialize_distributed() -> bool:
    """Join this process to the others of a multi-host run, before any other use of JAX; one process per host.

    Does nothing (and returns False) on a single machine. Processes other than the first log warnings only. A run is
    multi-host where JAX_COORDINATOR_ADDRESS is set (with JAX_NUM_PROCESSES and JAX_PROCESS_ID, unless a cluster manager
    tells JAX), on a Cloud TPU VM, or under Slurm or Open MPI with more than one task.

    Raises:
      NaloraError: the environment names a coordinator, but not the number or the index of processes.
    """
    if jax.distributed.is_initialized():
        return True
    explicit = "JAX_COORDINATOR_ADDRESS" in os.environ
    if not (explicit or _cluster_tasks() > 1 or _on_tpu_vm()):
        return False
    try:
        jax.distributed.initialize(num_processes=_env_int("JAX_NUM_PROCESSES"), process_id=_env_int("JAX_PROCESS_ID"))
    except ValueError as error:
        if not explicit:  # a TPU host outside Google Cloud's own images: JAX knows of no other process
            return False
        raise NaloraError(
            "JAX_COORDINATOR_ADDRESS",
            expected="JAX_NUM_PROCESSES and JAX_PROCESS_ID beside it",
            found=str(error),
            remedy="set all three on every host (docs/sharding.md)",
        ) from error
    if jax.process_index():
        logging.getLogger("nalora_jax").setLevel(logging.WARNING)
    return True


def _env_int(name: str) -> int | None:
    """An integer from the environment, None where it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise NaloraError(name, expected="a whole number", found=repr(text))
    return int(text)


def _cluster_tasks() -> int:
    """Tasks that a cluster manager started for this job."""
    hosts = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
    return max(hosts, _env_int("SLURM_STEP_NUM_TASKS") or 1, _env_int("OMPI_COMM_WORLD_SIZE") or 1)


def _on_tpu_vm() -> bool:
    """Whether JAX found TPU chips when it was imported (it then names itself to the TPU runtime)."""
    return "TPU_ML_PLATFORM" in os.environ and "TPU_SKIP_MDS_QUERY" not in os.environ
