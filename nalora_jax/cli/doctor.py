"""``nalora doctor``: versions, devices, kernels and caches of a machine."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nalora_jax.common.downloads import cache_dir, private_dir
from nalora_jax.common.imports import installed_version
from nalora_jax.errors import NaloraError

PACKAGES = (
    "nalora_jax",
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
_WAIT = 120  # seconds for the other processes of a pod


def doctor(args: Any) -> None:
    """Prints the report of this machine; exits with status 1 on problems.

    Versions come first, because JAX ends a process from C++ if another process of a pod does not connect.
    """
    _section("Versions", _versions())
    kernels, kernel_problems = _kernels()
    caches, cache_problems = _caches()
    _section("CPU", kernels)
    _section("Caches", caches)
    devices, device_problems = _devices()
    _section("Devices", devices)
    problems = [*kernel_problems, *cache_problems, *device_problems]
    print("\n  ! ".join(["Problems", *problems]) if problems else "No problem found.")
    if problems:
        raise SystemExit(1)


def _versions() -> dict[str, str]:
    optional = [name for name in OPTIONAL if installed_version(name) != "not installed"]
    return {"python": platform.python_version()} | {
        name: installed_version(name) for name in (*PACKAGES, *optional)
    }


def _devices() -> tuple[dict[str, str], list[str]]:
    import jax

    from nalora_jax.common.devices import kind_of, memory_statistics, platform_name
    from nalora_jax.layout.distributed import initialize_distributed

    try:
        initialize_distributed(within=_WAIT)
        devices = jax.devices()
    except (NaloraError, RuntimeError, AssertionError) as error:  # JAX asserts if a plugin is missing
        reason = " ".join(str(error).split())[:300] or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
        return {}, [f"JAX finds no device: {reason}"]
    kinds, used = sorted({kind_of(device) for device in devices}), platform_name(devices[0])
    rows = {"platform": used, "devices": f"{len(devices)} ({', '.join(kinds)})"}
    rows["processes"] = str(jax.process_count())
    local = jax.local_devices()
    limit = memory_statistics(local[0]).get("bytes_limit", 0)
    rows["of this process"] = f"{len(local)} x {kind_of(local[0])}" + (
        f" of {_size(limit)}" if limit else ""
    )
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
    from nalora_jax.common import processor
    from nalora_jax.cpu.native import library
    from nalora_jax.train.machine import host_memory

    free, total = host_memory()
    kinds = processor.kinds()
    rows = {"name": processor.name(), "cores": str(os.cpu_count()), "kernels": ", ".join(kinds) or "none"}
    rows["memory"] = f"{_size(free)} free of {_size(total)}"
    problems = []
    try:
        rows["in use"] = library.chosen() or "none: products are XLA's"
        rows["compiler"] = library.find_compiler()
    except NaloraError as error:
        problems.append(str(error))
    except RuntimeError as error:
        rows["compiler"] = "none"
        if rows["in use"] in kinds:
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
