"""Every parser on damaged files, each in a process of its own that may hang or fill memory without harm.

    python -m tests.fuzz --inputs 10000 --publish        # into docs/checkpoints.md; hours on two cores
    python -m tests.fuzz --inputs 300 --only GGUF JSONL

Prints a table: parser, inputs, untyped errors, hangs (10 seconds of the processor, or a minute that passes, so
that a crowded machine makes no hangs), largest memory above that of the undamaged file. Exits with status 1 where there
was an untyped error, a hang, or more than 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.markers import write_between
from tests.fuzz.campaign import outcomes
from tests.fuzz.parsers import PARSERS, Parser

_PROCESSOR_SECONDS = 10.0
_SECONDS = 60.0
_START_SECONDS = 300.0
_MAX_MB = 1000
PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
BEGIN, END = "<!-- fuzz: python -m tests.fuzz --publish -->", "<!-- end of fuzz -->"


@dataclass
class Tally:
    """What the inputs of one parser did."""

    inputs: int = 0
    hangs: list[int] = field(default_factory=list)
    untyped: Counter[str] = field(default_factory=Counter)
    memory_mb: int = 0

    @property
    def failed(self) -> bool:
        return bool(self.hangs or self.untyped or self.memory_mb > _MAX_MB)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1000, help="of each parser; of the slow ones fewer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="+", choices=[each.name for each in PARSERS], help="some of the parsers"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parsers that run at a time")
    parser.add_argument(
        "--publish", action="store_true", help="put a summary of all parsers into docs/checkpoints.md"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.publish and args.only:
        parser.error("--publish is for all parsers")
    if args.child:
        chosen = next(each for each in PARSERS if each.name == args.child)
        for outcome in outcomes(chosen, args.seed, args.first, args.inputs):
            print(json.dumps(asdict(outcome)), flush=True)
        return 0
    rows = ["| parser | inputs | untyped errors | hangs | largest memory |", "|---|---|---|---|---|"]
    print(*rows, sep="\n")
    chosen_parsers = [each for each in PARSERS if not args.only or each.name in args.only]
    tallies = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        running = pool.map(lambda each: run(each, args.seed, each.share(args.inputs)), chosen_parsers)
        for each, tally in zip(chosen_parsers, running, strict=True):
            tallies[each.name] = tally
            cells = (
                each.name,
                f"{tally.inputs:,}",
                tally.untyped.total(),
                len(tally.hangs),
                f"{tally.memory_mb} MB",
            )
            rows.append(f"| {' | '.join(map(str, cells))} |")
            print(rows[-1], flush=True)
    if args.publish:
        write_between(PAGE, BEGIN, END, summary(tallies))
    for name, tally in tallies.items():
        for error, count in tally.untyped.most_common(20):
            print(f"{name}: {count} x {error}", file=sys.stderr)
        for number in tally.hangs:
            print(f"{name}: input {number} of seed {args.seed} hangs", file=sys.stderr)
    return int(any(tally.failed for tally in tallies.values()))


def summary(tallies: Mapping[str, Tally]) -> str:
    """Returns the lines of the page: totals over all parsers, their names, and those that failed."""
    inputs = sum(tally.inputs for tally in tallies.values())
    untyped = sum(tally.untyped.total() for tally in tallies.values())
    hangs = {name: len(tally.hangs) for name, tally in tallies.items() if tally.hangs}
    listed = "; ".join(f"{count} of {name}" for name, count in hangs.items()) or "none"
    return (
        f"{inputs:,} inputs: {untyped} untyped errors; hangs: {listed}; "
        f"at most {max(tally.memory_mb for tally in tallies.values())} MB.\n"
        f"Parsers: {', '.join(tallies)}."
    )


def run(parser: Parser, seed: int, count: int) -> Tally:
    """All inputs of a parser; after one that hangs or ends its process, another process goes on with the next."""
    tally, first = Tally(), 0
    while first < count:
        first = _run_from(parser, seed, first, count, tally)
    return tally


def _run_from(parser: Parser, seed: int, first: int, count: int, tally: Tally) -> int:
    """Inputs from ``first`` on, in one process; returns the first that is still to be read."""
    command = [sys.executable, "-m", "tests.fuzz", "--child", parser.name, "--seed", str(seed)]
    command += ["--first", str(first), "--inputs", str(count)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as child:
        assert child.stdout is not None
        baseline, ready = None, True
        while True:
            ready = _answers(child, started=baseline is not None)
            line = child.stdout.readline() if ready else b""
            if not line:
                child.kill()
                break
            outcome = json.loads(line)
            if baseline is None:
                baseline = outcome["peak_mb"]
                continue
            tally.inputs += 1
            first = outcome["number"] + 1
            tally.memory_mb = max(tally.memory_mb, outcome["peak_mb"] - baseline)
            if outcome["untyped"]:
                tally.untyped[outcome["untyped"]] += 1
    if baseline is None:
        raise RuntimeError(f"{parser.name}: the undamaged file is not read: {' '.join(command)}")
    if first < count:
        tally.inputs += 1
        if not ready:
            tally.hangs.append(first)
        else:
            tally.untyped["the end of the process"] += 1
        first += 1
    return first


def _answers(child: subprocess.Popen[bytes], *, started: bool) -> bool:
    """Whether a line (or the end) comes before the next input counts as one that hangs."""
    began, used = time.monotonic(), _processor_seconds(child.pid)
    while not select.select([child.stdout], [], [], 1.0)[0]:
        if time.monotonic() - began > (_SECONDS if started else _START_SECONDS):
            return False
        if started and _processor_seconds(child.pid) - used > _PROCESSOR_SECONDS:
            return False
    return True


def _processor_seconds(pid: int) -> float:
    """What a process has used of the processor; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
