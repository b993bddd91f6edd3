"""What every benchmark shares: the machine's description, paired timing, process measurements, and the JSON files.

Imports nothing heavy at the top, so that a measured process pays for what it measures only.

Small ratios need pairs: `alternate` runs two callables in random order, pair by pair, in one process, so that drift of
the machine hits both, and `ratio` gives the median ratio with its 95% bootstrap interval.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"

# Instruction sets that decide how fast a CPU multiplies matrices; every figure names those that it had.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft", "qwix")

# SmolLM2-135M, the model of the published figures: transformers' names.
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def machine() -> dict[str, Any]:
    """CPU, memory and versions: what a figure depends on."""
    info = _proc_fields("/proc/cpuinfo")
    flags = set(info.get("flags", "").split())
    memory = _proc_fields("/proc/meminfo").get("MemTotal", "0 kB").split()[0]
    return {
        "cpu": info.get("model name", platform.processor() or "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "flags": {name: name in flags for name in _CPU_FLAGS},
        "memory_gb": round(int(memory) / 2**20, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _proc_fields(path: str) -> dict[str, str]:
    """The "name: value" lines of the first block of a /proc file; nothing where there is none."""
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


def random_tokens(steps: int, batch: int, seq: int, vocab: int, seed: int = 0) -> np.ndarray:
    """``[steps, batch, seq]`` int64 tokens: the same for every library that is compared."""
    return np.random.default_rng(seed).integers(0, vocab, (steps, batch, seq))


def summary(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median, maximum and number of repeated measurements."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "n": len(values)}


@dataclass(frozen=True)
class Pairs:
    """Seconds of two callables; the i-th entries ran back to back."""

    first: list[float]
    second: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Summaries, the ratio first / second, and the raw seconds."""
        return {
            "first": summary(self.first),
            "second": summary(self.second),
            "ratio": ratio(self.first, self.second),
            "seconds": {"first": self.first, "second": self.second},
        }


def alternate(
    first: Callable[[], Any], second: Callable[[], Any], *, pairs: int = 40, warmup: int = 2, seed: int = 0
) -> Pairs:
    """Time two callables pair by pair, in random order within each pair; what they return is waited for.

    Args:
      pairs: 40 or more for a ratio near 1.
      warmup: untimed calls of each (compilation, caches).
    """
    import jax

    def timed(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - start

    for _ in range(warmup):
        timed(first), timed(second)
    order = random.Random(seed)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        for which in order.sample((0, 1), 2):
            seconds[which].append(timed((first, second)[which]))
    return Pairs(*seconds)


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, confidence: float = 0.95) -> dict[str, float]:
    """Median of the paired ratios, with the percentile bootstrap interval of that median."""
    from scipy.stats import bootstrap

    ratios = np.asarray(numerators, float) / np.asarray(denominators, float)
    if len(ratios) < 2:
        return {"median": float(ratios[0]), "low": float("nan"), "high": float("nan"), "pairs": len(ratios)}
    found = bootstrap((ratios,), np.median, confidence_level=confidence, method="percentile", rng=0)
    low, high = found.confidence_interval
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high), "pairs": len(ratios)}


@dataclass(frozen=True)
class Measured:
    """What one finished process said and cost."""

    record: dict[str, Any]  # the JSON object on the last line of its standard output
    seconds: float  # from start to exit


def peak_rss_mb() -> float:
    """Most memory that this process has held, in MB; a measured process puts it into its record at its end.

    From the high-water mark of its own address space: `getrusage` (and the parent's `wait4`) also count what the parent
    held at the moment of the fork.
    """
    status = _proc_fields("/proc/self/status")
    if "VmHWM" in status:
        return int(status["VmHWM"].split()[0]) / 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def run_process(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Run a command that prints one JSON object on its last line, and time it.

    Raises:
      RuntimeError: it failed, or printed no JSON object last; with the end of what it said.
    """
    start = time.perf_counter()
    done = subprocess.run(
        command, env=dict(os.environ) | dict(environment or {}), capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines or not lines[-1].startswith("{"):
        raise RuntimeError(f"{' '.join(command)} (exit {done.returncode}): {done.stderr[-2000:]}")
    return Measured(json.loads(lines[-1]), seconds)


def alternate_processes(
    commands: Mapping[str, Sequence[str]], *, rounds: int, seed: int = 0, environment: Mapping[str, str] | None = None
) -> dict[str, list[Measured]]:
    """Run each command once per round, in random order within a round."""
    order = random.Random(seed)
    found: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name in order.sample(list(commands), len(commands)):
            found[name].append(run_process(commands[name], environment))
    return found


def write(name: str, record: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """``record``, the machine and the command as ``<folder>/<name>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    command = " ".join(["python", *sys.argv])
    path.write_text(json.dumps({"machine": machine(), "command": command, **record}, indent=1) + "\n")
    return path
