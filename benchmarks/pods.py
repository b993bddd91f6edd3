"""The table of docs/pods.md: models on pods, by the real compilers (no TPU and no GPU is used).

    # in a separate environment
    pip install '.[tpu]' && python benchmarks/pods.py --platform tpu
    pip install '.[cuda]' && python benchmarks/pods.py --platform gpu      # in another one
    # only the page, from the record
    python benchmarks/pods.py --page

Each entry is `nalora plan` with the user's defaults and the paper's two mechanisms on: 4,096 tokens
a row, one row a chip (unless --rows), rank 8 on every projection of the FFNs, automatic mesh and
rematerialization. Recorded entries are not compiled again (unless --again).
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import parser_of
from markers import write_between

from nalora_jax.planner.machines import topology as machine

RECORD = Path(__file__).parent / "results" / "pods.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "pods.md"
START, END = "<!-- table: benchmarks/pods.py -->", "<!-- end of table -->"
MODELS = (
    *("llama-3.1-8b", "llama-3.1-70b", "gemma-3-27b", "qwen3-32b", "mixtral-8x7b"),
    *("gemma-4-31b", "gpt-oss-20b", "qwen3.5-9b", "qwen3.5-35b-a3b", "glm-4.5-air"),
)
# explicit, independent of defaults
MECHANISMS = (
    "--mechanisms",
    "soft:power=2",
    "homogeneity",
)
TOPOLOGIES = {
    "tpu": ("v5e:16x16", "v6e:16x16", "v5p:8x8x16"),
    "gpu": ("8xh100", "64xh100"),
}


def recorded() -> dict[tuple[str, str, int], dict[str, Any]]:
    """Returns the newest entry of each model, topology and number of rows a chip."""
    lines = RECORD.read_text().splitlines() if RECORD.exists() else []
    records = [json.loads(line) for line in lines]
    return {
        (entry["model"], entry["topology"], entry["rows"] // chips(entry)): entry
        for entry in records
    }


def chips(entry: dict[str, Any]) -> int:
    """Returns the number of chips of an entry's machine."""
    return entry["layout"]["data"] * entry["layout"]["fsdp"] * entry["layout"]["tensor"]


def compile_entry(model: str, topology: str, rows: int) -> bool:
    """Adds an entry to the record in a separate process; returns True on success."""
    batch = () if rows == 1 else ("--batch", str(rows * machine(topology).size))
    command = [
        sys.executable,
        "-m",
        "nalora_jax",
        "plan",
        "--model",
        model,
        "--topology",
        topology,
    ]
    finished = subprocess.run(
        [*command, *batch, *MECHANISMS, "--json", str(RECORD)], check=False
    )
    return finished.returncode == 0


def table() -> str:
    """Returns Markdown with a row for each entry; 64 H100 are left out, whose steps equal 8 H100
    within 3%."""
    entries = recorded()
    lines = [
        "| model | machine | layout | GB a chip (limit) | GB received (overlapped) | step, at least | MFU "
        "| tokens/s a chip |",
        "|---|---|---|---|---|---|---|---|",
    ]
    machines = [*TOPOLOGIES["tpu"], "8xh100"]
    order = itertools.product(
        MODELS, machines, sorted({rows for _, _, rows in entries})
    )
    for model, topology, rows in order:
        if (model, topology, rows) in entries:
            entry = entries[model, topology, rows]
            layout = entry["layout"]
            misfit = "" if entry["fits"] else " **does not fit**"
            where = topology if rows == 1 else f"{topology}, {rows} rows a chip"
            lines.append(
                f"| {model} | {where} | {layout['data']}x{layout['fsdp']}x{layout['tensor']} {layout['remat']} "
                f"| {entry['memory'] / 1e9:.1f} ({entry['limit'] / 1e9:.1f}){misfit} "
                f"| {entry['moved'] / 1e9:.1f} ({entry['hidden'] / 1e9:.1f}) | {entry['seconds']:.3f} s "
                f"| {entry['mfu']:.0%} | {entry['tokens_per_second'] / chips(entry):,.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--platform", choices=tuple(TOPOLOGIES), default="tpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument(
        "--topologies", nargs="+", help="by default all of the platform's"
    )
    parser.add_argument(
        "--rows", type=int, default=1, help="rows of 4,096 tokens a chip"
    )
    parser.add_argument(
        "--again", action="store_true", help="compile what is recorded as well"
    )
    parser.add_argument("--page", action="store_true", help="nothing but the page")
    options = parser.parse_args()
    failed = []
    for model in () if options.page else options.models:
        for topology in options.topologies or TOPOLOGIES[options.platform]:
            known = (model, topology, options.rows) in recorded()
            if (options.again or not known) and not compile_entry(
                model, topology, options.rows
            ):
                failed.append(f"{model} on {topology}")
    write_between(PAGE, START, END, table())
    if failed:
        sys.exit("not compiled: " + ", ".join(failed))


if __name__ == "__main__":
    main()
