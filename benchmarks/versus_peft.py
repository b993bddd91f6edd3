"""Training speed and memory against transformers + PEFT on torch: same model, shapes and work.

    python benchmarks/versus_peft.py --dtype bfloat16 --shape 8x128 --rounds 2
    # additional rounds
    python benchmarks/versus_peft.py --dtype float32 --shape 8x128 --add
    python benchmarks/versus_peft.py --dtype bfloat16 --shape 8x256 --checkpointing
    # the faster way on a CPU with AMX
    python benchmarks/versus_peft.py --dtype float32 --peft-compile
    python benchmarks/versus_peft.py --dtype float32 --architecture qwen3.5 --peft-compile
    python benchmarks/versus_peft.py --dtype bfloat16 --architecture qwen3.5 --bf16-mode autocast32
    # all weights, by transformers without PEFT
    python benchmarks/versus_peft.py --dtype float32 --full
    python benchmarks/versus_peft.py --dtype bfloat16 --full --bf16-mode autocast32

Processes alternate in random order; each runs --steps timed steps. PEFT runs at the best settings
that peft_baseline.py knows for the dtype; with --checkpointing both rematerialize whole layers, for
the comparison of memory. Speed is tokens/s of all timed steps, memory the peak of the whole
process. Each library runs once before, which fills the caches of compiled programs that both keep
by default.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import (
    ARCHITECTURES,
    add_rounds,
    alternate_processes,
    compare,
    compared,
    markdown,
    parser_of,
    script,
    values,
)

# How bfloat16 is used by PEFT, and the words for it in a case's name (see peft_baseline.py).
PEFT_MODES = {
    "pure": "",
    "mixed": ", PEFT's float32 adapters",
    "autocast32": ", PEFT's autocast",
}


def table(record: dict[str, Any]) -> str:
    """Returns Markdown with speed and memory of each case."""
    rows = []
    for case, result in record["cases"].items():
        for what, key, unit in (
            ("tokens/s", "tokens_per_second", ""),
            ("memory", "peak_rss_mb", "MB"),
        ):
            measured = [
                values(result["runs"][name], key) for name in ("nalora_jax", "peft")
            ]
            rows.append(compared(f"{what}, {case}", *measured, unit=unit))
    return markdown(("what", "nalora_jax", "PEFT", "ratio"), rows)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--shape", default="8x128", help="batch x sequence")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--checkpointing", action="store_true", help="PEFT with gradient checkpointing"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="train all weights, in float32 on both sides",
    )
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
    parser.add_argument(
        "--architecture", choices=tuple(ARCHITECTURES), default="smollm2"
    )
    options = parser.parse_args()
    batch, seq = options.shape.split("x")
    work = ["--dtype", options.dtype, "--batch", batch, "--seq", seq]
    work += ["--architecture", options.architecture]
    extra = [
        "--bf16-mode",
        options.bf16_mode,
        *(["--checkpointing"] if options.checkpointing else []),
    ]
    if options.peft_compile is not None:
        extra.append("--compile" if options.peft_compile else "--no-compile")
    ours = ["--method", "nalora", "--compilation-cache"]
    if options.full:
        extra.append("--full")
        ours = ["--method", "full", "--compilation-cache"]
    # both rematerialize layers
    ours += ["--remat", "full"] if options.checkpointing else []

    def commands(steps: int) -> dict[str, list[str]]:
        return {
            "nalora_jax": script("training.py", *work, "--steps", steps, *ours),
            "peft": script("peft_baseline.py", *work, "--steps", steps, *extra),
        }

    kind = ", all weights" if options.full else ""
    kind += ", PEFT checkpointing" if options.checkpointing else ""
    kind += PEFT_MODES[options.bf16_mode]
    kind += "" if options.architecture == "smollm2" else f", {options.architecture}"
    case = f"{options.dtype} {options.shape}{kind}"
    alternate_processes(commands(1), rounds=1)
    print(table(compare("versus_peft", case, commands(options.steps), options)))


if __name__ == "__main__":
    main()
