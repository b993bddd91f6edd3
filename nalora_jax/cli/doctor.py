"""``nalora doctor``: versions, devices, kernels, caches and known issues of a machine or pod."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nalora_jax.cli import pod
from nalora_jax.downloads import cache_dir, private_dir
from nalora_jax.errors import NaloraError

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "tokenizers",
    "huggingface_hub",
)
# Compared between processes.
COMPARED = ("nalora_jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
OPTIONAL = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "transformers", "peft", "lm_eval")
CACHES = {
    "native": "compiled CPU kernels",
    "compiled": "compiled programs",
    "packages": "models and data from packages",
    "wheels": "downloaded packages",
    "tokens": "tokenized data",
}
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE = "glibc.malloc.hugetlb"
_RUN = ("native", "compiled")  # caches with executable content
_PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


def doctor(args: Any) -> None:
    """Prints the report of this machine or of all processes; exits with status 1 on problems."""
    del args
    kernels, kernel_problems = _kernels()
    caches, cache_problems = _caches()
    problems = [*_installation_problems(), *kernel_problems, *cache_problems]
    problems += environment_problems(os.environ)
    reports, devices = _reports(problems)
    wrong = list(pod.differences(reports))
    if pod.Group().index:
        print("process 0 prints the report")
    else:
        versions = {"python": platform.python_version(), "nalora_jax": version("nalora_jax")} | _versions()
        sections = {"Versions": versions, "Devices": devices, "CPU": kernels, "Caches": caches}
        for title, rows in sections.items():
            _section(title, rows)
        _section("Processes", pod.rows(reports))
        print("\n  ! ".join(["Problems", *wrong]) if wrong else "No problem found.")
    if wrong:
        raise SystemExit(1)


def _reports(problems: list[str]) -> tuple[list[pod.Report | None], dict[str, str]]:
    """Returns the reports of all processes, and this process's devices.

    Devices are not opened if another process holds them.
    """
    held = list(pod.chip_problems())
    problems = [*problems, *held]
    if not held:
        problems += _join(problems)
    group = pod.Group()
    mine = pod.report(group, _compared(), problems)
    reports = group.exchange("host", mine)
    if held or None in reports:
        return reports, {}
    devices, more = _devices()
    mine = replace(mine, devices=devices.pop("own", ""), problems=[*problems, *more])
    return group.exchange("devices", mine), devices


def _join(problems: list[str]) -> list[str]:
    """Joins this process to the others of its run, if any; returns the reason if that fails.

    JAX ends a process from C++ if another process does not connect; the report of this host is
    therefore printed first.
    """
    from nalora_jax.distributed import initialize_distributed
    from nalora_jax.distributed.processes import filter_stderr, has_peers

    if not has_peers():
        return []
    about = ", ".join(f"{name} {number}" for name, number in _compared().items())
    print("\n  ! ".join([f"{socket.gethostname()}: {about}", *problems]), flush=True)
    filter_stderr()
    print(
        f"waiting up to {pod.WAIT} s for the other processes: start nalora doctor on every host",
        file=sys.stderr,
    )
    try:
        initialize_distributed(within=pod.WAIT)
    except (NaloraError, RuntimeError) as error:
        return [f"the other processes cannot be joined: {' '.join(str(error).split())[:300]}"]
    return []


def version(name: str) -> str:
    """Returns the version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # also this library, if not installed
        return "not installed"


def environment_problems(environ: Mapping[str, str]) -> Iterator[str]:
    """Yields combinations of environment variables that are known to fail."""
    if environ.get("JAX_COORDINATOR_ADDRESS") and any(environ.get(name) for name in _PROXIES):
        yield "a proxy is set in the environment of a run of several processes: JAX's connections may stall; unset it"
    if "--xla_force_host_platform_device_count" in environ.get("XLA_FLAGS", ""):
        yield "XLA_FLAGS simulates several CPU devices: for tests; native kernels are off, and steps are slower"


def requirement_problems(requirements: list[str], installed: Callable[[str], str]) -> Iterator[str]:
    """Yields packages that are missing or whose version this library does not support.

    Args:
      requirements: as in a distribution's metadata; extras are left out.
      installed: returns the version of a name, or "not installed".
    """
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        present = installed(requirement.name)
        required = f"{requirement.name} {requirement.specifier}"
        if present == "not installed":
            yield f"{required} is needed, and not installed"
        elif not requirement.specifier.contains(present, prereleases=True):
            yield f"{required} is needed, and {present} is installed"


def _installation_problems() -> Iterator[str]:
    try:
        needed = importlib.metadata.requires("nalora_jax") or []
    except importlib.metadata.PackageNotFoundError:
        yield "nalora_jax is not installed, only found on the path: dependencies are not checked; pip install -e ."
        needed = []
    yield from requirement_problems(needed, version)
    if version("jax").split(".")[:2] != version("jaxlib").split(".")[:2]:
        yield f"jax {version('jax')} and jaxlib {version('jaxlib')} do not belong together: install jax again"


def _versions() -> dict[str, str]:
    present = {name: version(name) for name in (*PACKAGES, *OPTIONAL)}
    return {
        name: installed
        for name, installed in present.items()
        if name in PACKAGES or installed != "not installed"
    }


def _compared() -> dict[str, str]:
    """Returns the versions that must be equal in all processes."""
    return {name: version(name) for name in COMPARED if version(name) != "not installed"}


def _devices() -> tuple[dict[str, str], list[str]]:
    import jax

    from nalora_jax.distributed.devices import kind_of, memory_statistics, platform_name

    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts if a plugin is missing
        reason = " ".join(str(error).split())[:300] or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
        return {}, [f"JAX finds no device: {reason}"]
    kinds, used = sorted({kind_of(device) for device in devices}), platform_name(devices[0])
    rows = {"platform": used, "devices": f"{len(devices)} ({', '.join(kinds)})"}
    rows["processes"] = str(jax.process_count())
    local = jax.local_devices()
    limit = memory_statistics(local[0]).get("bytes_limit", 0)
    rows["own"] = f"{len(local)} x {kind_of(local[0])}" + (f" of {_size(limit)}" if limit else "")
    problems = []
    if used == "cpu" and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        for path, name, extra in (("/dev/nvidia0", "GPU", "cuda"), ("/dev/accel0", "TPU", "tpu")):
            if Path(path).exists():
                problems.append(
                    f"there is a {name} ({path}), and JAX uses the CPU: install the extra [{extra}]"
                )
    return rows, problems


def _kernels() -> tuple[dict[str, str], list[str]]:
    if importlib.util.find_spec("nalora_jax.cpu") is None:
        return {"kernels": "none: nalora_jax.cpu is not installed"}, []
    from nalora_jax.cpu import processor
    from nalora_jax.cpu.native import library

    rows = {"name": processor.name(), "cores": str(os.cpu_count()), "kernels": ", ".join(library.kinds())}
    problems = []
    try:
        rows["in use"] = library.kind(os.environ.get("NALORA_NATIVE", "")) or "none: products are XLA's"
        rows["compiler"] = library.find_compiler()
    except NaloraError as error:
        problems.append(str(error))
    except RuntimeError as error:
        rows["compiler"] = "none"
        if rows["in use"] in library.kinds():
            problems.append(f"the kernels for this CPU cannot be compiled: {error}")
    kernel = ""
    if HUGE_PAGES.exists():
        kernel = HUGE_PAGES.read_text()
    rows["huge pages"] = huge_pages(os.environ, platform.libc_ver(), kernel)
    return rows, problems


def huge_pages(environ: Mapping[str, str], libc: tuple[str, str], kernel: str) -> str:
    """Returns whether the C library's heap uses huge pages, with the variable that requests them.

    Args:
      environ: of the process.
      libc: name and version, as returned by `platform.libc_ver`.
      kernel: content of `HUGE_PAGES`, e.g. ``"always [madvise] never"``.
    """
    name, version = libc
    numbers = version.split(".")
    supported = name == "glibc" and all(map(str.isdecimal, numbers)) and [*map(int, numbers)] >= [2, 35]
    if not supported or not kernel or "[never]" in kernel:
        return "not available: they need glibc 2.35 and transparent huge pages of the kernel"
    if f"{_HUGE}=1" in environ.get("GLIBC_TUNABLES", ""):
        return "on"
    return f"off; faster on CPUs with: export GLIBC_TUNABLES={_HUGE}=1"


def _caches() -> tuple[dict[str, str], list[str]]:
    root = cache_dir()
    rows, problems = {"folder": str(root)}, []
    for name, what in CACHES.items():
        folder = root / name
        if folder.is_dir():
            rows[what] = _size(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
            if name in _RUN:
                try:
                    private_dir(folder)
                except OSError as error:
                    problems.append(f"{what} are not kept: {error}")
    existing = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    rows["free"] = _size(free)
    if free < 2 << 30:
        problems.append(f"{existing} has {_size(free)} left, less than a small model needs")
    if not os.access(existing, os.W_OK):
        problems.append(f"{existing} cannot be written; set NALORA_CACHE to a folder that can")
    return rows, problems


def _size(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB"


def _section(title: str, rows: Mapping[str, str]) -> None:
    print(title)
    for name, value in rows.items():
        print(f"  {name:<32}{value}")
