"""The processes of a multi-host run: initialisation, lost peers and work of the first process."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from nalora_jax.errors import LostPeerError, NaloraError

T = TypeVar("T")
_LONGEST_ANSWER = 512  # bytes
# Seconds without a heartbeat until a process counts as lost; NALORA_HEARTBEAT_TIMEOUT overrides it.
_HEARTBEAT_TIMEOUT = 60
_SHUTDOWN_TIMEOUT = 30  # seconds that a finished process waits for the others
# Messages of JAX, Gloo, NCCL and the coordination service when a process of the group is gone. The
# first pattern has only messages that storage errors do not contain, the second has all.
_LOST_IN_A_COLLECTIVE = re.compile(
    r"heartbeat|Gloo[^\n]{0,80}failed|[Bb]arrier timed out|NCCL[^\n]{0,80}(remote|abort)"
)
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|Socket closed"
    r"|UNAVAILABLE|ABORTED"
    rf"|DEADLINE_EXCEEDED|{_LOST_IN_A_COLLECTIVE.pattern}"
)


def initialize_distributed(within: int = 300) -> bool:
    """Connects this process to the others of a multi-host run, before any other use of JAX.

    There is one process per host. On a single machine this does nothing and returns False.
    Processes other than the first log warnings only. A run is multi-host if JAX_COORDINATOR_ADDRESS
    is set (with JAX_NUM_PROCESSES and JAX_PROCESS_ID, unless JAX gets them from a cluster manager),
    on a Cloud TPU VM, or under Slurm or Open MPI with more than one task.

    Args:
      within: timeout in seconds for the other processes.

    Raises:
      NaloraError: the environment names a coordinator, but not the number or
        the index of processes.
    """
    if jax.distributed.is_initialized():
        return True
    explicit = "JAX_COORDINATOR_ADDRESS" in os.environ
    if not has_peers():
        return False
    try:
        jax.distributed.initialize(
            num_processes=_env_int("JAX_NUM_PROCESSES"),
            process_id=_env_int("JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=_env_int("NALORA_HEARTBEAT_TIMEOUT")
            or _HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
            initialization_timeout=within,
        )
    except ValueError as error:
        # a TPU host without Google Cloud's images: JAX detects no other process
        if not explicit:
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


def has_peers() -> bool:
    """Returns True if the environment has several processes; see `initialize_distributed`."""
    return (
        "JAX_COORDINATOR_ADDRESS" in os.environ or _cluster_tasks() > 1 or _on_tpu_vm()
    )


@contextmanager
def name_lost_peers() -> Iterator[None]:
    """Ends this process within two minutes after another process has ended.

    Either a collective fails, which raises a `LostPeerError`, or JAX's coordination service misses
    the process's heartbeat and ends this process from C++ with SIGABRT and a stack trace.

    Raises:
      LostPeerError: a collective failed.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except NaloraError:
        raise
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        signs = _LOST.search(str(error))
        if signs is None:
            raise
        raise _lost(signs[0]) from error


def check_lost_peer(error: BaseException) -> None:
    """Raises a `LostPeerError` if an operation on storage failed because of a lost process."""
    signs = _LOST_IN_A_COLLECTIVE.search(str(error))
    if signs is not None:
        raise _lost(signs[0]) from error


def _lost(sign: str) -> LostPeerError:
    return LostPeerError(
        "the other processes",
        expected="all of them to go on",
        found=f"that one is gone ({sign})",
        remedy="its own log says why; start all of them again with --resume",
    )


def fetch(x: jax.Array) -> np.ndarray:
    """Returns ``x`` on the host, also from shards on other hosts; all processes must call it."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def run_on_first_process(action: Callable[[], T]) -> T | None:
    """Runs ``action`` in process 0 only, while the others wait; if it fails, all processes raise.

    It is used for all writes to shared storage.

    Returns:
      The result of ``action`` in process 0; None elsewhere.

    Raises:
      NaloraError: in the other processes, if ``action`` raised in process 0.
    """
    result = None
    failure = None
    if jax.process_index() == 0:
        try:
            result = action()
        except Exception as error:
            failure = error
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(
        np.int32(failure is not None)
    ):
        failure = failure or NaloraError(
            "process 0", expected="to go on", found="that it stopped; it says why"
        )
    if failure is not None:
        raise failure
    return result


def tell_all(action: Callable[[], str | None]) -> str | None:
    """Returns process 0's result of ``action`` in all processes; ``action`` must not communicate.

    Raises:
      NaloraError: in the other processes, if ``action`` raised in process 0.
    """
    answer = run_on_first_process(action)
    if jax.process_count() == 1:
        return answer
    text = (answer or "").encode()[:_LONGEST_ANSWER]
    padded = np.frombuffer(text.ljust(_LONGEST_ANSWER, b"\0"), np.uint8)
    received = multihost_utils.broadcast_one_to_all(padded)
    return (
        np.asarray(received, np.uint8).tobytes().rstrip(b"\0").decode(errors="replace")
        or None
    )


def _env_int(name: str) -> int | None:
    """Returns an integer from the environment; None if it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise NaloraError(name, expected="a whole number", found=repr(text))
    return int(text)


def _cluster_tasks() -> int:
    """Returns the number of tasks that a cluster manager started for this job."""
    hosts = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
    # GKE names the hosts of a process's slice only, and turns off the query of metadata.
    hosts *= _env_int("MEGASCALE_NUM_SLICES") or 1
    return max(
        hosts,
        _env_int("SLURM_STEP_NUM_TASKS") or 1,
        _env_int("OMPI_COMM_WORLD_SIZE") or 1,
    )


def _on_tpu_vm() -> bool:
    """Returns True if JAX found TPU chips when it was imported.

    JAX then sets TPU_ML_PLATFORM for the TPU runtime.
    """
    return "TPU_ML_PLATFORM" in os.environ and "TPU_SKIP_MDS_QUERY" not in os.environ
