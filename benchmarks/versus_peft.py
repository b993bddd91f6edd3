"""Training speed and memory against transformers + PEFT on torch: same model, shapes and work, in one run.

    python benchmarks/versus_peft.py --dtype bfloat16 --shape 8x128 --rounds 2
    python benchmarks/versus_peft.py --dtype float32 --shape 8x128

Processes alternate in random order; each runs --steps timed steps. PEFT runs at the best settings that peft_baseline.py
knows for the dtype. Prints tokens/s of both, the ratio of their medians, and the ratio of peak memory; writes
results/versus_peft_<dtype>_<shape>.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from common import alternate_processes, write

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--shape", default="8x128", help="batch x sequence")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--method", choices=("lora", "nalora"), default="nalora", help="what this library runs")
    options = parser.parse_args()
    batch, seq = options.shape.split("x")
    work = ["--dtype", options.dtype, "--batch", batch, "--seq", seq, "--steps", str(options.steps)]
    commands = {
        "nalora_jax": [sys.executable, str(HERE / "training.py"), *work, "--method", options.method],
        "peft": [sys.executable, str(HERE / "peft_baseline.py"), *work],
    }
    found = alternate_processes(commands, rounds=options.rounds)
    speeds = {name: [s for run in runs for s in run.record["tokens_per_second"]] for name, runs in found.items()}
    memory = {name: statistics.median(run.record["peak_rss_mb"] for run in runs) for name, runs in found.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(
        f"{options.dtype} {options.shape}, {options.method}: {medians['nalora_jax']:.0f} tokens/s against "
        f"{medians['peft']:.0f} of PEFT, {medians['nalora_jax'] / medians['peft']:.2f}x; peak memory "
        f"{memory['nalora_jax']:.0f} against {memory['peft']:.0f} MB, {memory['nalora_jax'] / memory['peft']:.2f}x"
    )
    runs = {name: [run.record for run in items] for name, items in found.items()}
    write(f"versus_peft_{options.dtype}_{options.shape}", {"settings": vars(options), "runs": runs})


if __name__ == "__main__":
    main()
