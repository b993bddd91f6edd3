"""Description of the measuring machine: processor, memory and versions of packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

# Instruction sets that decide how fast a CPU multiplies matrices; every figure names them.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
# By vendor and family: model numbers and their design (as in both makers' tables in Linux).
_GENERATIONS: dict[tuple[str, int], tuple[tuple[Container[int], str], ...]] = {
    ("AuthenticAMD", 23): ((range(0x30), "Zen"), (range(0x30, 0x100), "Zen 2")),
    ("AuthenticAMD", 25): (
        ((*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0)), "Zen 4"),
        (range(0x100), "Zen 3"),
    ),
    ("AuthenticAMD", 26): ((range(0x80), "Zen 5"),),
    ("GenuineIntel", 6): (
        ((85,), "Skylake to Cooper Lake"),
        ((106, 108), "Ice Lake"),
        ((143,), "Sapphire Rapids"),
        ((207,), "Emerald Rapids"),
        ((173, 174), "Granite Rapids"),
    ),
}
_PACKAGES = (
    *("jax", "jaxlib", "libtpu", "flax", "optax", "numpy", "torch", "transformers"),
    *("peft", "trl", "lm_eval", "qwix", "google-tunix", "easydel"),
)


def processor() -> dict[str, Any]:
    """Returns name, generation ("" if unknown), cores and instruction sets of the CPU."""
    info = proc_fields("/proc/cpuinfo")
    flags = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name", platform.processor() or "unknown"),
        "generation": generation(info),
        "cores": len(os.sched_getaffinity(0)),
        "flags": {name: name in flags for name in _CPU_FLAGS},
    }


def generation(info: Mapping[str, str]) -> str:
    """Returns the name of a processor's design from the fields of /proc/cpuinfo.

    The model name is not enough: virtual machines name all of them "AMD EPYC".
    """
    try:
        family, model = int(info["cpu family"]), int(info["model"])
    except (KeyError, ValueError):
        return ""
    candidates = _GENERATIONS.get((info.get("vendor_id", ""), family), ())
    return next((name for models, name in candidates if model in models), "")


def machine() -> dict[str, Any]:
    """Returns CPU, memory and versions, on which figures depend."""
    memory = proc_fields("/proc/meminfo").get("MemTotal", "0 kB").split()[0]
    return {
        **processor(),
        "memory_gb": round(int(memory) / 2**20, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
    }


def machine_name(machine: Mapping[str, Any]) -> str:
    """Returns the folder name for the kind of machine that `processor` describes.

    Example: "amd-epyc-zen-4-avx512-bf16", "intel-xeon-amx".
    """
    if machine.get("accelerator"):
        return "-".join(re.findall(r"[a-z0-9]+", machine["accelerator"].lower()))
    cpu = re.sub(r"\((r|tm)\)|\b(processor|cpu)\b", " ", machine["cpu"].lower())
    words = f"{cpu} {machine.get('generation', '')} {instructions(machine)}"
    return "-".join(re.findall(r"[a-z0-9]+", words.lower()))


def instructions(machine: Mapping[str, Any]) -> str:
    """Returns the widest matrix instructions in a CPU's `processor` record; "" if not recorded."""
    flags = machine["flags"]
    if flags.get("amx_bf16"):
        return "amx"
    if flags.get("avx512_bf16"):
        return "avx512-bf16"
    return {True: "avx512", False: "avx2", None: ""}[flags.get("avx512f")]


def versions() -> dict[str, str]:
    """Returns the installed versions of packages on which figures depend."""
    return {name: number for name in _PACKAGES if (number := _version(name))}


def proc_fields(path: str) -> dict[str, str]:
    """Returns the "name: value" lines of the first block of a /proc file, or {} without it."""
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
