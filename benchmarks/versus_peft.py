"""Training speed and memory against transformers + PEFT on torch: same model, shapes and work.

    python benchmarks/versus_peft.py --dtype bfloat16 --shape 8x128 --rounds 2
    python benchmarks/versus_peft.py --dtype float32 --shape 8x128 --add            # additional rounds
    python benchmarks/versus_peft.py --dtype bfloat16 --shape 8x256 --checkpointing
    python benchmarks/versus_peft.py --dtype float32 --peft-compile                # the faster way on a CPU with AMX
    python benchmarks/versus_peft.py --dtype float32 --architecture qwen3.5 --peft-compile
    python benchmarks/versus_peft.py --dtype bfloat16 --architecture qwen3.5 --bf16-mode autocast32

Processes alternate in random order; each runs --steps timed steps. PEFT runs at the best settings
that peft_baseline.py knows for the dtype; with --checkpointing both rematerialize whole layers, for
the comparison of memory. Speed is tokens/s of all timed steps, memory the peak of the whole
process. Each library runs once before, which fills the caches of compiled programs that both keep
by default.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import ARCHITECTURES, add_rounds, alternate_processes, compare, script
from tables import Limit, Row, at_least, at_most, compared_runs, has_amx, paired_runs, requirements

TITLE = "Training against transformers + PEFT"
SHORT = "Training, PEFT"
# How bfloat16 is used by PEFT, and the words for it in a case's name (see peft_baseline.py).
PEFT_MODES = {"pure": "", "mixed": ", PEFT's float32 adapters", "autocast32": ", PEFT's autocast"}


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns speeds first, then memory."""
    speeds, memory = [], []
    for case, result in record["cases"].items():
        # The requirement is against the fastest of PEFT's settings.
        slower = result["settings"]["checkpointing"] or result["settings"].get("bf16_mode") == "mixed"
        fast = None if slower else _speed_limit(result)
        runs, small = result["runs"], _memory_limit(result)
        speed = compared_runs if _is_smollm2(result) else paired_runs
        speeds.append(speed(f"tokens/s, {case}", runs, "peft", "tokens_per_second", fast))
        memory.append(compared_runs(f"peak memory, {case}", runs, "peft", "peak_rss_mb", small, unit="MB"))
    return speeds + memory


def _is_smollm2(result: dict[str, Any]) -> bool:
    return result["settings"].get("architecture", "smollm2") == "smollm2"


def _speed_limit(result: dict[str, Any]) -> Limit:
    if not _is_smollm2(result):
        return at_least(0.8)
    if not has_amx(result):
        return at_least(1.2)
    small = result["settings"]["shape"] == "8x128"
    if result["settings"]["dtype"] == "float32":
        return at_least(1.05 if small else 1.0)
    return at_least(1.4 if small else 1.25)


def _memory_limit(result: dict[str, Any]) -> Limit | None:
    settings = result["settings"]
    if not _is_smollm2(result):
        return None
    if settings["checkpointing"]:
        return at_most(0.75) if settings["dtype"] == "bfloat16" else None
    if has_amx(result):
        return at_most(0.5) if settings["dtype"] == "bfloat16" else None
    return at_most(0.5 if settings["shape"] == "8x256" else 0.8)


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown."""
    return requirements(rows(record), other="PEFT")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--shape", default="8x128", help="batch x sequence")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--method", choices=("lora", "nalora"), default="nalora", help="what this library runs"
    )
    parser.add_argument("--checkpointing", action="store_true", help="PEFT with gradient checkpointing")
    parser.add_argument(
        "--bf16-mode",
        choices=tuple(PEFT_MODES),
        default="pure",
        help="mixed: PEFT's default, float32 adapters; autocast32: torch.autocast over a float32 base",
    )
    parser.add_argument(
        "--peft-compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile; default: peft_baseline.py's",
    )
    add_rounds(parser, 2)
    parser.add_argument("--architecture", choices=tuple(ARCHITECTURES), default="smollm2")
    options = parser.parse_args()
    batch, seq = options.shape.split("x")
    work = [
        "--dtype",
        options.dtype,
        "--batch",
        batch,
        "--seq",
        seq,
        "--architecture",
        options.architecture,
    ]
    extra = ["--bf16-mode", options.bf16_mode, *(["--checkpointing"] if options.checkpointing else [])]
    if options.peft_compile is not None:
        extra.append("--compile" if options.peft_compile else "--no-compile")
    ours = ["--method", options.method, "--compilation-cache"]
    ours += ["--remat", "full"] if options.checkpointing else []  # both rematerialize layers

    def commands(steps: int) -> dict[str, list[str]]:
        return {
            "nalora_jax": script("training.py", *work, "--steps", steps, *ours),
            "peft": script("peft_baseline.py", *work, "--steps", steps, *extra),
        }

    kind = ", PEFT checkpointing" if options.checkpointing else ""
    kind += PEFT_MODES[options.bf16_mode]
    kind += "" if options.architecture == "smollm2" else f", {options.architecture}"
    case = f"{options.dtype} {options.shape}{kind}"
    alternate_processes(commands(1), rounds=1)
    print(table(compare("versus_peft", case, commands(options.steps), options)))


if __name__ == "__main__":
    main()
