"""Rows of a global batch: the rows that each process reads, and their global arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common.axes import BATCH_AXES, RUN
from nalora_jax.common.devices import process_of
from nalora_jax.errors import NaloraError


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
    groups = mesh.shape.get(RUN, 1)
    # [run, data, fsdp, others] -> [data, fsdp, others x run]: a process reads one set of rows.
    processes = np.moveaxis(processes.reshape(groups, data, fsdp, -1), 0, -1).reshape(data, fsdp, -1)
    _check_rows(rows, data * fsdp)
    # [data x fsdp, rows of one part]: parts of a batch are in the order of the axes that split it.
    parts = np.arange(rows).reshape(data * fsdp, -1)
    of_part = processes.reshape(data * fsdp, -1)
    return {
        int(process): parts[(of_part == process).any(axis=1)].ravel() for process in np.unique(processes)
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
      rows_axis: 0 for ``[rows, seq]``, 1 for micro-batches ``[accumulate, rows, seq]``, 2 for a sweep's
        ``[runs, accumulate, rows, seq]``, whose first axis is split over the mesh's axis "run".

    Raises:
      NaloraError: the rows cannot be split evenly.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    local_parts = len(process_rows(mesh, parts))
    lead: list[str | None] = [None] * rows_axis
    if rows_axis == 2 and RUN in mesh.shape:
        lead[0] = RUN
    sharding = NamedSharding(mesh, P(*lead, BATCH_AXES))

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
            return value[(*index[:rows_axis], slice(first, first + stop - start), *index[rows_axis + 1 :])]

        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: whole(value) for name, value in batch.items()}


def global_batches(
    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    """Yields the global arrays of micro-batches ``[accumulate, rows, ...]``; see `make_global_batch`."""
    for batch in batches:
        yield make_global_batch(batch, mesh, rows_axis=1)


def _check_rows(rows: int, parts: int) -> None:
    if rows % parts:
        raise NaloraError(
            "--train.batch-size",
            expected=f"rows per micro-batch in multiples of {parts} (mesh axes data x fsdp)",
            found=rows,
            remedy="change the batch size or --train.accumulate, or move devices to --mesh.context or --mesh.tensor",
        )
