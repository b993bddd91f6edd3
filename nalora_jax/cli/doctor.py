"""``nalora doctor``: versions, devices, kernels and caches of a machine."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from functools import partial
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
    problems: list[str] = []
    for title, rows in (
        ("Versions", _versions),
        ("CPU", partial(_kernels, problems)),
        ("Caches", partial(_caches, problems)),
        ("Devices", partial(_devices, problems)),
    ):
        print(title)
        for name, value in rows().items():
            print(f"  {name:<32}{value}")
    print("\n  ! ".join(["Problems", *problems]) if problems else "No problem found.")
    if problems:
        raise SystemExit(1)


def _versions() -> dict[str, str]:
    versions = {name: installed_version(name) for name in (*PACKAGES, *OPTIONAL)}
    return {"python": platform.python_version()} | {
        name: version
        for name, version in versions.items()
        if name in PACKAGES or version != "not installed"
    }


def _devices(problems: list[str]) -> dict[str, str]:
    import jax

    from nalora_jax.common.devices import kind_of, memory_statistics, platform_name
    from nalora_jax.layout.distributed import initialize_distributed

    try:
        initialize_distributed(within=_WAIT)
        devices = jax.devices()
    except (NaloraError, RuntimeError, AssertionError) as error:  # JAX asserts if a plugin is missing
        reason = " ".join(str(error).split())[:300] or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
        problems.append(f"JAX finds no device: {reason}")
        return {}
    local, used = jax.local_devices(), platform_name(devices[0])
    limit = memory_statistics(local[0]).get("bytes_limit", 0)
    if used == "cpu" and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        for path, name, extra in (("/dev/nvidia0", "GPU", "cuda"), ("/dev/accel0", "TPU", "tpu")):
            if Path(path).exists():
                remedy = f"install the extra [{extra}]"
                problems.append(f"there is a {name} ({path}), and JAX uses the CPU: {remedy}")
    return {
        "platform": used,
        "devices": f"{len(devices)} ({', '.join(sorted(set(map(kind_of, devices))))})",
        "processes": str(jax.process_count()),
        "of this process": f"{len(local)} x {kind_of(local[0])}" + (f" of {_size(limit)}" if limit else ""),
    }


def _kernels(problems: list[str]) -> dict[str, str]:
    if importlib.util.find_spec("nalora_jax.cpu") is None:
        return {"kernels": "none: nalora_jax.cpu is not installed"}
    from nalora_jax.common import processor
    from nalora_jax.cpu.native import library
    from nalora_jax.train.machine import host_memory

    free, total = host_memory()
    kinds = processor.kinds()
    rows = {"name": processor.name(), "cores": str(os.cpu_count()), "kernels": ", ".join(kinds) or "none"}
    rows["memory"] = f"{_size(free)} free of {_size(total)}"
    try:
        rows["in use"] = library.chosen() or "none: products are XLA's"
        rows["compiler"] = library.find_compiler()
    except NaloraError as error:
        problems.append(str(error))
    except RuntimeError as error:
        rows["compiler"] = "none"
        if rows["in use"] in kinds:
            problems.append(f"the kernels for this CPU cannot be compiled: {error}")
    rows["huge pages"] = _huge_pages()
    return rows


def _huge_pages() -> str:
    """Returns whether the C library's heap uses huge pages, with the variable that requests them."""
    name, version = platform.libc_ver()
    numbers = version.split(".")
    supported = name == "glibc" and all(map(str.isdecimal, numbers)) and [*map(int, numbers)] >= [2, 35]
    kernel = HUGE_PAGES.read_text() if HUGE_PAGES.exists() else ""  # e.g. "always [madvise] never"
    if not supported or not kernel or "[never]" in kernel:
        return "not available: they need glibc 2.35 and transparent huge pages of the kernel"
    if f"{_HUGE}=1" in os.environ.get("GLIBC_TUNABLES", ""):
        return "on"
    return f"off; faster on CPUs with: export GLIBC_TUNABLES={_HUGE}=1"


def _caches(problems: list[str]) -> dict[str, str]:
    root = cache_dir()
    rows = {"folder": str(root)}
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
    return rows


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
