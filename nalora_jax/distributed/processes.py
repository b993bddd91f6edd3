"""The processes of a multi-host run: joining them, and what only one of them does."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from nalora_jax.errors import NaloraError

T = TypeVar("T")


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
