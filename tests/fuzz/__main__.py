"""Every parser on damaged files, each in a process of its own.

    python -m tests.fuzz --inputs 4000 --publish        # into docs/checkpoints.md; hours on two cores
    python -m tests.fuzz --inputs 300 --only GGUF JSONL

Prints a table: parser, inputs, untyped errors, hangs (10 seconds of the processor), largest memory above that of the
undamaged file. Exits with status 1 if there was an untyped error, a hang, or more than 1 GB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.markers import write_between
from tests.fuzz.campaign import Tally, run
from tests.fuzz.parsers import PARSERS

_MAX_MB = 1000
PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
BEGIN, END = "<!-- fuzz: python -m tests.fuzz --publish -->", "<!-- end of fuzz -->"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [each.name for each in PARSERS]
    parser.add_argument("--inputs", type=int, default=1000, help="of each parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the parsers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parsers that run at a time")
    parser.add_argument("--publish", action="store_true", help="put a summary into docs/checkpoints.md")
    args = parser.parse_args()
    print("| parser | inputs | untyped errors | hangs | largest memory |\n|---|---|---|---|---|")
    tallies, spawn = {}, multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        count = len(args.only)
        running = pool.map(run, args.only, [args.seed] * count, [args.inputs] * count)
        for name, tally in zip(args.only, running, strict=True):
            tallies[name] = tally
            counts = f"{tally.inputs:,} | {tally.untyped.total()} | {len(tally.hangs)}"
            print(f"| {name} | {counts} | {tally.memory_mb} MB |", flush=True)
    if args.publish:
        write_between(PAGE, BEGIN, END, summary(tallies))
    for name, tally in tallies.items():
        for error, number in tally.untyped.most_common(20):
            print(f"{name}: {number} x {error}", file=sys.stderr)
        for number in tally.hangs:
            print(f"{name}: input {number} of seed {args.seed} hangs", file=sys.stderr)
    return int(any(one.hangs or one.untyped or one.memory_mb > _MAX_MB for one in tallies.values()))


def summary(tallies: dict[str, Tally]) -> str:
    """Returns the lines of the page: totals over all parsers, their names, and those that failed."""
    inputs = sum(tally.inputs for tally in tallies.values())
    untyped = sum(tally.untyped.total() for tally in tallies.values())
    hangs = [f"{len(tally.hangs)} of {name}" for name, tally in tallies.items() if tally.hangs]
    return (
        f"{inputs:,} inputs: {untyped} untyped errors; hangs: {'; '.join(hangs) or 'none'}; "
        f"at most {max(tally.memory_mb for tally in tallies.values())} MB.\n"
        f"Parsers: {', '.join(tallies)}."
    )


if __name__ == "__main__":
    sys.exit(main())
