"""Load time of SmolLM2-135M-Instruct, weights and tokenizer, against transformers.

    python benchmarks/load_time.py --format safetensors --dtype bfloat16
    python benchmarks/load_time.py --format gguf --dtype float32

Each load is a separate process, alternating, with the files in the page cache. The clock runs
around the load alone, after the library's import, and stops when one value of every page of every
weight has been read: transformers memory-maps safetensors files, and would otherwise leave the
reading to the first step. With --memory-at-hand both touch and free as much memory as the weights
need before the clock starts, so that the time does not include a hypervisor that reclaims its
virtual machine's unused memory.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import add_rounds, compare, peak_rss_mb, script
from model_files import files
from tables import Row, at_most, compared_runs, requirements

TITLE = "Load time"
SHORT = "Loading, transformers"
FORMATS = ("safetensors", "gguf")
PARAMETERS = 134_515_008


def load_ours(path: Path, dtype: str) -> tuple[float, int]:
    """Returns the seconds of a load, and the number of loaded parameters."""
    import jax

    from nalora_jax.weights.base import load_model

    jax.devices()
    start = time.perf_counter()
    loaded = load_model(str(path), dtype=dtype)
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(loaded.params)]
    touch(arrays)
    return time.perf_counter() - start, sum(array.size for array in arrays)


def load_theirs(path: Path, dtype: str) -> tuple[float, int]:
    """Returns the seconds of a load, and the number of loaded parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, logging

    logging.set_verbosity_error()
    del LlamaForCausalLM  # imported above, before the clock starts
    where, file = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype), **file)
    AutoTokenizer.from_pretrained(where, **file)
    arrays = [parameter.detach().view(torch.uint8).numpy() for parameter in model.parameters()]
    touch(arrays)
    return time.perf_counter() - start, sum(parameter.numel() for parameter in model.parameters())


def bring_memory(dtype: str) -> None:
    """Allocates and frees the memory of the weights, so that the load finds it available."""
    np.ones(PARAMETERS, {"float32": np.uint32, "bfloat16": np.uint16}[dtype])


def touch(arrays: list[np.ndarray]) -> int:
    """Reads a byte of every page."""
    return sum(int(array.reshape(-1).view(np.uint8)[::4096].sum()) for array in arrays)


def one(options: argparse.Namespace) -> None:
    """Runs the measured process."""
    if options.memory_at_hand:
        bring_memory(options.dtype)
    load = load_ours if options.one == "nalora_jax" else load_theirs
    seconds, count = load(options.path, options.dtype)
    print(
        json.dumps(
            {"seconds": seconds, "parameters": count, "done_at": time.time(), "peak_rss_mb": peak_rss_mb()}
        )
    )


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns the load alone, which has a requirement, and the time of the complete process."""
    found_rows = []
    for case, result in record["cases"].items():
        peer, settings = (result["runs"], "transformers"), result["settings"]
        limit = (
            None if settings["memory_at_hand"] else at_most(0.4 if settings["format"] == "gguf" else 1.0)
        )
        found_rows.append(compared_runs(f"load, {case}", *peer, "seconds", limit, digits=2, unit="s"))
        what = f"from process start, imports included, {case}"
        found_rows.append(compared_runs(what, *peer, "seconds_until_done", None, digits=1, unit="s"))
    return found_rows


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown."""
    return requirements(rows(record), other="transformers")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", choices=FORMATS, default="safetensors")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--memory-at-hand", action="store_true", help="the system's first touch of memory is not measured"
    )
    parser.add_argument("--one", choices=("nalora_jax", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    add_rounds(parser, 5)
    options = parser.parse_args()
    if options.one:
        one(options)
        return
    path = files(options.dtype)["gguf" if options.format == "gguf" else "model"]
    work = [
        "--path",
        path,
        "--dtype",
        options.dtype,
        *(["--memory-at-hand"] if options.memory_at_hand else []),
    ]
    commands = {
        name: script("load_time.py", "--one", name, *work) for name in ("nalora_jax", "transformers")
    }
    case = f"{options.format}, {options.dtype}" + (", memory at hand" if options.memory_at_hand else "")
    print(table(compare("load_time", case, commands, options)))


if __name__ == "__main__":
    main()
