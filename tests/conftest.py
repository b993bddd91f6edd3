"""Shared set-up: eight simulated CPU devices, strict numerics, warnings as errors (pyproject)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Eight simulated devices on two busy cores meet late; by default XLA aborts the process after 40 seconds.
        "--xla_cpu_collective_call_terminate_timeout_seconds=900",
        "--xla_cpu_collective_timeout_seconds=900",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA's CPU client. By default one per device: where two collectives of one program do not depend on each
# other, devices may wait in different ones until no thread is left to finish either.
os.environ.setdefault("NPROC", "32")

import jax
import pytest

if TYPE_CHECKING:
    from nalora_jax.ops.numerics import Numerics

# As a command does; without it operations are their plain functions, and so are their tests.
HAS_CPU = importlib.util.find_spec("nalora_jax.cpu") is not None
if HAS_CPU:
    importlib.import_module("nalora_jax.cpu.register")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--first-of-each", action="store_true", help="of a test with several cases only the first")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out (visibly, as deselected) what this machine's owner has not chosen to have, or not asked for."""
    missing = set()
    if importlib.util.find_spec("lm_eval") is None:  # the extra `eval`, not `test`
        missing.add("lm_eval")
    if importlib.util.find_spec("tunix") is None:  # brings a training stack of its own
        missing.add("tunix")
    if "gemma" not in os.environ.get("NALORA_ACCEPT_LICENSE", ""):  # only a person can accept terms
        missing.add("gemma_terms")
    wanted = [item for item in items if not missing & {mark.name for mark in item.iter_markers()}]
    if config.getoption("first_of_each"):
        first: dict[str, pytest.Item] = {}
        for item in wanted:
            first.setdefault(item.nodeid.partition("[")[0], item)
        wanted = list(first.values())
    left_out = set(items) - set(wanted)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = wanted


@pytest.fixture(scope="module", autouse=True)
def _programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """A module's compiled programs: made in two thirds of the time, unless it is marked, and let go at its end.

    Each holds maps of memory, of which a process may have 65,530.
    """
    optimised = request.node.get_closest_marker("optimised") is not None
    jax.config.update("jax_disable_most_optimizations", not optimised)
    yield
    jax.clear_caches()


@pytest.fixture(params=["xla", *(["cpu", "cpu without kernels"] if HAS_CPU else [])])
def numerics(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Numerics]:
    """Makes the numerics of a dtype, in every implementation that the machine has, for a program on one device."""
    from nalora_jax.ops.numerics import numerics_for

    name, _, without = request.param.partition(" without ")
    if without:
        monkeypatch.setenv("NALORA_NATIVE", "0")

    def make(dtype: str = "float32", **changes: Any) -> Numerics:
        return replace(numerics_for(dtype, "cpu", name), **changes)

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in which 192 kB fit: a file system of that size; without the right to mount one, files of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        yield folder
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (192_000, hard))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, previous)


@pytest.fixture
def two_processes() -> Callable[..., list[tuple[int, str, str]]]:
    """Runs Python with the same arguments as two processes that know of each other: a pod at its smallest."""

    def run(arguments: list[str], *, devices: int, **variables: str) -> list[tuple[int, str, str]]:
        """Exit status, standard output and error of both, each with ``devices`` simulated devices."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        # JAX warns about, and may stall on, proxies in a distributed run's environment.
        clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        clean |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
        clean |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        clean |= {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, *arguments]
        started = [subprocess.Popen(command, env=clean | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(2)]
        outputs = [process.communicate(timeout=240) for process in started]
        return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]

    return run
