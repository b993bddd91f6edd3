"""Orbax handlers that write the digest of every file of a checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from nalora_jax.common import digests

JSON = "metadata"  # Orbax's name for the file of a JSON item
# Replicas of an array share its writing if each has at least this many bytes to write. With Orbax's
# default, any size, the first save compiles a slice for every array and device, which costs more
# than it gains for arrays as small as adapters.
_LEAST_SHARE = 16 << 20  # bytes


class _DigestedArrays(ocp.PyTreeCheckpointHandler):
    """Handler of arrays and the digests of their files.

    Orbax finalises an item once all processes have written their parts.
    """

    def __init__(self) -> None:
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_SHARE)
        on_host = ocp.type_handlers.NumpyHandler()
        registry = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, on_host)
        )
        super().__init__(type_handler_registry=registry)

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        digests.write_digests(directory)


class _DigestedJson(ocp.JsonCheckpointHandler):
    """Handler of JSON and the digest of its file."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        digests.write_digests(directory)


def handlers() -> Any:
    """Returns the registry of checkpoint handlers by item."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    arrays = _DigestedArrays()
    for arguments in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add("state", arguments, arrays)
    for item in ("data", "run"):
        handler = _DigestedJson(JSON)
        for arguments in (ocp.args.JsonSave, ocp.args.JsonRestore):
            registry.add(item, arguments, handler)
    return registry
