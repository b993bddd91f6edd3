"""Rows of a global batch: which ones a process reads, and the global arrays that they become."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.distributed.mesh import BATCH_AXES
from nalora_jax.errors import NaloraError


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


def _check_rows(rows: int, parts: int) -> None:
    if rows % parts:
        raise NaloraError(
            "--train.batch-size",
            expected=f"rows per micro-batch in multiples of {parts} (mesh axes data x fsdp)",
            found=rows,
            remedy="change the batch size or --train.accumulate, or move devices to --mesh.tensor",
        )
