"""Time from command to the end of the first training step, with a warm cache, against PEFT's.

    python benchmarks/first_step.py --dtype bfloat16

Both load SmolLM2-135M-Instruct from the same safetensors folder and train one step of 8 x 128
random tokens. This library runs once before, which fills the compilation cache that its command
keeps by default; PEFT runs uncompiled, which is its fastest way to a first step.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import add_rounds, compare, run_process, script
from model_files import files
from tables import Row, at_most, compared_runs, requirements

TITLE = "Time from command to the first step"
SHORT = "Command to first step"


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns one row per dtype."""
    return [
        compared_runs(
            f"first step, {case}",
            result["runs"],
            "peft",
            "seconds_until_done",
            at_most(1.0),
            digits=1,
            unit="s",
        )
        for case, result in record["cases"].items()
    ]


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown."""
    return requirements(rows(record), other="PEFT")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add_rounds(parser, 3)
    options = parser.parse_args()
    work = ["--model", files(options.dtype)["model"], "--dtype", options.dtype, "--steps", 1, "--warmup", 0]
    commands = {
        "nalora_jax": script("training.py", *work, "--method", "nalora", "--compilation-cache"),
        "peft": script("peft_baseline.py", *work, "--no-compile", "--attention", "sdpa"),
    }
    run_process(commands["nalora_jax"])
    print(table(compare("first_step", f"{options.dtype} 8x128", commands, options)))


if __name__ == "__main__":
    main()
