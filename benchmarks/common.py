"""Shared by all benchmarks: paired timing, process measurements, JSON files and Markdown tables.

The module imports no heavy packages at the top, so that a measured process pays only for its own
work.

Small ratios need pairs: `alternate` runs two callables in random order, pair by pair, in one
process, so that drift of the machine affects both, and `ratio` returns the median ratio with its
95% bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machines import machine, machine_name, proc_fields, processor

# The committed figures, in a folder per kind of machine; git ignores new measurements.
PUBLISHED = Path(__file__).parent / "results"
OWN = PUBLISHED / "own"

# Environment of both sides of every comparison: large pages for glibc's buffers (8 to 12% faster
# steps of either library on an idle machine).
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

# SmolLM2-135M, the model of the published figures, with transformers' names.
_SMOLLM2 = {
    "model_type": "llama",
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
# A small Qwen3.5: three layers of linear attention for one of attention.
_QWEN35 = {
    "model_type": "qwen3_5_text",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "tie_word_embeddings": True,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {"smollm2": _SMOLLM2, "qwen3.5": _QWEN35}

RESULTS = OWN / machine_name(processor())


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Returns the parser of a script with its docstring as the help."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_work(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a training process, which are the same for every library in a
    comparison."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument(
        "--steps", type=int, default=8, help="timed steps, after --warmup"
    )
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--architecture", choices=tuple(ARCHITECTURES), default="smollm2"
    )
    parser.add_argument("--layers", type=int, help="default: the architecture's")


def architecture(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the ``config.json`` of ``options``, of `add_work`."""
    raw = ARCHITECTURES[options.architecture]
    return {**raw, "num_hidden_layers": options.layers or raw["num_hidden_layers"]}


def random_tokens(
    steps: int, batch: int, seq: int, vocab: int, seed: int = 0
) -> np.ndarray:
    """Returns ``[steps, batch, seq]`` int64 tokens, equal for every library in a comparison."""
    return np.random.default_rng(seed).integers(0, vocab, (steps, batch, seq))


def timed_steps(
    step: Callable[[Any], float], batches: Iterable[Any], *, warmup: int, tokens: int
) -> dict[str, Any]:
    """Returns wall and CPU seconds and the speed of the steps after ``warmup``, and all losses.

    Args:
      step: trains on a batch and returns the loss, and therefore waits for the device.
      batches: of all steps.
      warmup: number of steps that are not counted.
      tokens: of a batch.
    """
    seconds, busy, losses = [], [], []
    for batch in batches:
        start, start_busy = time.perf_counter(), time.process_time()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - start_busy)
    seconds, busy = seconds[warmup:], busy[warmup:]
    return {
        "seconds": seconds,
        "cpu_seconds_per_step": busy,
        "tokens_per_second": [tokens / second for second in seconds],
        # Well below the number of threads: another program used the processor, and the rates are
        # not reliable.
        "cores_busy": sum(busy) / sum(seconds) if seconds else None,
        "losses": losses,
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Returns minimum, median, maximum and number of repeated measurements."""
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
        "n": len(values),
    }


def alternate(
    first: Callable[[], Any],
    second: Callable[[], Any],
    *,
    pairs: int = 40,
    warmup: int = 2,
    seed: int = 0,
) -> tuple[list[float], list[float]]:
    """Returns seconds of two callables pair by pair, in random order, waiting for their results.

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
    return seconds


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    confidence: float = 0.95,
) -> dict[str, float]:
    """Returns the median of the paired ratios, with its percentile bootstrap interval."""
    from scipy.stats import bootstrap

    ratios = np.asarray(numerators, float) / np.asarray(denominators, float)
    if len(ratios) < 2:
        return {
            "median": float(ratios[0]),
            "low": float("nan"),
            "high": float("nan"),
            "pairs": len(ratios),
        }
    interval = bootstrap(
        (ratios,), np.median, confidence_level=confidence, method="percentile", rng=0
    )
    low, high = interval.confidence_interval
    return {
        "median": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "pairs": len(ratios),
    }


def peak_rss_mb() -> float:
    """Returns the process's peak memory in MB; a measured process calls it at its end.

    It reads the high-water mark of the address space: `getrusage` (and the parent's `wait4`) also
    count the parent's memory at the fork.
    """
    status = proc_fields("/proc/self/status")
    if "VmHWM" in status:
        return int(status["VmHWM"].split()[0]) / 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def run_process(command: Sequence[str]) -> dict[str, Any]:
    """Returns the JSON object that a command prints on its last line.

    Raises:
      RuntimeError: it failed, or its last line is not a JSON object; includes the end of its
        output.
    """
    environment = dict(os.environ) | ENVIRONMENT
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines or not lines[-1].startswith("{"):
        raise RuntimeError(
            f"{' '.join(command)} (exit {done.returncode}): {done.stderr[-2000:]}"
        )
    record: dict[str, Any] = json.loads(lines[-1])
    return record


def script(name: str, *arguments: object, python: str = sys.executable) -> list[str]:
    """Returns the command that runs a script of this folder."""
    return [python, str(Path(__file__).parent / name), *map(str, arguments)]


def alternate_processes(
    commands: Mapping[str, Sequence[str]], *, rounds: int, seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Runs each command once per round, in random order within a round."""
    order = random.Random(seed)
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name in order.sample(list(commands), len(commands)):
            measured[name].append(run_process(commands[name]))
    return measured


# ---------------------------------------------------------------- results


def load(benchmark: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Returns a part's record, ``{"cases": {case: {"machine", "command", ...}}}``, or no cases."""
    path = folder / f"{benchmark}.json"
    return json.loads(path.read_text()) if path.exists() else {"cases": {}}


def save(
    benchmark: str, case: str, result: Mapping[str, Any], folder: Path = RESULTS
) -> dict[str, Any]:
    """Adds ``found``, the machine and the command as a case to ``<folder>/<part>.json``.

    Returns:
      A record as returned by `load`, with this case only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = load(benchmark, folder)
    command = shlex.join(
        ["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_public, sys.argv[1:])]
    )
    entry = {"machine": machine(), "command": command, **result}
    record["cases"][case] = _public(json.loads(json.dumps(entry, default=str)))
    write(folder / f"{benchmark}.json", record)
    return {"cases": {case: record["cases"][case]}}


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record into its file atomically."""
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    scratch.replace(path)


def _public(value: Any) -> Any:
    """Returns ``value`` without this machine's paths: an absolute path keeps only its last name."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return (
        f".../{Path(value).name}"
        if isinstance(value, str) and Path(value).is_absolute()
        else value
    )


def add_rounds(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds the options of a part that compares processes."""
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="each process runs once in a round"
    )
    parser.add_argument(
        "--add",
        action="store_true",
        help="keep the recorded rounds of this case and add these",
    )


def compare(
    benchmark: str,
    case: str,
    commands: Mapping[str, Sequence[str]],
    options: argparse.Namespace,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs alternating processes for ``options.rounds`` rounds; saves records with ``more``.

    With ``options.add`` the rounds of earlier calls are kept, so that a long comparison can be done
    in several calls. Returns the same as `save`.
    """
    runs = load(benchmark)["cases"].get(case, {}).get("runs", {}) if options.add else {}
    measured = alternate_processes(
        commands, rounds=options.rounds, seed=len(next(iter(runs.values()), []))
    )
    for name, items in measured.items():
        runs[name] = [*runs.get(name, []), *items]
    return save(
        benchmark, case, {"settings": vars(options), "runs": runs, **(more or {})}
    )


def values(runs: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Returns field ``key`` of every run; a list of measurements counts as separate runs."""
    numbers = [run[key] for run in runs]
    return [x for item in numbers for x in (item if isinstance(item, list) else [item])]


# ---------------------------------------------------------------- tables


def spread(measured: Sequence[float], digits: int = 0, unit: str = "") -> str:
    """Returns the median with minimum and maximum, "630 (612 to 655)"; a single value alone."""
    middle, low, high = (
        f"{f(measured):,.{digits}f}" for f in (statistics.median, min, max)
    )
    unit = f" {unit}" if unit else ""
    return f"{middle}{unit}" if low == high else f"{middle}{unit} ({low} to {high})"


def compared(
    what: str,
    ours: Sequence[float],
    other: Sequence[float],
    digits: int = 0,
    unit: str = "",
) -> tuple[str, ...]:
    """Returns the cells of two sets of repeated measurements, with the ratio of their medians."""
    ratio = statistics.median(ours) / statistics.median(other)
    return what, spread(ours, digits, unit), spread(other, digits, unit), f"{ratio:.3f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
